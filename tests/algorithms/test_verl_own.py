"""verl's own functions with the settings of our recipes, against the papers' equations."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from policy_batches import actor_config, counts_of, evaluate, make_batch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.workers.config import PolicyLossConfig

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
    actor.pop("ppo_mini_batch_size", None)
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


# ---------------------------------------------------------------- losses


def tokens(log_ratios, advantage, old=-1.0):
    """A mini-batch of one response with these log-ratios."""
    log_ratio = torch.tensor([log_ratios], dtype=torch.float64)
    return {
        "old_log_prob": torch.full_like(log_ratio, old),
        "log_prob": log_ratio + old,
        "advantages": torch.full_like(log_ratio, advantage),
        "response_mask": torch.ones_like(log_ratio).bool(),
    }


def slopes_of(name, batch, scale=1.0):
    """Derivatives by every token's log-probability, times the number of tokens or `scale`."""
    return (run(name, batch)[1] * scale).flatten().tolist()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cispo_weighs_by_the_ratio_up_to_five_and_stops_nothing(sign):
    ratios = torch.tensor([0.01, 0.9, 4.0, 6.0]).log().tolist()
    slopes = slopes_of("cispo", tokens(ratios, sign), 4)
    assert slopes == pytest.approx([-sign * w for w in (0.01, 0.9, 4.0, 5.0)], rel=1e-6)


def test_dppo_stops_by_the_change_of_the_probability():
    # From 0.4 to 0.5, 0.6, 0.2; and from 1e-4 to 0.1, a ratio of 1000, which is a weight.
    pi = torch.tensor([0.5, 0.6, 0.2, 0.1])
    old = torch.tensor([0.4, 0.4, 0.4, 1e-4])
    batch = tokens((pi / old).log().tolist(), 1.0)
    batch |= {"old_log_prob": old.log()[None], "log_prob": pi.log()[None]}
    _, _, actor = recipe("dppo_tv")
    mode = actor.pop("loss_agg_mode")
    assert actor.pop("loss_scale_factor") == "${data.max_response_length}"
    for sign, weights in ((1.0, (1.25, 0.0, 0.5, 1000.0)), (-1.0, (1.25, 1.5, 0.0, 1000.0))):
        batch["advantages"] = torch.full((1, 4), sign)
        counts = counts_of(batch["response_mask"]) | {"loss_scale_factor": 8}
        config = actor_config(mode, counts=counts, **actor)
        gradient = evaluate("dppo_tv", batch, mode, config)[1]
        # One response, its sum divided by the constant length of 8.
        assert (gradient[0] * 8).tolist() == pytest.approx([-sign * w for w in weights], rel=1e-4)


def covariant():
    """1000 tokens of which the first three have a large product of deviations."""
    generator = torch.Generator().manual_seed(0)
    old = -1.0 + 0.01 * torch.randn(10, 100, generator=generator)
    advantages = torch.where(torch.arange(10)[:, None] % 2 == 0, 1.0, -1.0).expand(10, 100).clone()
    old[0, :3] = torch.tensor([0.7, 1.2, 3.0])
    return {
        "old_log_prob": old,
        "log_prob": old + 0.1,
        "advantages": advantages,
        "response_mask": torch.ones(10, 100).bool(),
    }


def policy_config(name):
    loss_mode, section, actor = recipe(name)
    mode = actor.pop("loss_agg_mode")
    policy_loss = PolicyLossConfig(loss_mode=loss_mode, **section)
    batch = covariant()
    counts = counts_of(batch["response_mask"])
    return mode, actor_config(mode, policy_loss, counts, **actor), batch


def test_clip_cov_stops_a_token_of_covariance_between_one_and_five():
    mode, config, batch = policy_config("clip_cov")
    gradient = evaluate("clip_cov", batch, mode, config)[1]
    # 2e-4 of 1000 tokens is at least one; the first has too small a covariance for it.
    stopped = (gradient == 0).nonzero().tolist()
    assert len(stopped) == 1
    assert stopped[0] in ([0, 0], [0, 1], [0, 2])
    kept = gradient != 0
    expected = (-batch["advantages"] * torch.tensor(0.1).exp() / 1000)[kept]
    torch.testing.assert_close(gradient[kept], expected)


def test_kl_cov_penalises_the_tokens_of_largest_covariance_with_weight_one():
    mode, config, batch = policy_config("kl_cov")
    gradient = evaluate("kl_cov", batch, mode, config)[1]
    # 2e-3 of 1000 tokens are two: those at 3.0 and 1.2. The slope of |log r| at 0.1 is 1.
    expected = -batch["advantages"] * torch.tensor(0.1).exp() / 1000
    expected[0, 1:3] += 1 / 1000
    torch.testing.assert_close(gradient, expected)


# ---------------------------------------------------------------- advantages


def advantages_of(name, rewards, groups, lengths, **changes):
    """Advantages of verl's estimator under a recipe's settings."""
    section = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["algorithm"]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    scores = torch.zeros(mask.shape)
    scores[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = torch.tensor(rewards)
    found, _ = get_adv_estimator_fn(section["adv_estimator"])(
        token_level_rewards=scores,
        response_mask=mask.float(),
        index=np.array(groups, dtype=object),
        config=OmegaConf.create(section | changes),
    )
    return found, mask


def test_rloo_subtracts_the_mean_of_the_others():
    found, _ = advantages_of("rloo", [1.0, 0.0, 0.0, 5.0], ["a", "a", "a", "b"], [1, 2, 2, 1])
    # A group of one has no others and keeps its reward.
    assert found[:, 0].tolist() == pytest.approx([1.0, -0.5, -0.5, 5.0])


def test_opo_subtracts_the_mean_weighted_by_length():
    found, _ = advantages_of("opo", [1.0, 0.0], ["a", "a"], [1, 3])
    assert found[:, 0].tolist() == pytest.approx([0.75, -0.25])
    assert found[0, 1:].tolist() == [0.0, 0.0]


def test_reinforce_plus_plus_whitens_over_the_tokens_of_the_batch():
    # Tokens: 1 of reward 1, 3 of reward 0; mean 1/4, unbiased variance 1/4.
    found, mask = advantages_of("reinforce_plus_plus", [1.0, 0.0], ["a", "b"], [1, 3])
    assert found[mask].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    # Rewards of another range give the same.
    other, _ = advantages_of("reinforce_plus_plus", [1.0, -1.0], ["a", "b"], [1, 3])
    torch.testing.assert_close(other, found)
    # The recipe's gamma is read.
    less, _ = advantages_of("reinforce_plus_plus", [1.0, 0.0], ["a", "b"], [3, 1], gamma=0.5)
    assert less[0].tolist() == sorted(less[0].tolist())
    assert less[0, 0] < less[0, 2]


@pytest.mark.parametrize("name", ["rloo", "opo"])
def test_reinforce_has_neither_ratio_nor_clip(name):
    slopes = slopes_of(name, tokens([-3.0, 0.0, 3.0], -2.0), 3)
    assert slopes == pytest.approx([2.0, 2.0, 2.0])
