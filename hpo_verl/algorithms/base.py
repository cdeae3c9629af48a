"""The record of an algorithm: everything that the rest of hpo_verl knows of it.

An algorithm is an estimator of advantages together with a loss per token. Either may be verl's
own, which has a name only. Adapters, typed settings, checks, `hpo-verl list`, the lab and the
shared tests loop over these records (`registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from hpo_verl.core.rollout import (
    Advantages,
    GradientComparison,
    HeadOptimizer,
    HeadTokens,
    Rollout,
    TokenBatch,
    TokenTemperature,
)
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate
from hpo_verl.errors import ConfigError

TOKEN_MEAN = "token-mean"  # noqa: S105
SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"  # noqa: S105
SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"  # noqa: S105
SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"  # noqa: S105

REWARD = "reward/"
"""In `Estimator.needs`, in front of a name under which the reward function returns a number."""

CLIP = "-min(r A, clip(r, 1 - e_low, 1 + e_high) A)"
"""Part of many an equation."""


class Opening(NamedTuple):
    """What a response begins with, or is, instead of what the policy would sample.

    Attributes:
        text: A beginning, masked, from which the policy goes on.
        whole: Name of a text in the prompt's `extra_info` that is the whole response, trained on;
            a prompt without it, or whose text is too long, is sampled as usual.
    """

    text: str = ""
    whole: str = ""


class PromptHistory(Protocol):
    """What is kept of every prompt from step to step, and saved in checkpoints."""

    @property
    def measures_drift(self) -> bool:
        """Whether `learn` reads how far the policy has moved since a prompt's last response."""
        ...

    def __len__(self) -> int:
        """Number of prompts."""
        ...

    def values(self) -> torch.Tensor:
        """What the estimator gets of every prompt, `[prompts]` float64."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw the prompts of a batch, all different."""
        ...

    def learn(
        self, prompts: torch.Tensor, rewards: torch.Tensor, drift: torch.Tensor, revisited: int
    ) -> dict[str, float]:
        """Take in a step's responses, one of each prompt, after their advantages are taken.

        Args:
            prompts: Distinct prompts, `[batch]` int64.
            rewards: `[batch]`.
            drift: Mean |change of log-probability| on the prompt's last response, nats,
                `[batch]`; 0 at a first visit.
            revisited: How many of the prompts had a last response.

        Returns:
            Numbers to log as `hpo/<name>`.
        """
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; raises DataError if it is of another number of prompts."""


@dataclass(frozen=True)
class SignWeight:
    """A weight by sign in front of the advantages of another estimator of ours.

    Attributes:
        settings: As in `Estimator`; they stand in the section of the estimator that has the weight.
        weigh: From the rollout, the advantages and the settings to weighted ones.
    """

    settings: type[Any]
    weigh: Callable[[Rollout, Advantages, Any], Advantages]


@dataclass(frozen=True)
class Estimator:
    """A way from rewards to advantages.

    Attributes:
        name: `algorithm.adv_estimator`.
        advantage: From the rollout and an object of `settings` to advantages; None for verl's own.
        settings: Frozen dataclass that checks its own values. It may have a property `needs`:
            what these values need beyond the estimator's.
        section: Where under `algorithm` the settings stand.
        needs: What it reads of `Rollout.extras`.
        gives: Names of the fields that it makes for the loss, token by token.
        weights_by_sign: Whether it weights advantages by their sign, so that the loss must be
            proportional to the advantage.
        drops_tokens: Whether an advantage of 0 is to silence a token, which the loss must let be.
        check: Raises ConfigError where verl's whole configuration does not go with the estimator.
        temperatures: From the memory of the last step and the settings to factors on the sampling
            temperature of a prompt's first responses; the others are sampled at factor 1.
        openings: From the settings to the openings of a prompt's first responses.
        token_temperature: From the memory of the last step and the settings to a rule for the
            temperature of every token; None where the settings ask for none.
        history: Makes what is kept of every prompt, from their number and the settings. Prompts
            are then drawn by it, one response each.
        weight: Its weight by sign, where others can have it in front.
        validated: From the memory, a validation's mean of each reward that it needs, by its name,
            and the settings to what changes of the memory; needs validations during the run.
        compares: Whether it compares the responses to one prompt, so that it needs several.
        updated: From the memory, the comparison of the gradients of `Advantages.objectives` in a
            step's update, and the settings to what changes of the memory.
    """

    name: str
    advantage: Callable[[Rollout, Any], Advantages] | None = None
    settings: type[Any] | None = None
    section: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    weights_by_sign: bool = False
    drops_tokens: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None
    temperatures: Callable[[Mapping[str, float], Any], Sequence[float]] | None = None
    openings: Callable[[Any], Sequence[Opening]] | None = None
    token_temperature: Callable[[Mapping[str, Any], Any], TokenTemperature | None] | None = None
    history: Callable[[int, Any], PromptHistory] | None = None
    weight: SignWeight | None = None
    validated: Callable[[Mapping[str, Any], Mapping[str, float], Any], Mapping[str, Any]] | None = (
        None
    )
    compares: bool = True
    updated: Callable[[Mapping[str, Any], GradientComparison, Any], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class MiniBatchSums:
    """Sums over a whole mini-batch, on all ranks, that a loss reads.

    Attributes:
        contributions: Sums over a part of the mini-batch, `[sums]` float64; the sums of parts add
            up to those of the whole.
        result: What the loss reads, a named tuple of numbers made of the total; each is logged as
            `actor/<name>`.
        kind: Type of the result.
    """

    contributions: Callable[[TokenBatch, Any], torch.Tensor]
    result: Callable[[Sequence[float], Any], Any]
    kind: type[Any]


@dataclass(frozen=True)
class HeadFields:
    """Fields of the tokens that a loss reads, made in the workers where the head is computed.

    Attributes:
        names: Of the fields; the mean of each over live tokens is logged as `actor/<name>`.
        make: From some tokens, the optimizer and the settings to the fields by name, `[tokens]`.
            They are 0 at tokens without an advantage.
    """

    names: tuple[str, ...]
    make: Callable[[HeadTokens, HeadOptimizer, Any], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Loss:
    """A loss per token.

    Attributes:
        name: `policy_loss.loss_mode`.
        token_loss: From a micro-batch and an object of `settings` to values and slopes; None for
            verl's own.
        settings: Frozen dataclass that checks its own values; under `policy_loss`.
        aggregations: The values of `loss_agg_mode` under which it is the paper's objective, the
            default first; empty for any.
        always: The aggregation that it uses whatever `loss_agg_mode` says.
        clips: Whether it reads `clip_ratio_low` and `clip_ratio_high`.
        dual_clips: Whether it reads `clip_ratio_c`, as every loss does that ends in PPO's clip.
        proportional: Whether f(c A) = c f(A) for each sign of A.
        selects: Whether it chooses by the advantages which tokens it stops.
        caveat: What the loss does, where it is not proportional or not 0 at A = 0; ends the
            sentence "that loss ...".
        token_fields: Made on the driver for the whole rollout batch, by name, from the entropies
            (nats, `[batch, response]`), the mask (bool) and the settings; None for a field that
            the estimator gives.
        head_fields: What it needs of the head of the model.
        mini_batch_sums: What it needs of the whole mini-batch.
        entropy_penalty: From the entropies of a micro-batch (nats, `[batch, response]`, with their
            graph), its mask (bool), its token fields and the settings to what is taken off each
            entropy; so it weighs `entropy_coeff`, which must be above 0.
        kl_weight: The token field that weighs each token's KL term besides `kl_loss_coef`.
    """

    name: str
    token_loss: Callable[[TokenBatch, Any], TokenLoss] | None = None
    settings: type[Any] | None = None
    aggregations: tuple[str, ...] = ()
    always: str = ""
    clips: bool = False
    dual_clips: bool = False
    proportional: bool = False
    selects: bool = False
    caveat: str = ""
    token_fields: Mapping[str, Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor] | None] = (
        field(default_factory=dict)
    )
    head_fields: HeadFields | None = None
    mini_batch_sums: MiniBatchSums | None = None
    entropy_penalty: (
        Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], Any], torch.Tensor] | None
    ) = None
    kl_weight: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields that it reads of every token."""
        return (*self.token_fields, *(self.head_fields.names if self.head_fields else ()))


