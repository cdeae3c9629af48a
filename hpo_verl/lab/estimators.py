"""From the rewards of a rollout batch to an advantage per token, as the verl adapters do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.aepo_advantage import AEPOAdvantageSettings, entropy_aware_advantages
from hpo_verl.algorithms.base import Advantages
from hpo_verl.algorithms.catalog import ESTIMATOR_SECTIONS
from hpo_verl.algorithms.d3s import D3SSettings, down_sample
from hpo_verl.algorithms.hapo import HAPOAdvantageSettings, token_group_advantages
from hpo_verl.algorithms.hpo import (
    AHPOSettings,
    HPOSettings,
    hysteretic_advantages,
)
from hpo_verl.algorithms.spo import SPOSettings, single_stream_advantages
from hpo_verl.core.settings import parse_settings


class Batch(NamedTuple):
    """What an estimator may look at; every response has a live token.

    Attributes:
        rewards: `[batch]`.
        codes: Prompt of every response, `[batch]` int64.
        mask: Bool, `[batch, response]`.
        entropy: Of the distribution that each token was drawn from, nats, `[batch, response]`.
        progress: 0 at the first step, 1 at the last.
        values: The prompts' running success rates, `[batch]`; read by SPO only.
    """

    rewards: torch.Tensor
    codes: torch.Tensor
    mask: torch.Tensor
    entropy: torch.Tensor
    progress: float = 0.0
    values: torch.Tensor | None = None


class Estimate(NamedTuple):
    """What an estimator makes of a batch.

    Attributes:
        advantages: `[batch, response]` float32, 0 at masked tokens.
        responses: What the advantages were before tokens were told apart; for the statistics.
    """

    advantages: torch.Tensor
    responses: Advantages


Estimator = Callable[[Batch], Estimate]


def _group_relative(batch: Batch, normalize_by_std: bool) -> Advantages:
    return _weighted(batch, HPOSettings(alpha=1.0), normalize_by_std)


def _weighted(
    batch: Batch, settings: HPOSettings | AHPOSettings, normalize_by_std: bool
) -> Advantages:
    return hysteretic_advantages(
        batch.rewards, batch.codes, batch.mask.any(dim=-1), settings,
        normalize_by_std=normalize_by_std,
    )  # fmt: skip


def _estimate(batch: Batch, tokens: torch.Tensor, responses: Advantages) -> Estimate:
    tokens = torch.where(batch.mask, tokens.float(), 0.0)
    means = tokens.double().sum(dim=-1) / batch.mask.sum(dim=-1)
    return Estimate(tokens, responses._replace(values=means))


def _hysteretic(settings: HPOSettings | AHPOSettings, normalize_by_std: bool) -> Estimator:
    def estimator(batch: Batch) -> Estimate:
        responses = _weighted(batch, settings, normalize_by_std)
        return _estimate(batch, responses.values[:, None], responses)

    return estimator


def _grpo(settings: None, normalize_by_std: bool) -> Estimator:
    return _hysteretic(HPOSettings(alpha=1.0), normalize_by_std)


def _hapo(settings: HAPOAdvantageSettings, normalize_by_std: bool) -> Estimator:
    def estimator(batch: Batch) -> Estimate:
        advantages = token_group_advantages(
            batch.rewards, batch.mask.sum(dim=-1), batch.codes, settings,
            normalize_by_std=normalize_by_std,
        )  # fmt: skip
        return _estimate(batch, advantages[:, None], _group_relative(batch, normalize_by_std))

    return estimator


def _aepo_advantage(settings: AEPOAdvantageSettings, normalize_by_std: bool) -> Estimator:
    def estimator(batch: Batch) -> Estimate:
        group = _group_relative(batch, normalize_by_std)
        tokens = entropy_aware_advantages(group.values, batch.entropy, batch.mask, settings)
        return _estimate(batch, tokens, group)

    return estimator


def _d3s(settings: D3SSettings, normalize_by_std: bool) -> Estimator:
    def estimator(batch: Batch) -> Estimate:
        group = _group_relative(batch, normalize_by_std)
        kept = down_sample(group.values, batch.entropy, batch.mask, settings, batch.progress)
        return _estimate(batch, kept.advantages, group)

    return estimator


def _spo(settings: SPOSettings, normalize_by_std: bool) -> Estimator:
    def estimator(batch: Batch) -> Estimate:
        assert batch.values is not None  # noqa: S101 - for the type checker
        live = batch.mask.any(dim=-1)
        advantages = single_stream_advantages(batch.rewards, batch.values, live)
        equal = bool((advantages == 0).all())
        responses = Advantages(
            values=advantages,
            unweighted=advantages,
            alpha=1.0,
            positives=int((advantages > 0).sum()),
            negatives=int((advantages < 0).sum()),
            # Whitening makes one group of the whole batch.
            zero_spread_groups=int(equal),
            groups=1,
        )
        return _estimate(batch, advantages[:, None], responses)

    return estimator


ESTIMATORS: dict[str, tuple[type[Any] | None, Callable[[Any, bool], Estimator]]] = {
    "grpo": (None, _grpo),
    "hpo": (HPOSettings, _hysteretic),
    "a_hpo": (AHPOSettings, _hysteretic),
    "hapo": (HAPOAdvantageSettings, _hapo),
    "aepo_advantage": (AEPOAdvantageSettings, _aepo_advantage),
    "d3s": (D3SSettings, _d3s),
    "spo": (SPOSettings, _spo),
}
"""Settings of each estimator, and what makes it of them."""


def read_settings(estimator: str, algorithm: Mapping[str, Any]) -> Any:
    """Read an estimator's own settings.

    Args:
        estimator: Key of `ESTIMATORS`.
        algorithm: verl's `algorithm` section.

    Returns:
        An object of the estimator's settings type; None where it has none.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    settings_type = ESTIMATORS[estimator][0]
    if settings_type is None:
        return None
    section = ESTIMATOR_SECTIONS[estimator]
    return parse_settings(settings_type, algorithm.get(section), f"algorithm.{section}")
