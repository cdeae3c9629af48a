"""What an estimator of advantages reads and returns, and what a loss per token is made of."""

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
            reward function returned under that name, `[batch]` float64; `opening`, the number of
            each output's opening among the different ones of `Estimator.openings`, in their
            order, `[batch]` int64: the one that it was given, or the text that it begins with by
            itself; -1 without one; `output`, the number of each output among those of its
            session, rising, `[batch]` int64.
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
        objectives: Advantages of single objectives, by name, `[batch]` as `values`, whose
            gradients are to be compared; see `Estimator.updated`.
        objective_layers: First and last layer of the model in which they are compared; all of a
            model that has none of them.
    """

    values: torch.Tensor
    unweighted: torch.Tensor | None = None
    alpha: float = 1.0
    positives: int | None = None
    negatives: int | None = None
    statistics: Mapping[str, float] = {}
    memory: Mapping[str, Any] = {}
    token_fields: Mapping[str, torch.Tensor] = {}
    objectives: Mapping[str, torch.Tensor] = {}
    objective_layers: tuple[int, int] = (0, 0)


class GradientComparison(NamedTuple):
    """What was measured of the gradients of several objectives during an update.

    Attributes:
        scores: Inner product of an objective's gradient with the sum of all, by name; the mean
            over the mini-batches.
        learning_rate: The optimizer's.
    """

    scores: Mapping[str, float]
    learning_rate: float


class TokenBatch(NamedTuple):
    """What a loss sees: a micro-batch, finite everywhere and 0 at masked tokens.

    Attributes:
        log_ratio: Bounded to 20 nats, `[batch, response]`.
        advantages: `[batch, response]`.
        mask: Bool, `[batch, response]`.
        old_log_prob: Under the policy that sampled, nats, `[batch, response]`.
        clip_range: `clip_ratio_low` and `clip_ratio_high`, where `Loss.clips`.
        extras: The loss's `fields` by name, `[batch, response]`; and `mini_batch`, the result of
            its `mini_batch_sums`.
        clip_ratio_c: Largest ratio of tokens with a negative advantage, where `Loss.dual_clips`.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    old_log_prob: torch.Tensor
    clip_range: tuple[float, float] = (0.0, 0.0)
    extras: Mapping[str, Any] = {}
    clip_ratio_c: float = math.inf


class HeadOptimizer(NamedTuple):
    """Adam's next step on the weights of a model's head, but for the gradient.

    Attributes:
        lr: Learning rate.
        betas: Decay of both averages.
        epsilon: Added to the root of the second one.
        steps: Steps made so far.
        moments: The averages, without a correction, of the gradient of the loss and of its
            square, `[vocabulary, hidden]` each; None before the first step.
    """

    lr: float
    betas: tuple[float, float]
    epsilon: float
    steps: int
    moments: tuple[torch.Tensor, torch.Tensor] | None


class HeadTokens(NamedTuple):
    """Tokens with an advantage, where the head of the model predicts them; without a graph.

    Attributes:
        hidden: What the head multiplies its weights by, over the temperature of sampling,
            `[tokens, hidden]`.
        logits: Over the temperature, `[tokens, vocabulary]`.
        tokens: Those that were sampled, `[tokens]` int64.
        advantages: `[tokens]`, none of them 0.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    advantages: torch.Tensor


class TokenTemperature(NamedTuple):
    """A temperature for every token, by the entropy H (nats) of the policy before it is drawn.

    T (1 + scale h), where h in [-1, 1] is log H - pivot, divided by high - pivot above the pivot
    and by pivot - low below; 0 where that divisor is 0. T is the temperature of the request, at
    which H is taken, too.

    Attributes:
        scale: In [0, 1).
        pivot: Logarithm of an entropy where h is 0.
        low: Logarithm of an entropy where h is -1.
        high: Logarithm of an entropy where h is 1.
    """

    scale: float
    pivot: float
    low: float
    high: float
