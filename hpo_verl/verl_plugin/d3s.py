"""D3S in verl: the estimator `d3s` and the part of the trainer that feeds it.

The estimator is called on the driver with the whole rollout batch, the one place
where all advantages can be ranked. The trainer lends it the tokens' entropies
(`entropy`) and the training progress.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch

from hpo_verl.algorithms.d3s import D3SSettings, down_sample
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.masking import as_bool_mask
from hpo_verl.core.settings import parse_settings
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.advantages import group_codes, normalizes_by_std, response_rewards
from hpo_verl.verl_plugin.entropy import lent_entropy
from hpo_verl.verl_plugin.estimator_inputs import borrow, lend

ESTIMATOR = "d3s"


def d3s_settings(config: Mapping[str, Any] | None) -> D3SSettings:
    """Read `algorithm.d3s`.

    Args:
        config: verl's `algorithm` section; None means the defaults.

    Raises:
        ConfigError: Names the key, the value and what is permitted.
    """
    section = {} if config is None else config
    return parse_settings(D3SSettings, section.get(ESTIMATOR, None), f"algorithm.{ESTIMATOR}")


def estimate(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: advantages twice, `[batch, response]` float32.

    `reward_baselines` is ReMax's; a group-relative advantage has no use for it.

    Raises:
        ConfigError: A setting is out of range, or the trainer mode is not ours.
        DataError: uids are missing, or a tensor has the wrong shape or is not finite.
    """
    settings = d3s_settings(config)
    normalize_by_std = normalizes_by_std(config)
    if index is None:
        raise DataError(f"{ESTIMATOR}: uid is missing; every response needs its prompt's uid")
    rewards, live = response_rewards(token_level_rewards, response_mask)
    mask = as_bool_mask(response_mask)
    entropy = lent_entropy(ESTIMATOR, mask)
    codes = group_codes(index, len(rewards)).to(rewards.device)
    group = group_relative_advantages(rewards, codes, live, normalize_by_std=normalize_by_std)
    result = down_sample(group.advantages, entropy, mask, settings, borrow(ESTIMATOR, "progress"))
    borrow(ESTIMATOR, "reported").update(
        d3s_response_fraction=result.response_fraction, d3s_token_fraction=result.token_fraction
    )
    advantages = result.advantages.float()
    return advantages, advantages


class DownSamplingTrainer:
    """Mixed into a trainer of verl: lends the progress where `d3s` is selected."""

    config: Any
    global_steps: int
    total_training_steps: int

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        compute = super()._compute_advantage  # type: ignore[misc]
        if self.config.algorithm.adv_estimator != ESTIMATOR:
            return compute(batch, metrics)
        steps = max(self.total_training_steps - 1, 1)
        progress = min(max((self.global_steps - 1) / steps, 0.0), 1.0)
        with lend(progress=progress) as reported:
            batch = compute(batch, metrics)
        metrics.update({f"hpo/{name}": value for name, value in reported.items()})
        return batch


def register() -> None:
    """Register the estimator with verl; a second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est(ESTIMATOR)(estimate)
