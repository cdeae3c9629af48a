"""What an algorithm of the catalogue makes of a batch, read from its recipe `algo/<name>.yaml`.

The settings come from the file that verl reads, the functions from `hpo_verl.core` and
`hpo_verl.algorithms`; losses that are verl's own stand beside this file, one each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from hpo_verl.algorithms.catalog import ALGORITHMS
from hpo_verl.algorithms.hpo import (
    AHPOSettings,
    HPOSettings,
    HystereticAdvantages,
    hpo_loss,
    hysteretic_advantages,
)
from hpo_verl.algorithms.mhpo import MHPOSettings, mhpo_loss
from hpo_verl.core.clipping import clipped_surrogate
from hpo_verl.core.masking import require_finite
from hpo_verl.core.ratios import (
    LOG_RATIO_BOUND,
    beyond_bound,
    bound_log_ratio,
    masked_log_ratio,
)
from hpo_verl.core.settings import parse_settings, require_choice, require_number
from hpo_verl.core.statistics import token_sums
from hpo_verl.core.surrogate import TokenLoss, attach
from hpo_verl.errors import ConfigError
from hpo_verl.lab.aggregation import MODES, token_weights
from hpo_verl.lab.gspo import gspo_loss
from hpo_verl.lab.sapo import sapo_loss
from hpo_verl.launch.recipes import leaf_keys, nearest, recipes_directory

ACTOR = "actor_rollout_ref.actor"
POLICY_LOSS = f"{ACTOR}.policy_loss"
LossOfTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], TokenLoss]

ESTIMATORS: dict[str, type[HPOSettings] | type[AHPOSettings] | None] = {
    "grpo": None,
    "hpo": HPOSettings,
    "a_hpo": AHPOSettings,
}
# The clip of `vanilla` for A < 0 must stay out of reach: no bounded ratio exceeds e^20.
_OUT_OF_REACH = 2.718281828459045**LOG_RATIO_BOUND
_READ = {
    "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo",
    "algorithm.hpo.alpha", "algorithm.hpo.alpha_min", "algorithm.hpo.zero_advantage",
    "algorithm.filter_groups.enable", "algorithm.filter_groups.metric",
    "algorithm.filter_groups.max_inflight_gen_batches",
    f"{POLICY_LOSS}._target_", f"{POLICY_LOSS}.loss_mode",
    f"{POLICY_LOSS}.c", f"{POLICY_LOSS}.k_pos", f"{POLICY_LOSS}.k_neg",
    f"{POLICY_LOSS}.lambda_pos", f"{POLICY_LOSS}.lambda_neg",
    f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.clip_ratio",
    f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high", f"{ACTOR}.clip_ratio_c",
    f"{ACTOR}.tau_pos", f"{ACTOR}.tau_neg",
}  # fmt: skip

# What a study may add to a recipe that does not set it.
_ADDED = (f"{ACTOR}.loss_scale_factor", "algorithm.norm_adv_by_std_in_grpo")


@dataclass(frozen=True)
class Objective:
    """An algorithm with its settings.

    Attributes:
        algorithm: Name in the catalogue.
        hysteresis: Settings of the weight; alpha = 1 for algorithms without one.
        normalize_by_std: Whether advantages are divided by the group's standard deviation.
        loss_of_tokens: From log-ratio, advantages and mask to loss and slope per token.
        bounds_log_ratio: Whether the log-ratio is bounded to 20 nats before that.
        loss_agg_mode: How a mini-batch's tokens are weighted.
        loss_scale_factor: The constant of `seq-mean-token-sum-norm`, tokens.
        filter_groups: Whether groups of equal rewards are dropped and replaced (DAPO).
    """

    algorithm: str
    hysteresis: HPOSettings | AHPOSettings
    normalize_by_std: bool
    loss_of_tokens: LossOfTokens
    bounds_log_ratio: bool
    loss_agg_mode: str
    loss_scale_factor: float | None
    filter_groups: bool

    def advantages(self, rewards: torch.Tensor, group_codes: torch.Tensor) -> HystereticAdvantages:
        """Advantages of a whole rollout batch.

        Args:
            rewards: `[batch]`.
            group_codes: Prompt of every response, `[batch]` int64.
        """
        live = torch.ones_like(rewards, dtype=torch.bool)
        return hysteretic_advantages(
            rewards, group_codes, live, self.hysteresis, normalize_by_std=self.normalize_by_std
        )

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
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of the rows of a mini-batch, and what it did to the tokens.

        Rows with advantage 0 may be left out: they add nothing but their share of `weights`.

        Args:
            log_prob: `[rows, response]`, nats; the gradient goes here.
            old_log_prob: The same under the policy that sampled.
            advantages: `[rows]`, one per response.
            mask: Bool, `[rows, response]`; every row has a live token.
            weights: These rows of `weights` of the whole mini-batch.

        Returns:
            A scalar, and the sums of `hpo_verl.core.statistics.token_sums`.

        Raises:
            DataError: A log-probability is not finite.
        """
        with torch.no_grad():
            log_ratio = masked_log_ratio(log_prob, old_log_prob, mask)
            require_finite("log_ratio", log_ratio, mask)
            spread = torch.where(mask, advantages.float()[:, None], 0.0)
            bounded = bound_log_ratio(log_ratio)
            if self.bounds_log_ratio:
                values, slopes = self.loss_of_tokens(bounded, spread, mask)
                token_loss = TokenLoss(values, slopes.masked_fill(beyond_bound(log_ratio), 0.0))
            else:
                token_loss = self.loss_of_tokens(log_ratio, spread, mask)
            weighted = token_loss.scaled(weights)
            sums = token_sums(bounded.exp(), spread, weighted.slopes, mask)
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
    estimator = _select(config, "algorithm.adv_estimator")
    loss_mode = _select(config, f"{POLICY_LOSS}.loss_mode")
    _require_supported(algorithm, "estimator", estimator, ESTIMATORS)
    _require_supported(algorithm, "loss", loss_mode, LOSSES)
    for key in sorted(set(_leaves(config)) - _READ):
        raise ConfigError(f"algorithm {algorithm!r} sets {key}, which the lab does not read yet")
    settings_type = ESTIMATORS[estimator]
    loss_agg_mode = _select(config, f"{ACTOR}.loss_agg_mode")
    require_choice(f"{ACTOR}.loss_agg_mode", loss_agg_mode, MODES)
    loss_scale_factor = _select(config, f"{ACTOR}.loss_scale_factor")
    if loss_scale_factor is not None:
        require_number(f"{ACTOR}.loss_scale_factor", loss_scale_factor, 0.0, open_low=True)
    return Objective(
        algorithm=algorithm,
        hysteresis=HPOSettings(alpha=1.0)
        if settings_type is None
        else parse_settings(settings_type, config["algorithm"].get("hpo"), "algorithm.hpo"),
        normalize_by_std=bool(_select(config, "algorithm.norm_adv_by_std_in_grpo", True)),
        loss_of_tokens=LOSSES[loss_mode](config),
        bounds_log_ratio=loss_mode != "gspo",
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=loss_scale_factor,
        filter_groups=bool(_select(config, "algorithm.filter_groups.enable", False)),
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


def _select(config: dict[str, Any], key: str, default: Any = None) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _require_supported(
    algorithm: str, what: str, name: object, supported: Mapping[str, Any]
) -> None:
    if name not in supported:
        raise ConfigError(
            f"algorithm {algorithm!r}: the lab does not know its {what} {name!r} yet; "
            f"it knows {', '.join(supported)}"
        )


def _clip_range(config: dict[str, Any]) -> tuple[float, float]:
    low = _select(config, f"{ACTOR}.clip_ratio_low")
    high = _select(config, f"{ACTOR}.clip_ratio_high")
    require_number(f"{ACTOR}.clip_ratio_low", low, 0.0, 1.0)
    require_number(f"{ACTOR}.clip_ratio_high", high, 0.0)
    return float(low), float(high)


def _clipped(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    dual = _select(config, f"{ACTOR}.clip_ratio_c")
    if dual is not None:
        require_number(f"{ACTOR}.clip_ratio_c", dual, _OUT_OF_REACH)
    return lambda log_ratio, advantages, mask: clipped_surrogate(log_ratio, advantages, low, high)


def _hpo(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    return lambda log_ratio, advantages, mask: hpo_loss(log_ratio, advantages, low, high)


def _mhpo(config: dict[str, Any]) -> LossOfTokens:
    section = _select(config, POLICY_LOSS)
    given = {key: value for key, value in section.items() if key not in ("_target_", "loss_mode")}
    settings = parse_settings(MHPOSettings, given, POLICY_LOSS)
    return lambda log_ratio, advantages, mask: mhpo_loss(log_ratio, advantages, settings)


def _gspo(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    return lambda log_ratio, advantages, mask: gspo_loss(log_ratio, advantages, mask, low, high)


def _sapo(config: dict[str, Any]) -> LossOfTokens:
    tau_pos = _select(config, f"{ACTOR}.tau_pos")
    tau_neg = _select(config, f"{ACTOR}.tau_neg")
    require_number(f"{ACTOR}.tau_pos", tau_pos, 0.0, open_low=True)
    require_number(f"{ACTOR}.tau_neg", tau_neg, 0.0, open_low=True)
    return lambda log_ratio, advantages, mask: sapo_loss(log_ratio, advantages, tau_pos, tau_neg)


LOSSES: dict[str, Callable[[dict[str, Any]], LossOfTokens]] = {
    "vanilla": _clipped,
    "hpo": _hpo,
    "mhpo": _mhpo,
    "gspo": _gspo,
    "sapo": _sapo,
}
"""From an algorithm's recipe to its loss per token."""
