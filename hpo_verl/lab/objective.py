"""What an algorithm of the catalogue makes of a batch, read from its recipe `algo/<name>.yaml`.

The settings come from the file that verl reads, the functions from `hpo_verl.core` and
`hpo_verl.algorithms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from hpo_verl.algorithms.catalog import ALGORITHMS, ESTIMATOR_SECTIONS
from hpo_verl.algorithms.spo import SPOSettings
from hpo_verl.config.recipes import leaf_keys, nearest, recipes_directory
from hpo_verl.core.masking import require_finite
from hpo_verl.core.ratios import beyond_bound, bound_log_ratio, masked_log_ratio
from hpo_verl.core.settings import require_choice, require_number
from hpo_verl.core.statistics import token_sums
from hpo_verl.core.surrogate import TokenLoss, attach
from hpo_verl.errors import ConfigError
from hpo_verl.lab.aggregation import MODES, token_weights
from hpo_verl.lab.estimators import ESTIMATORS, Estimator, read_settings
from hpo_verl.lab.losses import (
    ACTOR,
    LOSSES,
    POLICY_LOSS,
    Deviation,
    LossOfTokens,
    MiniBatch,
    read_deviation,
    select,
)

ROLLOUT_N = "actor_rollout_ref.rollout.n"
_READ = {
    "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo",
    "algorithm.filter_groups.enable", "algorithm.filter_groups.metric",
    "algorithm.filter_groups.max_inflight_gen_batches", ROLLOUT_N,
    f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.clip_ratio",
    f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high", f"{ACTOR}.clip_ratio_c",
    f"{ACTOR}.tau_pos", f"{ACTOR}.tau_neg",
    # How verl splits the work; no number depends on it.
    f"{ACTOR}.use_dynamic_bsz",
}  # fmt: skip

# What a study may add to a recipe that does not set it.
_ADDED = (f"{ACTOR}.loss_scale_factor", "algorithm.norm_adv_by_std_in_grpo")


@dataclass(frozen=True)
class Objective:
    """An algorithm with its settings.

    Attributes:
        algorithm: Name in the catalogue.
        estimate: From a whole rollout batch to advantages.
        loss_of_tokens: From a mini-batch to loss and slope per token.
        deviation: What the loss needs of the rollout batch's entropies; None for most.
        bounds_log_ratio: Whether the log-ratio is bounded to 20 nats before that.
        loss_agg_mode: How a mini-batch's tokens are weighted.
        loss_scale_factor: The constant of `seq-mean-token-sum-norm`, tokens.
        filter_groups: Whether groups of equal rewards are dropped and replaced (DAPO).
        single_stream: Settings of SPO, whose prompts have one response each; else None.
    """

    algorithm: str
    estimate: Estimator
    loss_of_tokens: LossOfTokens
    deviation: Deviation | None
    bounds_log_ratio: bool
    loss_agg_mode: str
    loss_scale_factor: float | None
    filter_groups: bool
    single_stream: SPOSettings | None

    def weights(self, mask: torch.Tensor) -> torch.Tensor:
        """Weight of every token in the loss of a whole mini-batch, `[batch, response]`."""
        return token_weights(mask, self.loss_agg_mode, self.loss_scale_factor)

    def loss(
        self,
        log_prob: torch.Tensor,
        old_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor,
        deviation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of the rows of a mini-batch, and what it did to the tokens.

        Rows with advantage 0 may be left out: they add nothing but their share of `weights`.

        Args:
            log_prob: `[rows, response]`, nats; the gradient goes here.
            old_log_prob: The same under the policy that sampled.
            advantages: `[rows, response]`, 0 at masked tokens.
            mask: Bool, `[rows, response]`; every row has a live token.
            weights: These rows of `weights` of the whole mini-batch.
            deviation: These rows of what `self.deviation` made of the whole rollout batch.

        Returns:
            A scalar, and the sums of `hpo_verl.core.statistics.token_sums`.

        Raises:
            DataError: A log-probability is not finite.
        """
        with torch.no_grad():
            log_ratio = masked_log_ratio(log_prob, old_log_prob, mask)
            require_finite("log_ratio", log_ratio, mask)
            bounded = bound_log_ratio(log_ratio)
            used = bounded if self.bounds_log_ratio else log_ratio
            token_loss = self.loss_of_tokens(
                MiniBatch(used, old_log_prob, advantages, mask, deviation)
            )
            if self.bounds_log_ratio:
                slopes = token_loss.slopes.masked_fill(beyond_bound(log_ratio), 0.0)
                token_loss = TokenLoss(token_loss.values, slopes)
            weighted = token_loss.scaled(weights)
            sums = token_sums(bounded.exp(), advantages, weighted.slopes, mask)
        return attach(log_prob, weighted).sum(), sums


