"""Algorithms that need the entropy of the policy at every token.

verl's old-policy pass computes these entropies and the V1 trainer stores them as
the field `entropy`, but hands them neither to an estimator nor to a loss.
`TokenEntropy`, part of every trainer mode of ours, does: it fetches the field
once the pass is over, for all responses of the step, and provides it to the
estimator while that runs. Statistics over entropies are therefore those of the
whole rollout batch, on the driver, and know nothing of micro-batches or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from hpo_verl.algorithms.aepo_advantage import AEPOAdvantageSettings, entropy_aware_advantages
from hpo_verl.algorithms.catalog import ESTIMATOR_SECTIONS
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.masking import require_finite
from hpo_verl.core.settings import parse_settings
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.advantages import group_codes, normalizes_by_std, response_rewards

NEEDED = "trainer.v1.trainer_mode must be one of ours, hpo_sync for example"

_entropy: ContextVar[torch.Tensor | None] = ContextVar("entropy", default=None)


@contextmanager
def provided(entropy: torch.Tensor) -> Iterator[None]:
    """Let estimators see the entropies of the batch that they are called on.

    Args:
        entropy: Nats, `[batch, response]`, in the order of the batch.
    """
    token = _entropy.set(entropy)
    try:
        yield
    finally:
        _entropy.reset(token)


def provided_entropy(estimator: str, mask: torch.Tensor) -> torch.Tensor:
    """Return the entropies of the batch at hand.

    Args:
        estimator: Name, for messages.
        mask: Bool, `[batch, response]`.

    Returns:
        Nats, `[batch, response]`.

    Raises:
        ConfigError: Nobody provided entropies.
        DataError: Another shape than the mask's, or a live value is not finite.
    """
    entropy = _entropy.get()
    if entropy is None:
        raise ConfigError(f"adv_estimator = {estimator!r} needs the tokens' entropies: {NEEDED}")
    if entropy.shape != mask.shape:
        raise DataError(
            f"entropy {tuple(entropy.shape)} must have the shape of response_mask "
            f"{tuple(mask.shape)}"
        )
    require_finite("entropy", entropy, mask)
    return entropy.to(mask.device)


def estimate_aepo(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: GRPO's advantages, weighted by entropy.

    `reward_baselines` is ReMax's, as in `advantages`.
    """
    name = "aepo_advantage"
    settings = parse_settings(AEPOAdvantageSettings, _section(name, config), f"algorithm.{name}")
    if index is None:
        raise DataError(f"{name}: uid is missing; every response needs its prompt's uid")
    rewards, live = response_rewards(token_level_rewards, response_mask)
    codes = group_codes(index, len(rewards)).to(rewards.device)
    group = group_relative_advantages(
        rewards, codes, live, normalize_by_std=normalizes_by_std(config)
    )
    mask = response_mask != 0
    entropy = provided_entropy(name, mask)
    advantages = entropy_aware_advantages(group.advantages, entropy, mask, settings).float()
    return advantages, advantages


def _section(estimator: str, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if config is None else config.get(ESTIMATOR_SECTIONS[estimator], None)


ESTIMATORS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "aepo_advantage": estimate_aepo,
}

SETTINGS = {"aepo_advantage": AEPOAdvantageSettings}


def needs_entropy(config: Mapping[str, Any]) -> bool:
    """Tell whether the selected algorithm reads entropies.

    Args:
        config: verl's whole configuration.
    """
    return config["algorithm"].get("adv_estimator") in ESTIMATORS


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
        parse_settings(
            SETTINGS[estimator], _section(estimator, algorithm), f"algorithm.{estimator}"
        )
        normalizes_by_std(algorithm)
    correction = algorithm.get("rollout_correction", None)
    if needs_entropy(config) and correction and correction.get("bypass_mode", False):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode = True: skips the pass that computes the "
            f"entropies which adv_estimator = {estimator!r} needs; must be false"
        )


def check_trainer_mode(config: Mapping[str, Any]) -> None:
    """Refuse trainer modes in which nobody provides the entropies.

    Args:
        config: verl's whole configuration.

    Raises:
        ConfigError: The algorithm reads entropies and the mode is not one of ours.
    """
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    mode = config["trainer"]["v1"]["trainer_mode"]
    if needs_entropy(config) and not issubclass(TRAINER_REGISTRY[mode], TokenEntropy):
        raise ConfigError(
            f"trainer.v1.trainer_mode = {mode!r}: does not pass on the entropies which "
            f"the algorithm needs; {NEEDED}"
        )


class TokenEntropy:
    """Mixed into a trainer of verl: hands the tokens' entropies to who needs them."""

    config: Any

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if not needs_entropy(self.config):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        import transfer_queue as tq

        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy"]
        )
        with provided(data["entropy"].to_padded_tensor(0.0)):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]


def register() -> None:
    """Register the estimators with verl; a second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est

    for name, estimator in ESTIMATORS.items():
        register_adv_est(name)(estimator)
