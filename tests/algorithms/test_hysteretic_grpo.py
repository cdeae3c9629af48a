"""The weight of A-HPO under GRPO's mean per response: by hand, and between its two parents."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from policy_batches import actor_config, evaluate
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpo_verl.algorithms import hpo, hysteretic_grpo
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.hpo import AHPOSettings
from hpo_verl.algorithms.registry import ALGORITHMS

RECIPES = Path(__file__).parents[2] / "recipes" / "algo"
(RECORD,) = hysteretic_grpo.ALGORITHMS


def recipe(name):
    """The sections `algorithm` and `actor` of a recipe."""
    sections = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return sections["algorithm"], sections["actor_rollout_ref"]["actor"]


def batch_of(rewards, groups, lengths, log_ratio):
    """Responses of these lengths; one of length 0 is a row that does not count."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64)
    mask = torch.arange(log_ratio.shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "rewards": torch.tensor(rewards),
        "groups": torch.tensor(groups),
        "mask": mask,
        "log_ratio": log_ratio,
    }


def advantages_of(name, batch):
    """What the recipe's estimator makes of the batch, `[batch]` float64."""
    section, _ = recipe(name)
    record, mask = ALGORITHMS[name], batch["mask"]
    if record.estimator.advantage is not None:
        rollout = Rollout(batch["rewards"], batch["groups"], mask.any(dim=-1), mask)
        settings = record.estimator.settings(**section[record.estimator.section])
        return record.estimator.advantage(rollout, settings).values
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = batch["rewards"]
    advantages, _ = get_adv_estimator_fn(section["adv_estimator"])(
        token_level_rewards=rewards, response_mask=mask, config=section,
        index=batch["groups"].numpy(),
    )  # fmt: skip
    return advantages[:, 0].double()


def update(name, batch, rows=slice(None)):
    """Loss and gradient of some rows of a rollout batch, as the recipe makes them; float64."""
    _, actor = recipe(name)
    mode, loss = actor.pop("loss_agg_mode"), actor.pop("policy_loss")["loss_mode"]
    actor["clip_ratio_c"] = float(actor["clip_ratio_c"])
    advantages = advantages_of(name, batch)[:, None].expand(batch["mask"].shape)
    given = {
        "old_log_prob": torch.zeros_like(batch["log_ratio"]),
        "log_prob": batch["log_ratio"],
        "advantages": advantages,
        "response_mask": batch["mask"],
    }
    given = {key: value[rows] for key, value in given.items()}
    return evaluate(loss, given, mode, actor_config(mode, **actor))[:2]


