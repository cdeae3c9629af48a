"""Algorithms that need the entropy of the policy at every token.

verl's old-policy pass computes these entropies and the V1 trainer stores them as
the field `entropy`, but hands them neither to an estimator nor to a loss.
`TokenEntropy`, part of every trainer mode of ours, does: it fetches the field
once the pass is over, for all responses of the step, and lends it to the
estimator while that runs. For the loss `hapo` it adds a field with what that
loss reads; on the workers `token_fields` hands the part of a micro-batch to it.
Statistics over entropies are therefore those of the whole rollout batch, on the
driver, and know nothing of micro-batches or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

from hpo_verl.algorithms.aepo_advantage import AEPOAdvantageSettings, entropy_aware_advantages
from hpo_verl.algorithms.catalog import ESTIMATOR_SECTIONS
from hpo_verl.algorithms.hapo import (
    HAPOAdvantageSettings,
    HAPOSettings,
    entropy_deviation,
    token_group_advantages,
)
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.masking import require_finite
from hpo_verl.core.settings import parse_settings
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.advantages import group_codes, normalizes_by_std, response_rewards
from hpo_verl.verl_plugin.estimator_inputs import borrow, lend
from hpo_verl.verl_plugin.losses import ENTROPY_DEVIATION, loss_settings


def lent_entropy(estimator: str, mask: torch.Tensor) -> torch.Tensor:
    """Return the entropies of the batch at hand.

    Args:
        estimator: Name, for messages.
        mask: Bool, `[batch, response]`.

    Returns:
        Nats, `[batch, response]`.

    Raises:
        ConfigError: Nobody lends entropies.
        DataError: Another shape than the mask's, or a live value is not finite.
    """
    entropy = borrow(estimator, "entropy").detach()
    if entropy.shape != mask.shape:
        raise DataError(
            f"entropy {tuple(entropy.shape)} must have the shape of response_mask "
            f"{tuple(mask.shape)}"
        )
    require_finite("entropy", entropy, mask)
    return entropy.to(mask.device)


class Responses(NamedTuple):
    """What a group-relative estimator needs of a batch.

    Attributes:
        rewards: `[batch]`.
        mask: Bool, `[batch, response]`.
        codes: Group of each response, `[batch]` int64.
        normalize_by_std: Whether to divide by the standard deviation.
    """

    rewards: torch.Tensor
    mask: torch.Tensor
    codes: torch.Tensor
    normalize_by_std: bool


def _aepo(batch: Responses, settings: AEPOAdvantageSettings) -> torch.Tensor:
    live = batch.mask.any(dim=-1)
    group = group_relative_advantages(
        batch.rewards, batch.codes, live, normalize_by_std=batch.normalize_by_std
    )
    entropy = lent_entropy("aepo_advantage", batch.mask)
    return entropy_aware_advantages(group.advantages, entropy, batch.mask, settings)


def _hapo(batch: Responses, settings: HAPOAdvantageSettings) -> torch.Tensor:
    lengths = batch.mask.sum(dim=-1)
    advantages = token_group_advantages(
        batch.rewards, lengths, batch.codes, settings, normalize_by_std=batch.normalize_by_std
    )
    return advantages.unsqueeze(-1) * batch.mask


ENTROPY_ESTIMATORS = ("aepo_advantage", "d3s")
SETTINGS: dict[str, tuple[type, Callable[[Responses, Any], torch.Tensor]]] = {
    "aepo_advantage": (AEPOAdvantageSettings, _aepo),
    "hapo": (HAPOAdvantageSettings, _hapo),
}
"""Settings of each estimator, and the advantages that it gives to every token."""


def _estimate(
    estimator: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: advantages twice, `[batch, response]` float32.

    `reward_baselines` is ReMax's, as in `advantages`.
    """
    settings = read_settings(estimator, config)
    if index is None:
        raise DataError(f"{estimator}: uid is missing; every response needs its prompt's uid")
    rewards, _ = response_rewards(token_level_rewards, response_mask)
    codes = group_codes(index, len(rewards)).to(rewards.device)
    batch = Responses(rewards, response_mask != 0, codes, normalizes_by_std(config))
    advantages = SETTINGS[estimator][1](batch, settings).float()
    return advantages, advantages