def read_objective(
    algorithm: str, max_response_length: int, changes: Mapping[str, Any] | None = None
) -> Objective:
    """Build the objective of a catalogue entry.

    Args:
        algorithm: Name in the catalogue.
        max_response_length: Tokens; recipes may refer to it as `data.max_response_length`.
        changes: Settings over the recipe's own, by their full key in verl's configuration.

    Raises:
        ConfigError: Unknown algorithm or setting, a bad value, or an algorithm of the catalogue
            that the lab cannot run.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {algorithm!r}: {nearest(algorithm, ALGORITHMS)}")
    config = _recipe(algorithm, max_response_length, changes or {})
    estimator = select(config, "algorithm.adv_estimator")
    loss_mode = select(config, f"{POLICY_LOSS}.loss_mode")
    _require_supported(algorithm, "estimator", estimator, ESTIMATORS)
    _require_supported(algorithm, "loss", loss_mode, LOSSES)
    # Sections of an estimator or a loss are read, or refused, key by key.
    sections = (f"algorithm.{ESTIMATOR_SECTIONS.get(estimator)}.", f"{POLICY_LOSS}.")
    for key in sorted(set(_leaves(config)) - _READ):
        if not key.startswith(sections):
            raise ConfigError(
                f"algorithm {algorithm!r} sets {key}, which the lab does not read yet"
            )
    loss_agg_mode = select(config, f"{ACTOR}.loss_agg_mode")
    require_choice(f"{ACTOR}.loss_agg_mode", loss_agg_mode, MODES)
    loss_scale_factor = select(config, f"{ACTOR}.loss_scale_factor")
    if loss_scale_factor is not None:
        require_number(f"{ACTOR}.loss_scale_factor", loss_scale_factor, 0.0, open_low=True)
    settings = read_settings(estimator, config["algorithm"])
    normalize_by_std = bool(select(config, "algorithm.norm_adv_by_std_in_grpo", True))
    return Objective(
        algorithm=algorithm,
        estimate=ESTIMATORS[estimator][1](settings, normalize_by_std),
        loss_of_tokens=LOSSES[loss_mode](config),
        deviation=read_deviation(loss_mode, config),
        bounds_log_ratio=loss_mode != "gspo",
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=loss_scale_factor,
        filter_groups=bool(select(config, "algorithm.filter_groups.enable", False)),
        single_stream=settings if isinstance(settings, SPOSettings) else None,
    )


def _recipe(algorithm: str, max_response_length: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    recipe = OmegaConf.load(recipes_directory() / "algo" / f"{algorithm}.yaml")
    known = {*leaf_keys(DictConfig(recipe)), *_ADDED}
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(f"setting {key!r} of {algorithm}: unknown, {nearest(key, known)}")
        OmegaConf.update(recipe, key, value, force_add=True)  # pyright: ignore[reportArgumentType]
    context = OmegaConf.create({"data": {"max_response_length": max_response_length}})
    config: Any = OmegaConf.to_container(OmegaConf.merge(context, recipe), resolve=True)
    return {key: value for key, value in config.items() if key != "data"}


def _leaves(config: dict[str, Any]) -> list[str]:
    tree = DictConfig(config)
    return [
        key
        for key in leaf_keys(tree)
        if not isinstance(OmegaConf.select(tree, key, throw_on_missing=False), DictConfig)
    ]


def _require_supported(
    algorithm: str, what: str, name: object, supported: Mapping[str, Any]
) -> None:
    if name not in supported:
        raise ConfigError(
            f"algorithm {algorithm!r}: the lab does not know its {what} {name!r} yet; "
            f"it knows {', '.join(supported)}"
        )
