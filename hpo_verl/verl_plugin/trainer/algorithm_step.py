"""The part of a trainer that serves the algorithm: its needs, and the statistics of the step."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from hpo_verl.algorithms.base import Advantages, Estimator, Loss, Rollout
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.core.masking import as_bool_mask
from hpo_verl.core.statistics import batch_statistics
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.advantages import Estimate, group_codes, response_rewards
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics, pop_token_means
from hpo_verl.verl_plugin.engine.step_guard import GuardedLoss, pop_counts, step_guard_settings
from hpo_verl.verl_plugin.losses import loss_settings, selected_loss
from hpo_verl.verl_plugin.trainer.life_cycle import run_folder
from hpo_verl.verl_plugin.trainer.prompt_history import PromptHistoryTrainer
from hpo_verl.verl_plugin.validation import check_algorithm

logger = logging.getLogger(__name__)


def estimate_of_verl(data: Any) -> Estimate:
    """Describe what an estimator of verl's own returned, from the step's fields, nested."""
    uids = data.pop("uid").tolist()
    padded = data.to_padded_tensor()
    mask = padded["response_mask"]
    rewards, live = response_rewards(padded.get("token_level_rewards", padded["rm_scores"]), mask)
    codes = group_codes(uids, len(rewards))[0].to(rewards.device)
    rollout = Rollout(rewards, codes, live, as_bool_mask(mask))
    return Estimate(rollout, uids, Advantages(padded["advantages"]), padded["advantages"])


def step_statistics(estimate: Estimate, scores: torch.Tensor) -> dict[str, float]:
    """`batch_statistics` of an estimator's call, and its own; scores are without a KL penalty."""
    rollout, _, result, advantages = estimate
    lengths = rollout.mask.sum(dim=-1)
    assigned = advantages.masked_fill(~rollout.mask, 0.0).sum(dim=-1) / lengths.clamp(min=1)
    group = rollout.grouped()
    return batch_statistics(
        alpha=result.alpha,
        positives=int((assigned > 0).sum()) if result.positives is None else result.positives,
        negatives=int((assigned < 0).sum()) if result.negatives is None else result.negatives,
        zero_spread_groups=group.zero_spread_groups,
        groups=group.groups,
        rewards=scores,
        live=rollout.live,
        lengths=lengths,
        advantages=assigned,
        unweighted=assigned if result.unweighted is None else result.unweighted,
    ) | dict(result.statistics)


class AlgorithmStep(PromptHistoryTrainer):
    """Mixed into a trainer of verl: serves the algorithm, and adds `hpo/*` to the metrics.

    While the estimator runs it provides what the record needs (`extras`); what the estimator
    returned comes back the same way. Afterwards it stores the loss's token fields for the workers.
    TransferQueue is asked once a step at most, for the fields of `_fields`.
    """

    parent_mode: str
    global_steps: int
    total_training_steps: int

    def __init__(self, config: DictConfig) -> None:
        for warning in check_algorithm(config):
            logger.warning(warning)
        with open_dict(config):
            # verl compares it with "sync", and reads a mode's settings from `trainer.v1.<mode>`.
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

    def _selected(self) -> tuple[Estimator, Loss | None]:
        name = str(self.config.algorithm.adv_estimator)
        loss = selected_loss(self.config.actor_rollout_ref.actor.policy_loss)
        return ESTIMATORS.get(name, Estimator(name)), loss

    def _fields(self, estimator: Estimator, loss: Loss | None) -> list[str]:
        """Fields of the step that are read here, beyond what the estimator hands over."""
        fields = []
        if estimator.advantage is None:
            fields += ["uid", "response_mask", "rm_scores", "advantages"]
        if self.config.algorithm.use_kl_in_reward:
            fields += ["rm_scores"]
            if estimator.advantage is None:
                fields += ["token_level_rewards"]
        if "entropy" in estimator.needs or (loss is not None and loss.token_fields):
            fields += ["entropy"]
        if estimator.history is not None:
            fields += self.history_fields()
        return [*dict.fromkeys(fields)]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        import transfer_queue as tq

        estimator, loss = self._selected()
        fields = self._fields(estimator, loss)
        where: dict[str, Any] = {"keys": batch.keys, "partition_id": batch.partition_id}
        # Other fields are read after the estimator, which may be verl's own and write them.
        early = "entropy" in estimator.needs
        data: Any = tq.kv_batch_get(**where, select_fields=fields) if early else {}
        reported: list[Estimate] = []
        provided = {extras.REPORT: reported.append, **self._provided(estimator, data)}
        with extras.provide(**provided):
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        if fields and not early:
            data = tq.kv_batch_get(**where, select_fields=fields)
        estimate = reported[0] if reported else estimate_of_verl(data)
        scores = estimate.rollout.rewards
        if "rm_scores" in fields:
            padded = data["rm_scores"].to_padded_tensor(0.0)
            scores, _ = response_rewards(padded, estimate.rollout.mask)
        statistics = step_statistics(estimate, scores)
        if estimator.history is not None:
            statistics |= self.learn_from(estimate, data)
        metrics.update({f"hpo/{name}": value for name, value in statistics.items()})
        if loss is not None and loss.token_fields:
            made = self._token_fields(loss, estimate.rollout.mask, data["entropy"])
            batch = tq.kv_batch_put(**where, fields=made)  # type: ignore[arg-type]
        return batch

    def _provided(self, estimator: Estimator, data: Any) -> dict[str, Any]:
        """What the estimator needs."""
        found: dict[str, Any] = {}
        if "entropy" in estimator.needs:
            found["entropy"] = data["entropy"].to_padded_tensor(0.0)
        if "progress" in estimator.needs:
            steps = max(self.total_training_steps - 1, 1)
            found["progress"] = min(max((self.global_steps - 1) / steps, 0.0), 1.0)
        if estimator.history is not None:
            found["values"] = self.prompt_values()
        return found

    def _token_fields(self, loss: Loss, mask: torch.Tensor, entropy: Any) -> TensorDict:
        """The loss's fields of the whole rollout batch, from nested entropies.

        The mask is the estimator's, since a rollout correction may have masked tokens.
        """
        from verl.workers.utils.padding import response_to_nested

        settings = loss_settings(loss, self.config.actor_rollout_ref.actor.policy_loss)
        padded = entropy.to_padded_tensor(0.0)
        fields = {
            name: response_to_nested(make(padded, mask, settings), entropy)
            for name, make in loss.token_fields.items()
        }
        return TensorDict(fields, batch_size=len(padded))  # type: ignore[arg-type]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        means = pop_token_means(metrics)
        metrics.update({f"hpo/{name}": value for name, value in means.items()})
        actor, responses = self.config.actor_rollout_ref.actor, len(batch.keys)
        size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        metrics.update(pop_counts(metrics, responses // size * actor.ppo_epochs))
        return batch
