"""The trained policy, its optimizer, and the updates that a batch of responses makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from hpo_verl.core.statistics import token_means
from hpo_verl.errors import DataError
from hpo_verl.lab.objective import Objective
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.rollout import Rollout
from hpo_verl.lab.settings import Training

Fields = Mapping[str, torch.Tensor]


class Diverged(Exception):
    """A log-probability or a gradient is not finite any more."""


class Learner:
    """Trains a policy in place, by AdamW without weight decay."""

    def __init__(self, policy: Policy, objective: Objective, training: Training) -> None:
        self.policy = policy
        self.objective = objective
        self.training = training
        self.optimizer = torch.optim.AdamW(
            policy.weights, lr=training.learning_rate, weight_decay=0.0, fused=True
        )
        # The policy of the start, where the loss holds on to it.
        self.reference: Policy | None = None
        if objective.actor.use_kl_loss:
            self.reference = Policy(copy.deepcopy(policy.model), policy.tokenizer)

    def copied(self) -> Learner:
        """Return another learner with equal weights and momenta."""
        policy = Policy(copy.deepcopy(self.policy.model), self.policy.tokenizer)
        twin = Learner(policy, self.objective, self.training)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return twin

    def update(
        self, rollout: Rollout, advantages: torch.Tensor, fields: Fields, group: int
    ) -> dict[str, float]:
        """Take the optimizer steps of all passes over a batch, and describe them.

        Args:
            rollout: The batch; `group` responses of each prompt are neighbours.
            advantages: `[batch, response]`.
            fields: `Objective.token_fields` of the batch.
            group: Responses per prompt.

        Raises:
            Diverged: A log-probability or the gradient is not finite.
        """
        groups = torch.arange(len(rollout.prompts)) // group
        parts, norms = [], []
        for _ in range(self.training.epochs):
            for part in torch.arange(int(groups[-1]) + 1).chunk(self.training.mini_batches):
                rows = torch.isin(groups, part).nonzero().squeeze(1)
                sums, norm = self.mini_batch(rollout, advantages, fields, rows)
                norms.append(norm)
                parts += [sums] if sums else []
        row = {"gradient_norm": sum(norms) / len(norms)}
        if parts:
            row |= token_means({key: sum(part[key] for part in parts) for key in parts[0]})
        return row

    def mini_batch(
        self, rollout: Rollout, advantages: torch.Tensor, fields: Fields, rows: torch.Tensor
    ) -> tuple[dict[str, float], float]:
        """Take one optimizer step; return sums over tokens, and the norm before clipping."""
        if not bool((advantages[rows] != 0).any()) and not self.objective.has_terms:
            # As in verl (`guarded_engine`): Adam's momentum alone must not move the weights.
            return {}, 0.0
        sums = self.backward(rollout, advantages, fields, rows)
        return sums, self.step()

    def step(self) -> float:
        """Let the optimizer follow the gradients, clipped; return their norm before that."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.weights, self.training.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise Diverged("the gradient is not finite")
        self.optimizer.step()
        return float(norm)

    def backward(
        self, rollout: Rollout, advantages: torch.Tensor, fields: Fields, rows: torch.Tensor
    ) -> dict[str, float]:
        """Leave the gradients of a mini-batch's loss in the weights; return sums over tokens."""
        whole = rollout.responses.mask[rows]
        if self.objective.may_leave_out:
            rows = rows[(advantages[rows] != 0).any(dim=-1)]
        self.optimizer.zero_grad()
        _, prompts, (tokens, mask, old_log_prob), _ = rollout.at(rows)
        # Padding to the longest response of the mini-batch, as verl pads it.
        width = slice(int(whole.sum(dim=-1).max()))
        mask, counts = mask[:, width], (int(whole.sum()), len(whole))
        tokens, with_entropy = tokens[:, width], self.objective.has_entropy_term
        log_prob, entropy = self.policy.scored(prompts, tokens, mask, with_entropy)
        read = {name: field[rows, width] for name, field in fields.items()}
        try:
            slopes, sums = self.objective.gradient(
                log_prob, old_log_prob[:, width], advantages[rows, width], mask, read, counts
            )
            if self.reference is not None:
                with torch.no_grad():
                    before = self.reference.log_probs(prompts, tokens, mask)
                slopes = slopes + self.objective.kl_gradient(log_prob, before, mask, read, counts)
            if entropy is None:
                log_prob.backward(slopes)
            else:
                of_entropy = self.objective.entropy_gradient(entropy, mask, read, counts)
                torch.autograd.backward([log_prob, entropy], [slopes, of_entropy])
        except DataError as error:
            raise Diverged(str(error)) from error
        return sums