def clipped_loss(batch: TokenBatch, settings: object) -> TokenLoss:
    """PPO's loss per token: the clipped surrogate, with its dual clip."""
    return clipped_surrogate(
        batch.log_ratio, batch.advantages, *batch.clip_range, batch.clip_ratio_c
    )


GRPO = Estimator("grpo")
"""verl's group-relative advantage, (R - mean) / (std + 1e-6) within a group."""

VANILLA = Loss("vanilla", proportional=True)
"""verl's clipped surrogate of PPO."""

GSPO = Loss("gspo", proportional=True)
"""verl's clipped surrogate of a ratio per sequence."""

REINFORCE = Loss("gpg", proportional=True)
"""verl's -A log pi, which it names after another method."""


@dataclass(frozen=True)
class Algorithm:
    """What the recipe `algo/<name>.yaml` selects.

    Attributes:
        name: Name of the recipe.
        papers: arXiv ids.
        equation: Loss of a token or weight of an advantage.
        loss_agg_mode: Aggregation that the recipe sets, the paper's.
    """

    name: str
    papers: tuple[str, ...]
    equation: str
    loss_agg_mode: str
    estimator: Estimator = GRPO
    loss: Loss = VANILLA


def refuse_kl_in_reward(config: Mapping[str, Any]) -> None:
    """An `Estimator.check` for those that know which values a reward may take.

    Raises:
        ConfigError: `algorithm.use_kl_in_reward` is true in verl's whole configuration.
    """
    algorithm = config["algorithm"]
    if algorithm.get("use_kl_in_reward", False):
        raise ConfigError(
            f"algorithm.use_kl_in_reward = True: adv_estimator = {algorithm['adv_estimator']!r} "
            "takes the task's own rewards, which a KL penalty changes; must be false"
        )
