"""What positive and negative advantages do, each alone: their gradients, and where they lead.

The loss of a whole batch is a sum over its responses. Its gradient is taken over those with a
positive advantage and over those with a negative one. Then the optimizer, with the momenta that it
has, takes one step by each alone; the change of the log-probability of the batch's right responses
says whether that helps them. Where negatives lower it, likelihood is displaced (arXiv 2410.08847).
"""

from __future__ import annotations

import torch

from hpo_verl.lab.learner import Fields, Learner
from hpo_verl.lab.rollout import Rollout

_SIGNS = {"positive": 1.0, "negative": -1.0}
# Right responses whose log-probability is followed.
_FOLLOWED = 128


def dissect(
    learner: Learner, rollout: Rollout, advantages: torch.Tensor, fields: Fields
) -> dict[str, float]:
    """Dissect the update that a batch would make; the learner stays as it is.

    Args:
        learner: Whose loss must be `Objective.require_dissectible`.
        rollout: The batch.
        advantages: `[batch, response]`.
        fields: `Objective.token_fields` of the batch.

    Returns:
        `positive_gradient_norm`, `negative_gradient_norm`, before clipping; `gradient_cosine`
        between the two; `right_shift_positive`, `right_shift_negative`: change of the mean
        log-probability of a right response, nats, summed over its tokens. A gradient without such
        advantages is 0; what cannot be said is left out.

    Raises:
        Diverged: A log-probability or a gradient is not finite.
    """
    every = torch.arange(len(rollout.prompts))
    right = rollout.at((rollout.rewards > 0).nonzero().squeeze(1)[:_FOLLOWED])
    before = _log_prob(learner, right)
    # A copy is led astray; the original keeps weights, momenta and gradients.
    found, gradients = {}, {}
    for name, sign in _SIGNS.items():
        tried = learner.copied()
        alone = torch.where(advantages * sign > 0, advantages, 0.0)
        if not bool((alone != 0).any()):
            found[f"{name}_gradient_norm"] = 0.0
            continue
        tried.backward(rollout, alone, fields, every)
        gradient = torch.cat([_gradient(weight) for weight in tried.policy.weights])
        gradients[name] = gradient
        found[f"{name}_gradient_norm"] = float(gradient.norm())
        tried.step()
        if right.prompts:
            found[f"right_shift_{name}"] = _log_prob(tried, right) - before
    if len(gradients) == len(_SIGNS):
        cosine = torch.nn.functional.cosine_similarity(*gradients.values(), dim=0)
        found["gradient_cosine"] = float(cosine)
    return found


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    gradient = weight.grad
    return torch.zeros(weight.numel()) if gradient is None else gradient.flatten().clone()


@torch.no_grad()
def _log_prob(learner: Learner, rollout: Rollout) -> float:
    """Mean log-probability of the responses, nats; 0 without any."""
    if not rollout.prompts:
        return 0.0
    tokens, mask, _ = rollout.responses
    found = learner.policy.log_probs(rollout.prompts, tokens, mask)
    return float(found.sum(dim=-1).double().mean())
