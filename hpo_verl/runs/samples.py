"""Sampled responses with their rewards, as a text that a person can read.

What a model writes is hostile to whoever shows it: the text has few lines of bounded length, no
control characters, and a margin before each line of the model's, which none can leave.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from hpo_verl.errors import printable

# In a run's folder, and at most so many responses of a validation.
FOLDER_NAME, SAMPLES = "samples", 8
# Most letters and lines of a prompt, and of a response: its first and its last half.
PROMPT, RESPONSE = (600, 10), (1600, 30)
_MARGIN, _WIDTH = "    | ", 94


def samples_file(folder: Path, step: int) -> Path:
    """Where the samples of a step's validation lie in a run's folder."""
    return folder / FOLDER_NAME / f"step_{step:06d}.txt"


def samples_text(
    step: int, samples: Sequence[tuple[str, str, float]], rewards: Sequence[float]
) -> str:
    """A text of prompts, responses and their rewards; `rewards` are those of all responses."""
    mean = sum(rewards) / len(rewards)
    lines = [
        f"step {step}: {len(samples)} of {len(rewards)} responses, whose mean reward is {mean:.4g}"
    ]
    for number, (prompt, response, reward) in enumerate(samples, start=1):
        lines += ["", f"sample {number}: reward {reward:.4g}", "  prompt:"]
        lines += [f"{_MARGIN}{line}" for line in _shown(prompt, *PROMPT)]
        lines += [f"  response ({len(response)} letters):"]
        lines += [f"{_MARGIN}{line}" for line in _shown(response, *RESPONSE)]
    return "\n".join(lines) + "\n"


def _shown(text: str, letters: int, lines: int) -> list[str]:
    """A text in lines without control characters; the middle of a long one is left out."""
    if (left_out := len(text) - letters) > 0:
        half = letters // 2
        text = f"{text[:half]}\n[... {left_out} letters ...]\n{text[-half:]}"
    found = [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(printable(line), _WIDTH, drop_whitespace=False) or [""]
    ]
    if (left_out := len(found) - lines) > 0:
        half = lines // 2
        found = [*found[:half], f"[... {left_out} lines ...]", *found[-half:]]
    return found