def read_settings(estimator: str, config: Mapping[str, Any] | None) -> Any:
    """Read the settings of an estimator of this module.

    Args:
        estimator: Key of `SETTINGS`.
        config: verl's `algorithm` section; None means the defaults.

    Raises:
        ConfigError: Names the key, the value and what is permitted.
    """
    section = ESTIMATOR_SECTIONS[estimator]
    values = None if config is None else config.get(section, None)
    return parse_settings(SETTINGS[estimator][0], values, f"algorithm.{section}")


ESTIMATORS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    name: partial(_estimate, name) for name in SETTINGS
}


def needs_entropy(config: Mapping[str, Any]) -> bool:
    """Tell whether the selected algorithm reads entropies.

    Args:
        config: verl's whole configuration.
    """
    return config["algorithm"].get("adv_estimator") in ENTROPY_ESTIMATORS or _is_hapo(
        config["actor_rollout_ref"]["actor"]
    )


def _is_hapo(actor: Any) -> bool:
    return actor["policy_loss"].get("loss_mode", None) == "hapo"


def check_entropy(config: Mapping[str, Any]) -> None:
    """Check the settings of an estimator that reads entropies, and that verl computes these.

    Args:
        config: verl's whole configuration.

    Raises:
        ConfigError: A setting is unknown or out of range, or the old-policy pass is skipped.
    """
    algorithm = config["algorithm"]
    estimator = algorithm.get("adv_estimator")
    if estimator in ESTIMATORS:
        read_settings(estimator, algorithm)
        normalizes_by_std(algorithm)
    correction = algorithm.get("rollout_correction", None)
    if needs_entropy(config) and correction and correction.get("bypass_mode", False):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode = True: skips the pass that computes the "
            "entropies which the algorithm needs; must be false"
        )


class TokenEntropy:
    """Mixed into a trainer of verl: hands the tokens' entropies to who needs them."""

    config: Any

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if not needs_entropy(self.config):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        import transfer_queue as tq
        from verl.workers.utils.padding import response_to_nested

        where: dict[str, Any] = {"keys": batch.keys, "partition_id": batch.partition_id}
        entropy = tq.kv_batch_get(**where, select_fields=["entropy"])["entropy"]
        padded = entropy.to_padded_tensor(0.0)
        with lend(entropy=padded):
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        actor = self.config.actor_rollout_ref.actor
        if _is_hapo(actor):
            # Only now, since a rollout correction may have masked tokens meanwhile.
            mask = tq.kv_batch_get(**where, select_fields=["response_mask"])["response_mask"]
            settings = loss_settings(HAPOSettings, actor.policy_loss)
            deviation = entropy_deviation(padded, mask.to_padded_tensor(0) != 0, settings)
            fields = TensorDict(
                {ENTROPY_DEVIATION: response_to_nested(deviation, entropy)}, batch_size=len(padded)
            )
            batch = tq.kv_batch_put(**where, fields=fields)
        return batch


@contextmanager
def token_fields(config: Any, data: Any) -> Iterator[None]:
    """Let the loss of a micro-batch see the fields that verl does not pass to it.

    Args:
        config: verl's actor config; its `policy_loss.batch_info` is filled meanwhile.
        data: The micro-batch, nested.
    """
    known = config.policy_loss.get("batch_info", None)
    if known is None or ENTROPY_DEVIATION not in data:
        yield
        return
    known[ENTROPY_DEVIATION] = data[ENTROPY_DEVIATION].to_padded_tensor(0.0)
    try:
        yield
    finally:
        del known[ENTROPY_DEVIATION]


def register() -> None:
    """Register the estimators with verl; a second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est

    for name, estimator in ESTIMATORS.items():
        register_adv_est(name)(estimator)