def random_batch(lengths=None, rewards=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5)):
    """Two prompts with four responses each."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.4 * torch.randn(8, 9, generator=generator, dtype=torch.float64)
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    return batch_of([*rewards], groups, lengths or [9, 2, 5, 1, 3, 7, 4, 6], log_ratio)


# ---------------------------------------------------------------- the equation


def test_two_responses_of_unequal_length_by_hand():
    # One success of four: A = 1.5 and -0.5, alpha 1/3, so -1/6. The mini-batch holds the success,
    # four tokens, and a failure of two.
    ratios = [[1.0, 1.1, 1.5, 0.5], [0.5, 1.3, 1.0, 1.0], [1.0] * 4, [1.0] * 4]
    batch = batch_of([1.0, 0.0, 0.0, 0.0], [0] * 4, [4, 2, 3, 3], np.log(ratios))
    loss, gradient = update("hysteretic_grpo", batch, slice(2))
    # Success: 1.5 (1 + 1.1 + 1.2 + 0.5) / 4 = 1.425; failure: -(0.8 + 1.3) / (6 x 2) = -0.175.
    assert loss.item() == pytest.approx(-(1.425 - 0.175) / 2, rel=1e-5)
    # -A r / (2 |o|), 0 at 1.5 and 0.5, which the clip stops.
    expected = [[-0.1875, -0.20625, 0, -0.09375], [0, 1.3 / 24, 0, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    # A-HPO: six tokens in one mean, -(5.7 - 0.35) / 6.
    assert update("a_hpo", batch, slice(2))[0].item() == pytest.approx(-5.35 / 6, rel=1e-5)
    # GRPO: the failure's advantage whole.
    assert update("grpo", batch, slice(2))[0].item() == pytest.approx(-0.9 / 2, rel=1e-5)


def test_loss_and_gradient_are_those_of_the_equation_by_autograd():
    batch = random_batch()
    log_ratio = batch["log_ratio"].clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    # Above their mean: one of the first prompt, two of the second (mean 0.375); 3 against 5.
    for rows in (slice(0, 4), slice(4, 8)):
        rewards = batch["rewards"][rows].double()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for row, advantage in enumerate(advantages.tolist(), rows.start):
            weighted = advantage * (0.6 if advantage < 0 else 1.0)
            ratio = log_ratio[row][batch["mask"][row]].exp()
            surrogate = torch.minimum(ratio * weighted, ratio.clamp(0.8, 1.2) * weighted)
            objective = objective - surrogate.mean() / 8
    (expected,) = torch.autograd.grad(objective, log_ratio)
    loss, gradient = update("hysteretic_grpo", batch)
    assert gradient.dtype == torch.float64
    # verl adds 1e-8 to the length of a response.
    torch.testing.assert_close(loss, objective.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)
    # Both branches of the clip, for both signs.
    for row in (0, 2):
        tokens = gradient[row][batch["mask"][row]]
        assert (tokens == 0).any()
        assert (tokens != 0).any()


# ---------------------------------------------------------------- between its parents


def test_it_is_grpo_where_as_many_succeed_as_fail():
    balanced = random_batch(rewards=[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    for ours, theirs in zip(
        update("hysteretic_grpo", balanced), update("grpo", balanced), strict=True
    ):
        # verl's advantages are float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    sparse = random_batch()
    negative = advantages_of("grpo", sparse) < 0
    ours, theirs = update("hysteretic_grpo", sparse)[1], update("grpo", sparse)[1]
    torch.testing.assert_close(ours[~negative], theirs[~negative], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours[negative], 0.6 * theirs[negative], rtol=1e-6, atol=1e-8)


def test_it_is_a_hpo_where_all_responses_are_equally_long():
    equal = random_batch(lengths=[6] * 8)
    for ours, theirs in zip(update("hysteretic_grpo", equal), update("a_hpo", equal), strict=True):
        # The loss of A-HPO returns float32.
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-8)
    # Otherwise a token of a response weighs by the mean length over its own: 37 / 8 / |o|.
    batch = random_batch()
    ours, theirs = update("hysteretic_grpo", batch)[1], update("a_hpo", batch)[1]
    lengths = batch["mask"].sum(dim=-1, keepdim=True)
    expected = theirs.double() * 37 / 8 / lengths
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(ours, theirs.double(), rtol=1e-2)


# ---------------------------------------------------------------- masks


def test_what_is_masked_is_as_if_it_were_not_there():
    batch = random_batch()
    loss, gradient = update("hysteretic_grpo", batch)
    # Other numbers at masked tokens, and two more columns of them.
    mask, log_ratio = batch["mask"], batch["log_ratio"]
    wild = torch.cat([log_ratio.where(mask, 7.0), log_ratio.new_full((8, 2), -9.0)], dim=1)
    wider = torch.cat([mask, mask.new_zeros(8, 2)], dim=1)
    padded = update("hysteretic_grpo", batch | {"log_ratio": wild, "mask": wider})
    torch.testing.assert_close(padded[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded[1][:, :9], gradient, rtol=1e-12, atol=0)
    assert (padded[1][~wider] == 0).all()


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_rows_without_a_token_are_as_if_they_were_not_there(reward):
    loss, gradient = update("hysteretic_grpo", random_batch())
    batch = random_batch()
    more = {
        "rewards": torch.full((2,), reward),
        "groups": torch.tensor([0, 2]),
        "mask": torch.zeros(2, 9, dtype=torch.bool),
        "log_ratio": torch.ones(2, 9, dtype=torch.float64),
    }
    both = {key: torch.cat([value, more[key]]) for key, value in batch.items()}
    with_rows = update("hysteretic_grpo", both)
    torch.testing.assert_close(with_rows[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(with_rows[1][:8], gradient, rtol=1e-12, atol=0)
    assert (with_rows[1][8:] == 0).all()


# ---------------------------------------------------------------- the record


def test_the_estimator_is_that_of_a_hpo_and_the_loss_that_of_grpo():
    assert RECORD.estimator is hpo.A_HPO.estimator is ALGORITHMS["a_hpo"].estimator
    grpo = ALGORITHMS["grpo"]
    assert RECORD.loss is grpo.loss
    assert RECORD.loss_agg_mode == grpo.loss_agg_mode != hpo.A_HPO.loss_agg_mode


def test_the_recipe_has_the_weight_of_a_hpo_and_the_actor_of_grpo():
    section, actor = recipe("hysteretic_grpo")
    assert (section, actor) == (recipe("a_hpo")[0], recipe("grpo")[1])
    assert AHPOSettings(**section["hpo"]) == AHPOSettings()
