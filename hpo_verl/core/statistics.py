"""What a batch did, in a handful of numbers.

No name may contain "min", "max", "sum" or "total": verl picks the reduction
over mini-batches and sub-steps by such substrings.
"""

from __future__ import annotations

import torch


def _quotient(numerator: float, denominator: float) -> float:
    """0 where there is nothing to divide by; the fractions in the same row tell."""
    return numerator / denominator if denominator > 0 else 0.0


def batch_statistics(
    *,
    alpha: float,
    positives: int,
    negatives: int,
    zero_spread_groups: int,
    groups: int,
    rewards: torch.Tensor,
    live: torch.Tensor,
    lengths: torch.Tensor,
    advantages: torch.Tensor,
    unweighted: torch.Tensor,
) -> dict[str, float]:
    """Describe a rollout batch by the sign of its advantages.

    Tensors are `[batch]`: rewards, rows that count, tokens of every response that are trained on,
    and advantages as trained on and before the weight alpha. `positives` and `negatives` are the
    responses counted as such, `zero_spread_groups` the groups whose rewards are all equal.

    Returns:
        Fractions are of live responses or of groups, lengths in tokens; a solved response has
        a reward above 0. `advantage_mass_negative_over_positive` is the sum of |A| over tokens
        with A < 0, divided by that with A > 0. A quotient with nothing below is 0.
    """
    responses = int(live.sum())
    lengths = lengths.double()

    def mass_ratio(values: torch.Tensor) -> float:
        mass = values.double() * lengths
        return _quotient(-float(mass.clamp(max=0).sum()), float(mass.clamp(min=0).sum()))

    def mean_length(rows: torch.Tensor) -> float:
        # Of one that a rejection has masked the length is not known.
        return _quotient(float(lengths[rows].sum()), int((rows & (lengths > 0)).sum()))

    return {
        "alpha": alpha,
        "positive_fraction": _quotient(positives, responses),
        "negative_fraction": _quotient(negatives, responses),
        "zero_spread_group_fraction": _quotient(zero_spread_groups, groups),
        "solve_rate": _quotient(int((live & (rewards > 0)).sum()), responses),
        "response_length_positive": mean_length(live & (unweighted > 0)),
        "response_length_negative": mean_length(live & (unweighted < 0)),
        "advantage_mass_negative_over_positive": mass_ratio(advantages),
        "advantage_mass_negative_over_positive_before_weighting": mass_ratio(unweighted),
    }


def token_sums(
    ratio: torch.Tensor, advantages: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """Sum what a loss did to the tokens of a micro-batch, split by the advantage's sign.

    Sums add up over micro-batches and ranks, so that `token_means` of the
    total is exact however a mini-batch was split.

    Args:
        ratio: Importance ratio, `[batch, response]`.
        advantages: `[batch, response]`.
        gradient: d loss / d log pi_theta of every token, `[batch, response]`.
        mask: Bool, `[batch, response]`.

    Returns:
        For each sign: `tokens`, `ratio`, `clipped` (tokens with gradient 0) and
        `gradient` (sum of its magnitude).
    """
    sums = {}
    for sign, of_sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        live = of_sign & mask
        magnitude = torch.where(live, gradient, 0.0).abs()
        sums[f"tokens_{sign}"] = live.sum()
        sums[f"ratio_{sign}"] = torch.where(live, ratio, 0.0).sum(dtype=torch.float64)
        sums[f"clipped_{sign}"] = (live & (magnitude == 0)).sum()
        sums[f"gradient_{sign}"] = magnitude.sum(dtype=torch.float64)
    # One transfer from the device.
    values = torch.stack([value.double() for value in sums.values()]).tolist()
    return dict(zip(sums, values, strict=True))


def token_means(sums: dict[str, float]) -> dict[str, float]:
    """Turn totals of `token_sums` into what is logged.

    Returns:
        For each sign: `ratio` (mean over tokens), `clipped_fraction` (of tokens) and
        `gradient_weight` (sum over the tokens of a mini-batch of |d loss / d log pi|).
    """
    return {
        "ratio_positive": _quotient(sums["ratio_positive"], sums["tokens_positive"]),
        "clipped_fraction_positive": _quotient(sums["clipped_positive"], sums["tokens_positive"]),
        "gradient_weight_positive": sums["gradient_positive"],
        "ratio_negative": _quotient(sums["ratio_negative"], sums["tokens_negative"]),
        "clipped_fraction_negative": _quotient(sums["clipped_negative"], sums["tokens_negative"]),
        "gradient_weight_negative": sums["gradient_negative"],
    }
