"""pass@k of a validation: the chance that one of k responses to a prompt is right.

With n responses to a prompt, c of them right, 1 - C(n - c, k) / C(n, k) is its unbiased estimate
(arXiv 2107.03374, equation 1). verl's own `best@k` draws k of the n with replacement, which is too
low.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

KS = (1, 4, 8)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate from so many samples, of which some are right; 1 <= k <= samples."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def pass_at_k_metrics(
    sources: Sequence[str],
    prompts: Sequence[str],
    infos: Mapping[str, Sequence[Any]],
    expected: Mapping[tuple[str, str], int] | None = None,
) -> dict[str, float]:
    """`val-core/SOURCE/acc/pass@K` for each k of `KS` for which every prompt has responses enough.

    With one response a prompt, pass@1 would say what `mean@1` says, and there is nothing.

    Args:
        sources: Data source of every response.
        prompts: Name of every response's prompt.
        infos: What verl collected of every response: `reward`, and `acc` where the reward function
            returns one, which then counts. Right is what is above 0.
        expected: Responses that a prompt of a source should have; those that failed are wrong.
    """
    found: dict[tuple[str, str], list[bool]] = {}
    rewards, accuracies = infos["reward"], infos.get("acc")
    with_accuracy = {
        source
        for source, value in zip(sources, accuracies or [None] * len(sources), strict=True)
        if value is not None
    }
    for row, key in enumerate(zip(sources, prompts, strict=True)):
        value = accuracies[row] if accuracies and key[0] in with_accuracy else rewards[row]
        found.setdefault(key, []).append(value is not None and value > 0)
    samples = Counter({key: len(right) for key, right in found.items()})
    for key, number in (expected or {}).items():
        samples[key] = max(samples[key], number)
    metrics = {}
    for source in dict.fromkeys(source for source, _ in samples):
        own = [key for key in samples if key[0] == source]
        fewest = min(samples[key] for key in own)
        name = "acc" if source in with_accuracy else "reward"
        for k in KS if fewest > 1 else ():
            if k <= fewest:
                chances = [pass_at_k(samples[key], sum(found.get(key, ())), k) for key in own]
                metrics[f"val-core/{source}/{name}/pass@{k}"] = sum(chances) / len(chances)
    return metrics
