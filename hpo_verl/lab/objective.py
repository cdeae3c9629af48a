"""What an algorithm makes of a batch: verl's registered functions, called as verl calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from verl import DataProto
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.ray_trainer import compute_advantage

from hpo_verl.algorithms.base import Advantages, Estimator, Loss, PromptHistory, Rollout
from hpo_verl.algorithms.registry import ESTIMATORS, LOSSES
from hpo_verl.core.masking import require_finite
from hpo_verl.core.ratios import bound_log_ratio, masked_log_ratio
from hpo_verl.core.statistics import token_sums
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.advantages import (
    Estimate,
    needs,
    read_settings,
)
from hpo_verl.verl_plugin.engine.actor_loss import added_kl, entropy_penalty
from hpo_verl.verl_plugin.losses import loss_settings, prepare
from hpo_verl.verl_plugin.trainer.algorithm_step import step_statistics


@dataclass(frozen=True)
class Objective:
    """An algorithm with its settings: verl's `algorithm` section, and its typed actor config."""

    section: DictConfig
    actor: Any

    @property
    def estimator(self) -> Estimator:
        """Record of the estimator; an empty one for an estimator of verl's own."""
        name = self.section.adv_estimator
        return ESTIMATORS.get(name, Estimator(name))

    @property
    def loss(self) -> Loss:
        """Record of the loss; an empty one for a loss of verl's own."""
        name = self.actor.policy_loss.loss_mode
        return LOSSES.get(name, Loss(name))

    @property
    def needs_entropy(self) -> bool:
        """Whether estimator or loss reads the entropies of the rollout batch."""
        return "entropy" in self.estimator.needs or bool(self.loss.token_fields)

    @property
    def has_entropy_term(self) -> bool:
        """Whether the loss reads the entropies of the policy as it is trained."""
        return self.actor.entropy_coeff != 0

    @property
    def may_leave_out(self) -> bool:
        """Whether rows with advantage 0 add nothing to a loss but their share of the counts."""
        proportional = self.loss.proportional or self.loss.mini_batch_sums is not None
        return proportional and not self.has_terms

    @property
    def has_terms(self) -> bool:
        """Whether a mini-batch without any advantage has a gradient."""
        return self.has_entropy_term or self.actor.use_kl_loss

    def require_dissectible(self, variant: str) -> None:
        """Refuse a loss whose gradient is no sum of what each response adds.

        Raises:
            ConfigError: Names the variant and the setting.
        """
        if self.loss.mini_batch_sums or self.loss.token_fields or not self.may_leave_out:
            raise ConfigError(
                f"variants.{variant}: its loss is more than a sum over responses, which "
                "evaluation.dissect_every cannot part; must be 0 for it"
            )

    def validated(self, memory: dict[str, Any], means: Mapping[str, float]) -> dict[str, Any]:
        """What the estimator remembers after a validation with these means of numbers by name."""
        if (learn := self.estimator.validated) is None:
            return memory
        return {**memory, **learn(memory, means, read_settings(self.estimator, self.section))}

    def history(self, prompts: int) -> PromptHistory | None:
        """What the estimator keeps of so many prompts; None if it keeps nothing."""
        make = self.estimator.history
        return None if make is None else make(prompts, read_settings(self.estimator, self.section))

    def temperatures(self, memory: Mapping[str, float]) -> Sequence[float]:
        """Temperatures of a prompt's first responses; the others are sampled at 1."""
        make = self.estimator.temperatures
        return () if make is None else make(memory, read_settings(self.estimator, self.section))

    def advantages(
        self,
        rewards: torch.Tensor,
        groups: torch.Tensor,
        mask: torch.Tensor,
        known: Mapping[str, Any],
    ) -> tuple[torch.Tensor, dict[str, float], Mapping[str, torch.Tensor]]:
        """Advantages `[batch, response]` of a rollout batch, what is logged of them, and fields.

        The last are what the estimator gives the loss of every token.

        Args:
            rewards: `[batch]`.
            groups: Index of every response's prompt, `[batch]` int64.
            mask: Bool, `[batch, response]`; advantages are 0 where it is false.
            known: By name, at least what the estimator needs; see `algorithms.base.Rollout`. Its
                `memory`, where needed, is brought up to date.
        """
        labels = groups.tolist()
        wanted = needs(self.estimator, self.section)
        # Every response here is a session's only output.
        known = {extras.OUTPUT: torch.zeros_like(groups), **known}
        if lacking := [name for name in wanted if name not in known]:
            raise ConfigError(f"{self.estimator.name}: the lab's task has no {lacking[0]}")
        needed = {name: known[name] for name in wanted}
        if "values" in needed:
            needed["values"] = dict(zip(labels, needed["values"].tolist(), strict=True))
        seen: Counter[int] = Counter()
        session = []
        for label in labels:
            session.append(seen[label])
            seen[label] += 1
        needed[extras.SESSION] = torch.tensor(session)
        last = torch.nn.functional.one_hot(mask.sum(dim=-1) - 1, mask.shape[1])
        data = DataProto.from_dict(
            tensors={"token_level_rewards": last * rewards[:, None], "response_mask": mask.float()},
            non_tensors={"uid": groups.numpy().astype(object)},
        )
        reported: list[Estimate] = []
        with extras.provide(**{extras.REPORT: reported.append}, **needed):
            found: Any = compute_advantage(
                data,
                adv_estimator=self.section.adv_estimator,
                norm_adv_by_std_in_grpo=self.section.norm_adv_by_std_in_grpo,
                config=self.section,  # pyright: ignore[reportArgumentType]
            )
        advantages = torch.where(mask, found.batch["advantages"].float(), 0.0)
        if not reported:
            rollout = Rollout(rewards, groups, mask.any(dim=-1), mask)
            result = Advantages(advantages)
            reported.append(Estimate(rollout, labels, rollout, result, advantages))
        if "memory" in needed:
            needed["memory"].update(reported[0].result.memory)
        return advantages, step_statistics(reported[0]), reported[0].result.token_fields

    def token_fields(
        self,
        entropy: torch.Tensor,
        mask: torch.Tensor,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the loss reads of every token of the rollout batch, `[batch, response]` each.

        Some may be `given` by the estimator.
        """
        settings = loss_settings(self.loss, self.actor.policy_loss)
        return {
            name: (given or {})[name].float() if make is None else make(entropy, mask, settings)
            for name, make in self.loss.token_fields.items()
        }

    def gradient(
        self,
        log_prob: torch.Tensor,
        old_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        fields: Mapping[str, torch.Tensor],
        counts: tuple[int, int],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Derivative of a mini-batch's loss by `log_prob`, and the sums of `core.token_sums`.

        Args:
            log_prob: `[rows, response]`, nats; the other tensors have its shape.
            old_log_prob: The same under the policy that sampled.
            advantages: 0 where the mask is false.
            mask: Bool.
            fields: These rows of `token_fields`.
            counts: Live tokens and responses of the whole mini-batch, of which these may be a part.

        Raises:
            DataError: A live log-probability is not finite.
        """
        log_prob = log_prob.detach().requires_grad_()
        require_finite("log_prob", log_prob.detach(), mask)
        provided: dict[str, Any] = dict(fields)
        if (sums := self.loss.mini_batch_sums) is not None:
            settings = loss_settings(self.loss, self.actor.policy_loss)
            batch = prepare(old_log_prob, log_prob.detach(), advantages, mask).tokens
            total = sums.contributions(batch, settings).tolist()
            provided[extras.MINI_BATCH] = sums.result(total, settings)
        self._set_counts(counts)
        with extras.provide(**provided):
            # verl's type of a loss knows its parameters by place only.
            policy_loss: Any = get_policy_loss_fn(self.loss.name)
            loss, _ = policy_loss(
                old_log_prob=old_log_prob,
                log_prob=log_prob,
                advantages=advantages,
                response_mask=mask,
                loss_agg_mode=self.actor.loss_agg_mode,
                config=self.actor,
                rollout_is_weights=None,
            )
        (slopes,) = torch.autograd.grad(loss, log_prob)
        ratio = bound_log_ratio(masked_log_ratio(log_prob.detach(), old_log_prob, mask)).exp()
        return slopes, token_sums(ratio, advantages, slopes, mask)

    def entropy_gradient(
        self,
        entropy: torch.Tensor,
        mask: torch.Tensor,
        fields: Mapping[str, torch.Tensor],
        counts: tuple[int, int],
    ) -> torch.Tensor:
        """Derivative of a mini-batch's entropy term by `entropy`; arguments as in `gradient`.

        The term is that of `engine.actor_loss`: the bonus, less the loss's penalty.
        """
        entropy = entropy.detach().requires_grad_()
        require_finite("entropy", entropy.detach(), mask)
        self._set_counts(counts)
        left = self._mean(entropy, mask)
        if (penalty := entropy_penalty(self.actor, entropy, mask, fields)) is not None:
            left = left - penalty
        (slopes,) = torch.autograd.grad(-self.actor.entropy_coeff * left, entropy)
        return slopes

    def kl_gradient(
        self,
        log_prob: torch.Tensor,
        ref_log_prob: torch.Tensor,
        mask: torch.Tensor,
        fields: Mapping[str, torch.Tensor],
        counts: tuple[int, int],
    ) -> torch.Tensor:
        """Derivative of a mini-batch's KL term by `log_prob`; arguments as in `gradient`.

        The term is that of `engine.actor_loss`, with the loss's weights.
        """
        log_prob = log_prob.detach().requires_grad_()
        self._set_counts(counts)
        # verl's type says FloatTensor, of which a tensor is none.
        divergence: Any = kl_penalty
        total = self._mean(divergence(log_prob, ref_log_prob, self.actor.kl_loss_type), mask)
        if (added := added_kl(self.actor, log_prob, ref_log_prob, mask, fields)) is not None:
            total = total + added
        (slopes,) = torch.autograd.grad(self.actor.kl_loss_coef * total, log_prob)
        return slopes

    def _mean(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return agg_loss(values, mask, self.actor.loss_agg_mode, **self.actor.global_batch_info)

    def _set_counts(self, counts: tuple[int, int]) -> None:
        self.actor.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=counts[0],
            global_batch_size=counts[1],
            loss_scale_factor=self.actor.loss_scale_factor,
        )
