"""The two ways to put a Countdown puzzle to a policy.

None holds an expression that could be copied as an answer: what stands between the
answer tags in a prompt is not in the reward's grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Messages = list[dict[str, str]]

_SYSTEM = (
    "You solve arithmetic puzzles. Reason step by step, check your result, "
    "and then give the answer in the form asked for."
)
_TASK = (
    "Combine the numbers {numbers} into an expression whose value is exactly {target}. "
    "Use each number exactly once, no other number, and only +, -, *, / and parentheses. "
)


def chat(numbers: Sequence[int], target: int) -> Messages:
    """System and user message, for instruction-tuned models: the chat template wraps them once."""
    task = _TASK.format(numbers=", ".join(map(str, numbers)), target=target)
    return [
        {"role": "system", "content": _SYSTEM},
        {
            "role": "user",
            "content": task + "Close your reply with the expression between answer tags, "
            "like this: <answer>expression</answer>",
        },
    ]


def tiny(numbers: Sequence[int], target: int) -> Messages:
    """One short message such as `3 7 2 = 13`, for the tiny policy that is trained on CPU.

    It explains nothing: only a policy that was warm-started on this form can read it.
    """
    return [{"role": "user", "content": f"{' '.join(map(str, numbers))} = {target}"}]


PROMPTS: dict[str, Callable[[Sequence[int], int], Messages]] = {"chat": chat, "tiny": tiny}
