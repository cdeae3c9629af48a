"""The part of a trainer that serves the algorithm: its needs, and the statistics of the step."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from hpo_verl.algorithms.base import REWARD, Advantages, Estimator, Loss, Rollout
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.core.statistics import batch_statistics
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.advantages import (
    Estimate,
    needs,
    penalizes,
    read_settings,
    reward_names,
    token_temperature,
)
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics, pop_token_means
from hpo_verl.verl_plugin.engine.objectives import column, pop_comparison
from hpo_verl.verl_plugin.engine.step_guard import GuardedLoss, pop_counts, step_guard_settings
from hpo_verl.verl_plugin.estimator_input import TOKEN_VALUES, group_codes, joined, make_rollout
from hpo_verl.verl_plugin.losses import loss_settings, selected_loss
from hpo_verl.verl_plugin.trainer.batches import (
    final_outputs,
    named_rewards,
    opening_numbers,
    output_numbers,
    session_numbers,
)
from hpo_verl.verl_plugin.trainer.life_cycle import run_folder
from hpo_verl.verl_plugin.trainer.prompt_history import PromptHistoryTrainer
from hpo_verl.verl_plugin.validation import check_algorithm

logger = logging.getLogger(__name__)


def estimate_of_verl(data: Any) -> Estimate:
    """Describe what an estimator of verl's own returned, from the step's fields, nested."""
    uids = data.pop("uid").tolist()
    padded = data.to_padded_tensor()
    rewards = padded.get("token_level_rewards", padded["rm_scores"])
    codes, labels = group_codes(uids, len(rewards))
    part = make_rollout(rewards, padded["response_mask"], codes)
    return Estimate(part, labels, part, Advantages(padded["advantages"]), padded["advantages"])


def step_statistics(estimate: Estimate) -> dict[str, float]:
    """`batch_statistics` of an estimator's call, and its own; scores are without a KL penalty.

    Of every reward that the estimator reads by its name, the mean.
    """
    _, _, rollout, result, advantages = estimate
    lengths = rollout.lengths()
    assigned = rollout.per_session(advantages.masked_fill(~rollout.mask, 0.0).sum(dim=-1))
    assigned = assigned / lengths.clamp(min=1)
    group = rollout.grouped()
    means = {
        name: float(values[rollout.live].sum()) / max(int(rollout.live.sum()), 1)
        for name, values in rollout.extras.items()
        if name.startswith(REWARD)
    }
    return batch_statistics(
        alpha=result.alpha,
        positives=int((assigned > 0).sum()) if result.positives is None else result.positives,
        negatives=int((assigned < 0).sum()) if result.negatives is None else result.negatives,
        zero_spread_groups=group.zero_spread_groups,
        groups=group.groups,
        rewards=rollout.rewards if rollout.scores is None else rollout.scores,
        live=rollout.live,
        lengths=lengths,
        advantages=assigned,
        unweighted=assigned if result.unweighted is None else result.unweighted,
    ) | {**means, **result.statistics}


def validation_means(infos: Mapping[str, Any], names: list[str]) -> dict[str, float]:
    """Mean of what the reward function returned under each name in a validation.

    Raises:
        DataError: A response has no number under one of the names.
    """
    means = {}
    for name in names:
        values: list[Any] = infos.get(name) or [None]
        if not all(isinstance(value, int | float) for value in values):
            raise DataError(
                f"the reward function returns no number {name!r} of every response of the "
                "validation, which the estimator reads"
            )
        means[name] = sum(values) / len(values)
    return means


class AlgorithmStep(PromptHistoryTrainer):
    """Mixed into a trainer of verl: serves the algorithm, and adds `hpo/*` to the metrics.

    While the estimator runs it provides what the record needs (`extras`); what the estimator
    returned comes back the same way. Afterwards it stores the loss's token fields for the workers.
    TransferQueue is asked once a call at most, for the fields of `_fields`.

    `separate_async` updates a step in parts. The estimator then sees a step's worth of responses:
    this part and the ones before it, also of the step before. A run that goes on starts with its
    first part alone. Statistics are logged of the last part, when what was seen is the step.
    """

    parent_mode: str
    global_steps: int
    total_training_steps: int
    parameter_sync_step: int
    local_trigger_step: int
    _earlier: deque[Rollout]
    _counts: Counter[str]
    memory: dict[str, Any]

    def __init__(self, config: DictConfig) -> None:
        for warning in check_algorithm(config):
            logger.warning(warning)
        with open_dict(config):
            # verl compares it with "sync", and reads a mode's settings from `trainer.v1.<mode>`.
            config.trainer.v1.trainer_mode = self.parent_mode
        super().__init__(config)  # type: ignore[call-arg]
        self._earlier = deque(maxlen=self.parameter_sync_step - 1)
        self._counts = Counter()
        self.memory = {}

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
        if penalizes(self.config.algorithm):
            fields += ["rm_scores"]
            if estimator.advantage is None:
                fields += ["token_level_rewards"]
        wanted = needs(estimator, self.config.algorithm)
        fields += [field for name, field in TOKEN_VALUES.items() if name in wanted]
        if reward_names(estimator, self.config.algorithm) or extras.OPENING in wanted:
            fields += ["extra_fields"]
        if loss is not None and loss.token_fields:
            fields += ["entropy"]
        if estimator.updated is not None:
            fields += ["response_mask"]
        if estimator.history is not None:
            fields += self.history_fields()
        return [*dict.fromkeys(fields)]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        import transfer_queue as tq

        estimator, loss = self._selected()
        fields = self._fields(estimator, loss)
        where: dict[str, Any] = {"keys": batch.keys, "partition_id": batch.partition_id}
        # An estimator of verl's own writes what is read of it.
        early = estimator.advantage is not None
        data: Any = tq.kv_batch_get(**where, select_fields=fields) if fields and early else {}
        reported: list[Estimate] = []
        provided = {
            extras.REPORT: reported.append,
            extras.EARLIER: self._earlier,
            extras.FINAL: final_outputs(batch.keys),
            extras.SESSION: session_numbers(batch.keys),
            extras.OUTPUT: output_numbers(batch.keys),
            **self._provided(estimator, data),
        }
        with extras.provide(**provided):
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
            if not early:
                data = tq.kv_batch_get(**where, select_fields=fields)
                with extras.provide(**self._scores(data)):
                    reported.append(estimate_of_verl(data))
        estimate = reported[0]
        # verl takes the mean over the parts that name a metric.
        if early and not self._is_last_part():
            statistics = {"alpha": estimate.result.alpha}
        else:
            statistics = step_statistics(estimate)
        if estimator.history is not None:
            statistics |= self.learn_from(estimate, data)
        statistics |= self.note_rewards(estimate.part, estimate.labels)
        metrics.update({f"hpo/{name}": value for name, value in statistics.items()})
        if estimate.result.memory and self._is_last_part():
            self.memory = {**self.memory, **estimate.result.memory}
        part = estimate.part
        if loss is not None and loss.token_fields:
            entropy = data["entropy"].to_padded_tensor(0.0)
            part = part._replace(extras={**part.extras, "entropy": entropy})
            given = estimate.result.token_fields
            made = self._token_fields(loss, joined([*self._earlier, part]), given, data["entropy"])
            batch = tq.kv_batch_put(**where, fields=made)  # type: ignore[arg-type]
        if estimator.updated is not None and estimate.result.objectives:
            made = self._objectives(estimate, data["response_mask"])
            batch = tq.kv_batch_put(**where, fields=made)  # type: ignore[arg-type]
        self._earlier.append(part)
        return batch

    def _objectives(self, estimate: Estimate, like: Any) -> TensorDict:
        """Columns of this part with the advantages of single objectives; `like` is nested."""
        from verl.workers.utils.padding import response_to_nested

        rollout, result, rows = estimate.rollout, estimate.result, len(estimate.labels)
        fields = {}
        for name, values in result.objectives.items():
            tokens = rollout.to_outputs(values.float()).unsqueeze(-1) * rollout.mask
            nested = response_to_nested(tokens[-rows:], like)
            fields[column(name, result.objective_layers)] = nested
        return TensorDict(fields, batch_size=rows)  # type: ignore[arg-type]

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        from verl.utils import tensordict_utils as tu

        estimator, _ = self._selected()
        settings = read_settings(estimator, self.config.algorithm)
        if estimator.temperatures is not None:
            factors = [*estimator.temperatures(self.memory, settings)]
            tu.assign_non_tensor_data(batch, extras.TEMPERATURES, json.dumps(factors))
        if estimator.openings is not None:
            openings = [*estimator.openings(settings)]
            tu.assign_non_tensor_data(batch, extras.OPENINGS, json.dumps(openings))
        by_token = token_temperature(estimator, self.config.algorithm, self.memory)
        if by_token is not None:
            tu.assign_non_tensor_data(batch, extras.TEMPERATURE_RULE, json.dumps(by_token))
        return super()._submit_batch_to_rollout(batch)

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, *others: Any
    ) -> dict[str, float]:
        """Let the estimator take in the mean of each of its rewards over a validation."""
        estimator, _ = self._selected()
        if estimator.validated is not None:
            names = reward_names(estimator, self.config.algorithm)
            means = validation_means(reward_extra_infos_dict, names)
            settings = read_settings(estimator, self.config.algorithm)
            self.memory = {**self.memory, **estimator.validated(self.memory, means, settings)}
        return super()._val_metrics_update(  # type: ignore[misc]
            data_sources, sample_uids, reward_extra_infos_dict, *others
        )

    def _is_last_part(self) -> bool:
        return self.local_trigger_step == self.parameter_sync_step - 1

    def _scores(self, data: Any) -> dict[str, Any]:
        if not penalizes(self.config.algorithm):
            return {}
        return {extras.SCORES: data["rm_scores"].to_padded_tensor(0.0)}

    def _provided(self, estimator: Estimator, data: Any) -> dict[str, Any]:
        """What the estimator needs."""
        if estimator.advantage is None:
            return {}
        found = self._scores(data)
        wanted = needs(estimator, self.config.algorithm)
        for name, field in TOKEN_VALUES.items():
            if name in wanted:
                found[name] = data[field].to_padded_tensor(0.0)
        names, opens = reward_names(estimator, self.config.algorithm), extras.OPENING in wanted
        if names or opens:
            columns = data.pop("extra_fields").tolist()
            found |= named_rewards(columns, names)
            if opens:
                found[extras.OPENING] = opening_numbers(columns)
        if "progress" in wanted:
            steps = max(self.total_training_steps - 1, 1)
            found["progress"] = min(max((self.global_steps - 1) / steps, 0.0), 1.0)
        if "memory" in wanted:
            found["memory"] = self.memory
        if estimator.history is not None:
            found["values"] = self.prompt_values()
        return found

    def _token_fields(
        self, loss: Loss, rollout: Rollout, given: Mapping[str, torch.Tensor], entropy: Any
    ) -> TensorDict:
        """The loss's fields of this part, made of the whole rollout; `entropy` is nested.

        Some may be `given` by the estimator. The mask is the estimator's, since a rollout
        correction may have masked tokens.
        """
        from verl.workers.utils.padding import response_to_nested

        settings = loss_settings(loss, self.config.actor_rollout_ref.actor.policy_loss)
        rows, fields = len(entropy), {}
        for name, make in loss.token_fields.items():
            if make is None:
                field = given[name]
            else:
                field = make(rollout.extras["entropy"], rollout.mask, settings)
            fields[name] = response_to_nested(field[-rows:].float(), entropy)
        return TensorDict(fields, batch_size=rows)  # type: ignore[arg-type]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        if (comparison := pop_comparison(metrics)) is not None:
            estimator, _ = self._selected()
            # For the type checker; the columns are its own.
            assert estimator.updated is not None  # noqa: S101
            settings = read_settings(estimator, self.config.algorithm)
            self.memory = {**self.memory, **estimator.updated(self.memory, comparison, settings)}
        means = pop_token_means(metrics)
        metrics.update({f"hpo/{name}": value for name, value in means.items()})
        actor, responses = self.config.actor_rollout_ref.actor, len(batch.keys)
        size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        self._counts.update(pop_counts(metrics, responses // size * actor.ppo_epochs))
        if self._is_last_part():
            metrics.update(self._counts)
            self._counts.clear()
        return batch
