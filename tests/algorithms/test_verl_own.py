"""verl's own functions with the settings of our recipes, against the papers' equations."""

from pathlib import Path

import pytest
import torch
import yaml
from policy_batches import actor_config, counts_of, evaluate, make_batch

RECIPES = Path(__file__).parents[2] / "recipes" / "algo"


def recipe(name):
    """Loss, and the actor's settings, of a recipe."""
    actor = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["actor_rollout_ref"]["actor"]
    section = actor.pop("policy_loss")
    return section.pop("loss_mode"), section, actor


def run(name, batch):
    """Loss and gradient of a mini-batch under a recipe."""
    loss_mode, _, actor = recipe(name)
    mode = actor.pop("loss_agg_mode")
    config = actor_config(mode, counts=counts_of(batch["response_mask"]), **actor)
    return evaluate(loss_mode, batch, mode, config)[:2]


def trl_luspo(log_prob, old_log_prob, advantages, mask, low, high):
    """TRL's `luspo`, re-derived: per response the clipped surrogate of the geometric mean ratio,
    times the number of its tokens; then the mean over responses."""
    lengths = mask.sum(dim=1)
    ratio = (((log_prob - old_log_prob) * mask).sum(dim=1) / lengths).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return (-torch.minimum(ratio * advantages, clipped * advantages) * lengths).mean()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1])
def test_luspo_is_trls(scale):
    batch = make_batch(rows=32, width=16, scale=scale)
    leaf = batch["log_prob"].clone().requires_grad_()
    mask = batch["response_mask"]
    expected = trl_luspo(leaf, batch["old_log_prob"], batch["advantages"][:, 0], mask, 2e-3, 2.5e-3)
    (slopes,) = torch.autograd.grad(expected, leaf)
    loss, gradient = run("luspo", batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, slopes, rtol=1e-4, atol=1e-8)


def test_luspo_by_hand():
    # One response of three tokens and one of one, on-policy: every token weighs |A| / 2.
    batch = {
        "old_log_prob": torch.zeros(2, 3),
        "log_prob": torch.zeros(2, 3),
        "advantages": torch.tensor([[2.0] * 3, [-1.0] * 3]),
        "response_mask": torch.tensor([[True, True, True], [True, False, False]]),
    }
    loss, gradient = run("luspo", batch)
    assert loss.item() == pytest.approx((-2.0 * 3 + 1.0) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0] * 3, [0.5, 0.0, 0.0]]))
