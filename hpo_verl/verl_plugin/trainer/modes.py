"""Trainer modes that add the statistics of the batch to verl's own metrics.

`trainer.v1.trainer_mode`: `hpo_sync`, `hpo_colocate_async`, `hpo_separate_async`.
Each is verl's mode of the same name without the prefix, with `hpo/*` in the
metrics of every step, for every algorithm.

verl compares `trainer_mode` with "sync" in several places and reads a mode's
settings from `trainer.v1.<mode>`. A mode here therefore restores the parent's
name in the configuration before the parent sees it. Beyond the metrics, a run
can be stopped, killed and repeated (`life_cycle`), updates that are not finite
are made known (`step_guard`), and algorithms get what verl does not pass on
(`entropy`, `d3s`, `spo_trainer`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict

from hpo_verl.algorithms.catalog import HYSTERETIC_ESTIMATORS
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.statistics import batch_statistics
from hpo_verl.verl_plugin.advantages import (
    compute_hysteretic,
    group_codes,
    response_rewards,
    statistics_hint,
)
from hpo_verl.verl_plugin.d3s import DownSamplingTrainer
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics, pop_token_means
from hpo_verl.verl_plugin.engine.step_guard import GuardedLoss, pop_counts, step_guard_settings
from hpo_verl.verl_plugin.entropy import TokenEntropy
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle, run_folder
from hpo_verl.verl_plugin.trainer.spo_trainer import SingleStreamTrainer
from hpo_verl.verl_plugin.validation import check_algorithm

logger = logging.getLogger(__name__)

MODE_PREFIX = "hpo_"
PARENT_MODES = ("sync", "colocate_async", "separate_async")
ALGORITHM_PARTS = (DownSamplingTrainer, SingleStreamTrainer)
"""What single algorithms add to a trainer; each does nothing unless it is selected."""


def rollout_statistics(
    config: DictConfig,
    uids: Any,
    scores: torch.Tensor,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor,
) -> dict[str, float]:
    """Describe a batch after its advantages are computed.

    Args:
        config: verl's `algorithm` section.
        uids: The prompt's uid of every response.
        scores: Token-level scores before any KL penalty, `[batch, response]`.
        token_level_rewards: What the estimator saw, `[batch, response]`.
        response_mask: `[batch, response]`.
        advantages: What the estimator returned, `[batch, response]`.

    Returns:
        See `hpo_verl.core.statistics.batch_statistics`.
    """
    rewards, live = response_rewards(token_level_rewards, response_mask)
    mask = response_mask.bool()
    lengths = mask.sum(dim=-1)
    assigned = advantages.masked_fill(~mask, 0.0).sum(dim=-1) / lengths.clamp(min=1)
    if config.adv_estimator in HYSTERETIC_ESTIMATORS:
        hysteretic = compute_hysteretic(
            config.adv_estimator, token_level_rewards, response_mask, config, uids
        )
        known = hysteretic._asdict()
        unweighted = known.pop("unweighted")
        known.pop("values")
        known.pop("statistics")
    else:
        codes = group_codes(uids, len(rewards)).to(rewards.device)
        group = group_relative_advantages(rewards, codes, live)
        unweighted = assigned
        known = {
            "alpha": 1.0,
            "positives": int((assigned > 0).sum()),
            "negatives": int((assigned < 0).sum()),
            "zero_spread_groups": group.zero_spread_groups,
            "groups": group.groups,
        }
    return batch_statistics(
        **known,
        rewards=response_rewards(scores, response_mask)[0],
        live=live,
        lengths=lengths,
        advantages=assigned,
        unweighted=unweighted,
    )


class BatchStatistics:
    """Mixed into a trainer of verl: adds `hpo/*` to the metrics of every step."""

    parent_mode: str
    config: DictConfig
    actor_rollout_wg: Any

    def __init__(self, config: DictConfig) -> None:
        for warning in check_algorithm(config):
            logger.warning(warning)
        statistics_hint.needed = False
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.parent_mode
        super().__init__(config)  # type: ignore[call-arg]

    def _setup(self) -> None:
        super()._setup()  # type: ignore[misc]
        from verl.trainer.distillation import is_distillation_enabled
        from verl.utils.config import omega_conf_to_dataclass

        # Distillation brings a loss function of its own, which stays.
        if not is_distillation_enabled(self.config.get("distillation")):
            actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(
                GuardedLoss(
                    partial(loss_with_statistics, config=actor_config),
                    step_guard_settings(self.config),
                    run_folder(self.config.trainer.default_local_dir),
                )
            )

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        import transfer_queue as tq

        fields = ["uid", "response_mask", "rm_scores", "advantages"]
        if self.config.algorithm.use_kl_in_reward:
            fields.append("token_level_rewards")
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        uids = np.array(data.pop("uid").tolist(), dtype=object)
        data = data.to_padded_tensor()
        statistics = rollout_statistics(
            self.config.algorithm,
            uids,
            scores=data["rm_scores"],
            token_level_rewards=data.get("token_level_rewards", data["rm_scores"]),
            response_mask=data["response_mask"],
            advantages=data["advantages"],
        )
        metrics.update({f"hpo/{name}": value for name, value in statistics.items()})
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        means = pop_token_means(metrics)
        metrics.update({f"hpo/{name}": value for name, value in means.items()})
        actor, responses = self.config.actor_rollout_ref.actor, len(batch.keys)
        size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        metrics.update(pop_counts(metrics, responses // size * actor.ppo_epochs))
        return batch


def register() -> None:
    """Register the trainer modes with verl; a second call changes nothing."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer

    for parent_mode in PARENT_MODES:
        name = MODE_PREFIX + parent_mode
        if name not in TRAINER_REGISTRY:
            parent = TRAINER_REGISTRY[parent_mode]
            members = {"parent_mode": parent_mode, "__module__": __name__}
            bases = (LifeCycle, BatchStatistics, TokenEntropy, *ALGORITHM_PARTS, parent)
            register_trainer(name)(type(f"HPO{parent.__name__}", bases, members))
