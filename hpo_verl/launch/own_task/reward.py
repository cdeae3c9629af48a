"""The reward of this task."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1 where the last number of the response is the answer, else 0."""
    # A response can be anything: bound its length first, and never call eval.
    numbers = re.findall("[0-9]+", solution_str[-200:])
    return {"score": float(numbers[-1:] == [ground_truth])}
