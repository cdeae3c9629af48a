"""Results of the lab without a run."""

import math
from itertools import product

import pandas as pd

from hpo_verl.report.studies import Result

STEPS = 4
TRAINING = {
    "steps": STEPS, "prompts_per_step": 64, "responses_per_prompt": 8, "mini_batches": 4,
    "learning_rate": 1e-4, "max_grad_norm": 1.0, "questions": 1600, "max_generation_batches": 10,
}  # fmt: skip
EVALUATION = {"every": 1, "questions": 512}


def made_up_result(cell, success, status="finished"):
    """A result with the given learning curve, one measurement per step."""
    steps = len(success)
    rows = pd.DataFrame({"step": range(steps), "success": success}, dtype=float)
    for name in (
        "alpha", "solve_rate", "entropy", "response_length", "response_length_std",
        "response_length_positive", "response_length_negative",
    ):  # fmt: skip
        rows[name] = [0.5 + 0.1 * i for i in range(steps)]
    rows["responses_sampled"] = [math.nan, *(512.0 * i for i in range(1, steps))]
    environment = {"commit": "abc", "versions": "{}", "machine": "test", "finished": "now"}
    facts = {
        "cell": cell, "status": status, "seconds": 1.0, "warm_start_success": success[0],
        "environment": environment,
    }  # fmt: skip
    return Result(facts, rows)


def made_up_results(study, variants, gain, levels=(0.05,), seeds=5, rates=(1e-4,), training=None):
    """Success rises by `gain(cell)` per step from 0.1, and differs by seed."""
    results = []
    for level, variant, rate, seed in product(levels, variants, rates, range(seeds)):
        cell = {
            "study": study, "task": "countdown3", "warm_start": level, "variant": variant,
            "algorithm": variant, "settings": {}, "learning_rate": rate, "seed": seed,
            "training": {**TRAINING, **(training or {})}, "evaluation": EVALUATION,
        }  # fmt: skip
        curve = [0.1 + 0.01 * seed + gain(cell) * step for step in range(STEPS + 1)]
        results.append(made_up_result(cell, curve))
    return results
