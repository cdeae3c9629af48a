r"""TeleLogs: name the root cause, C1 to C8, in the last `\boxed{}` of the response.

Binary reward as in arXiv 2507.21974: 1 if and only if the last box that the
response opens is closed and holds the right cause. The prompt itself doubles
the braces, so `\boxed{{C3}}` counts too, as do `\text{C3}`, `c3` and `3`;
everything else scores 0. An earlier box never rescues a later one, closed or
cut off. A response is hostile text: it is bounded first and scanned once, without
regular expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo_verl.rewards.result import (
    RewardResult,
    bad_ground_truth,
    last_box,
    require_text,
    reward_result,
)

CAUSES = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8")

_TEXT = "\\text{"
# Room for every accepted form with blanks around it; a longer box holds prose.
_MAX_BOX_CHARACTERS = 64
_SPELLINGS = {spelling: cause for cause in CAUSES for spelling in (cause, cause.lower(), cause[1:])}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> RewardResult:
    r"""Score one response to a TeleLogs question.

    Args:
        data_source: Name of the data set, for error messages.
        solution_str: The response, without its prompt.
        ground_truth: The right cause, "C1" to "C8".
        extra_info: Not used, as whatever else verl passes.
        **kwargs: Not used.

    Returns:
        `score` and `acc` 0.0 or 1.0; `format` 1.0 if the last box is strictly
        `\boxed{C3}` or `\boxed{{C3}}`, right or wrong; and `reason`: `correct`,
        `wrong_cause`, `too_long`, `no_box`, `unclosed_box` or `not_a_cause`.

    Raises:
        DataError: The ground truth is not a cause, or the response is not text.
    """
    if not isinstance(ground_truth, str) or ground_truth not in CAUSES:
        raise bad_ground_truth(data_source, ground_truth, "C1 to C8")
    require_text(data_source, solution_str)
    content, reason = last_box(solution_str, _MAX_BOX_CHARACTERS)
    if content is None:
        reason = "not_a_cause" if reason == "long_box" else reason
        return reward_result(reason, well_formed=False)
    cause = _read_cause(content)
    if cause is None:
        return reward_result("not_a_cause", well_formed=False)
    strict = content in (cause, f"{{{cause}}}")
    return reward_result("correct" if cause == ground_truth else "wrong_cause", well_formed=strict)


def _read_cause(content: str) -> str | None:
    r"""Read a cause, at most once inside braces and once inside `\text{}`, in either order."""
    wrappers = ["{", _TEXT]
    content = content.strip()
    while content not in _SPELLINGS:
        wrapper = next((opening for opening in wrappers if content.startswith(opening)), None)
        if wrapper is None or not content.endswith("}"):
            return None
        wrappers.remove(wrapper)
        content = content[len(wrapper) : -1].strip()
    return _SPELLINGS[content]
