"""What an estimator of advantages reads and returns, and what a loss per token reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hpo_verl.core.groups import GroupAdvantages, group_relative_advantages


class Rollout(NamedTuple):
    """What an estimator sees: all outputs of a step, or of as many parts as make a step.

    A session of an agent loop may give several outputs. It counts once, by its final output, and
    its advantage goes to all of them.

    Attributes:
        rewards: One per output, `[batch]` float32, without a graph.
        groups: Prompt of each output, `[batch]` int64, 0 .. groups - 1.
        live: Outputs that count, `[batch]` bool: the final one of every session, whether or not
            a rejection has masked it, of prompts with a token left to train on.
        mask: Tokens that are trained on, `[batch, response]` bool.
        normalize_by_std: `algorithm.norm_adv_by_std_in_grpo`.
        extras: What `Estimator.needs` names: `entropy` and `old_log_prob`, nats,
            `[batch, response]`, of the policy that sampled; `progress`, 0 at the first step and 1
            at the last; `values`, one per output, `[batch]` float64, from the history of its
            prompt; `memory`, what `Advantages.memory` was at the last step, or
            `Estimator.validated` returned since, empty at the first; `reward/NAME`, what the
            reward function returned under that name, `[batch]` float64; `output`, the number of
            each output among those of its session, rising, `[batch]` int64.
        scores: Rewards before a KL penalty, `[batch]` float32; None without one.
        final: Row of the final output of each output's session, `[batch]` int64; None where
            every session has one output.
        session: Number of each output's session among those of its prompt, from 0, `[batch]`
            int64; None where it is not known, as in verl's own trainer modes.
    """

    rewards: torch.Tensor
    groups: torch.Tensor
    live: torch.Tensor
    mask: torch.Tensor
    normalize_by_std: bool = True
    extras: Mapping[str, Any] = {}
    scores: torch.Tensor | None = None
    final: torch.Tensor | None = None
    session: torch.Tensor | None = None

    def grouped(self) -> GroupAdvantages:
        """GRPO's advantages, `[batch]` float64, and the spread of each group; by sessions."""
        return group_relative_advantages(
            self.rewards,
            self.groups,
            self.live,
            scores=self.scores,
            normalize_by_std=self.normalize_by_std,
        )

    def grouped_by(self, rewards: torch.Tensor) -> torch.Tensor:
        """GRPO's advantages of other rewards, `[batch]`; float64, by sessions."""
        return self._replace(rewards=rewards, scores=None).grouped().advantages

    def lengths(self) -> torch.Tensor:
        """Tokens of each session, `[batch]` float64, at its final output; 0 at the others."""
        return self.per_session(self.mask.sum(dim=-1))

    def per_session(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the outputs of a session, `[batch]` float64, at the final one; 0 elsewhere."""
        values = values.double()
        if self.final is None:
            return values
        return torch.zeros_like(values).index_add(0, self.final, values)

    def to_outputs(self, values: torch.Tensor) -> torch.Tensor:
        """Give the value of every session, `[batch]`, to all of its outputs."""
        return values if self.final is None else values.index_select(0, self.final)


class Advantages(NamedTuple):
    """What an estimator returns: the advantages and the statistics behind them.

    Attributes:
        values: One per session, `[batch]`, at its final output, or per token,
            `[batch, response]`; detached.
        unweighted: Before the weight by sign, `[batch]`; None where there is no such weight.
        alpha: Weight of negative advantages.
        positives: Responses counted as positive; None for those with an advantage above 0.
        negatives: Responses counted as negative; None for those with an advantage below 0.
        statistics: Further numbers, logged as `hpo/<name>`.
        memory: What the next step is to remember, by name, as JSON can hold it; the rest of the
            memory stays. Saved in checkpoints.
        token_fields: For the loss, what `Estimator.gives` names, `[batch, response]`; detached.
    """

    values: torch.Tensor
    unweighted: torch.Tensor | None = None
    alpha: float = 1.0
    positives: int | None = None
    negatives: int | None = None
    statistics: Mapping[str, float] = {}
    memory: Mapping[str, Any] = {}
    token_fields: Mapping[str, torch.Tensor] = {}


class TokenBatch(NamedTuple):
    """What a loss sees: a micro-batch, finite everywhere and 0 at masked tokens.

    Attributes:
        log_ratio: Bounded to 20 nats, `[batch, response]`.
        advantages: `[batch, response]`.
        mask: Bool, `[batch, response]`.
        old_log_prob: Under the policy that sampled, nats, `[batch, response]`.
        clip_range: `clip_ratio_low` and `clip_ratio_high`, where `Loss.clips`.
        extras: The loss's `token_fields` by name, `[batch, response]`; and `mini_batch`, the
            result of its `mini_batch_sums`.
        clip_ratio_c: Largest ratio of tokens with a negative advantage, where `Loss.dual_clips`.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    old_log_prob: torch.Tensor
    clip_range: tuple[float, float] = (0.0, 0.0)
    extras: Mapping[str, Any] = {}
    clip_ratio_c: float = math.inf
