"""A budget of responses dealt to prompts by what more of them are worth."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from hpo_verl.errors import DataError


def group_value(responses: int, rate: float) -> float:
    """What a group of responses is worth where each is right with a probability `rate`.

    V(N, p) = (1 - p^N - (1 - p)^N) p (1 - p)^2: the chance that some are right and some wrong, so
    that there is a gradient, times what an update then gains.
    """
    wrong = 1.0 - rate
    return (1.0 - rate**responses - wrong**responses) * rate * wrong**2


def allocate(rates: Sequence[float | None], uniform: int, least: int, most: int) -> tuple[int, ...]:
    """Deal `uniform` responses a prompt, all together, such that the sum of V(N_i, p_i) is largest.

    V(N + 1, p) - V(N, p) = p (1 - p)^2 (p^N (1 - p) + (1 - p)^N p) falls with N, so V is concave,
    and to give each response where it adds most is exact for least <= N_i <= most. Where none
    adds anything, prompts of p = 0 get what is left, the fewest first, then those of p = 1.

    Args:
        rates: Success rate p of every prompt, in [0, 1]; None where it is not known: these get
            `uniform`.
        uniform: Responses a prompt on average, from `least` to `most`.
        least: Smallest number that a prompt gets.
        most: Largest.

    Raises:
        DataError: A rate is not in [0, 1].
    """
    for prompt, rate in enumerate(rates):
        if rate is not None and not 0.0 <= rate <= 1.0:
            raise DataError(f"success rate {rate:g} of prompt {prompt}: must be in [0, 1]")
    dealt = [uniform if rate is None else least for rate in rates]
    heap: list[tuple[float, float, int, int]] = []

    def offer(prompt: int, rate: float) -> None:
        responses, wrong = dealt[prompt], 1.0 - rate
        gain = rate * wrong**2 * (rate**responses * wrong + wrong**responses * rate)
        heapq.heappush(heap, (-gain, rate, responses, prompt))

    for prompt, rate in enumerate(rates):
        if rate is not None and least < most:
            offer(prompt, rate)
    for _ in range(uniform * len(rates) - sum(dealt)):
        _, rate, _, prompt = heapq.heappop(heap)
        dealt[prompt] += 1
        if dealt[prompt] < most:
            offer(prompt, rate)
    return tuple(dealt)
