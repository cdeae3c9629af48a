"""Advantage estimators `hpo` and `a_hpo`, as verl calls them.

verl calls an estimator once per step on the driver, with the whole batch:
the one place where every response of the step is visible.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from hpo_verl.algorithms.base import Advantages
from hpo_verl.algorithms.hpo import (
    AHPOSettings,
    HPOSettings,
    hysteretic_advantages,
)
from hpo_verl.core.masking import nonempty_rows, require_finite
from hpo_verl.core.settings import parse_settings, require_flag
from hpo_verl.errors import DataError

logger = logging.getLogger(__name__)

SETTINGS: dict[str, type[HPOSettings] | type[AHPOSettings]] = {
    "hpo": HPOSettings,
    "a_hpo": AHPOSettings,
}


class StatisticsHint:
    """Says once, where verl's own trainer runs, which trainer mode logs the statistics."""

    def __init__(self) -> None:
        self.needed = True

    def tell(self, estimator: str, alpha: float) -> None:
        """Log the weight of the first batch, and how to get it for every batch."""
        if self.needed:
            logger.warning(
                f"{estimator}: alpha = {alpha:.3f} in this batch; an estimator cannot add to "
                "verl's metrics: trainer.v1.trainer_mode=hpo_sync logs hpo/alpha on every step"
            )
        self.needed = False


statistics_hint = StatisticsHint()


def uid_labels(uids: Iterable[Hashable], size: int) -> list[Hashable]:
    """List the labels of a batch.

    Args:
        uids: One label per response.
        size: Number of responses.

    Raises:
        DataError: The number of labels differs from `size`.
    """
    labels = uids.tolist() if isinstance(uids, (np.ndarray, torch.Tensor)) else list(uids)
    if len(labels) != size:
        raise DataError(f"uid: {len(labels)} labels for {size} responses")
    return labels


def group_codes(uids: Iterable[Hashable], size: int) -> torch.Tensor:
    """Number the groups of a batch in order of appearance.

    Args:
        uids: One hashable label per response; equal labels make a group.
        size: Number of responses.

    Returns:
        `[size]` int64.

    Raises:
        DataError: The number of labels differs from `size`, or one is not hashable.
    """
    labels = uid_labels(uids, size)
    codes: defaultdict[Hashable, int] = defaultdict(itertools.count().__next__)
    try:
        return torch.from_numpy(np.fromiter(map(codes.__getitem__, labels), np.int64, size))
    except TypeError as error:
        raise DataError(f"uid: labels must be hashable ({error})") from error


def response_rewards(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the rewards of every response.

    A reward may stand at a masked token, since verl puts it at the last token
    even if a tool wrote that one. Finite values there count, others do not.

    Args:
        token_level_rewards: `[batch, response]`.
        response_mask: Bool or float, `[batch, response]`.

    Returns:
        Rewards, `[batch]`, and which rows have a live token, `[batch]` bool.

    Raises:
        DataError: Shapes differ, or a live reward is not finite.
    """
    if token_level_rewards.shape != response_mask.shape or response_mask.dim() != 2:
        raise DataError(
            f"token_level_rewards {tuple(token_level_rewards.shape)} and response_mask "
            f"{tuple(response_mask.shape)} must both be [batch, response]"
        )
    token_level_rewards = token_level_rewards.detach()
    live = nonempty_rows(response_mask)
    rewards = token_level_rewards.sum(dim=-1, dtype=torch.float32)
    if not bool(torch.isfinite(rewards.sum())):
        mask = response_mask != 0
        require_finite("token_level_rewards", token_level_rewards, mask)
        ignored = ~mask & ~torch.isfinite(token_level_rewards)
        rewards = token_level_rewards.masked_fill(ignored, 0.0).sum(dim=-1, dtype=torch.float32)
    return rewards, live


def read_settings(
    estimator: str, config: Mapping[str, Any] | None
) -> tuple[HPOSettings | AHPOSettings, bool]:
    """Read `algorithm.hpo` and `algorithm.norm_adv_by_std_in_grpo`.

    Args:
        estimator: `hpo` or `a_hpo`.
        config: verl's `algorithm` section; None means the defaults.

    Returns:
        The settings and whether to divide by the standard deviation.

    Raises:
        ConfigError: Names the key, the value and what is permitted.
    """
    section = {} if config is None else config
    settings = parse_settings(SETTINGS[estimator], section.get("hpo", None), "algorithm.hpo")
    return settings, normalizes_by_std(config)


def normalizes_by_std(config: Mapping[str, Any] | None) -> bool:
    """Read `algorithm.norm_adv_by_std_in_grpo`.

    Args:
        config: verl's `algorithm` section; None means the default, true.

    Returns:
        Whether advantages are divided by the standard deviation of their group.

    Raises:
        ConfigError: Neither true nor false.
    """
    normalize_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    require_flag("algorithm.norm_adv_by_std_in_grpo", normalize_by_std)
    return normalize_by_std


def compute_hysteretic(
    estimator: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None,
    index: Iterable[Hashable] | None,
) -> Advantages:
    """Compute what `hpo` or `a_hpo` assigns to every response, and the counts behind it.

    Args:
        estimator: `hpo` or `a_hpo`.
        token_level_rewards: `[batch, response]`.
        response_mask: Bool or float, `[batch, response]`.
        config: verl's `algorithm` section.
        index: The prompt's uid of every response.

    Returns:
        Advantages per response, `[batch]`, weight and counts.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: uids are missing, or a tensor has the wrong shape or is not finite.
    """
    settings, normalize_by_std = read_settings(estimator, config)
    if index is None:
        raise DataError(f"{estimator}: uid is missing; every response needs its prompt's uid")
    rewards, live = response_rewards(token_level_rewards, response_mask)
    codes = group_codes(index, len(rewards)).to(rewards.device)
    return hysteretic_advantages(rewards, codes, live, settings, normalize_by_std=normalize_by_std)


def _estimate(
    estimator: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: advantages twice, `[batch, response]` float32.

    `reward_baselines` is ReMax's; verl passes it whenever the batch holds it,
    and a group-relative advantage has no use for it.
    """
    result = compute_hysteretic(estimator, token_level_rewards, response_mask, config, index)
    statistics_hint.tell(estimator, result.alpha)
    advantages = result.values.float().unsqueeze(-1) * response_mask
    return advantages, advantages


ESTIMATORS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    name: partial(_estimate, name) for name in SETTINGS
}


def register() -> None:
    """Register the estimators with verl; a second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est

    for name, estimator in ESTIMATORS.items():
        register_adv_est(name)(estimator)
