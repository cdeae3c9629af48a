import math
import re

import pytest
import torch
from policy_batches import actor_config, counts_of, evaluate, make_batch
from token_batches import token_batch

from hpo_verl.algorithms.vespo import VESPOSettings, vespo_loss
from hpo_verl.errors import ConfigError

PATH = "actor_rollout_ref.actor.policy_loss"


def loss_of(ratios, advantage, **changes):
    """Slopes of responses of two tokens with these ratios."""
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    batch = token_batch(log_ratio, torch.full_like(log_ratio, advantage))
    batch = batch._replace(old_log_prob=torch.full_like(log_ratio, -1.0))
    return vespo_loss(batch, VESPOSettings(**changes))


def test_by_hand():
    # W = 0.5, 1 and 4. A > 0: 0.25 e^1.5, 1, 16 e^-9. A < 0: 0.125 e^1, 1, 64 e^-6.
    ratios = [(0.5, 1.0), (2.0, 0.5), (1.0, 4.0)]
    positive = [0.25 * math.exp(1.5), 1.0, 16 * math.exp(-9)]
    negative = [0.125 * math.e, 1.0, 64 * math.exp(-6)]
    for advantage, weights in ((2.0, positive), (-2.0, negative)):
        loss = loss_of(ratios, advantage)
        expected = [-advantage * weight for weight in weights]
        assert loss.slopes[:, 0].tolist() == pytest.approx(expected)
        assert torch.equal(loss.slopes[:, 0], loss.slopes[:, 1])
        log_policy = torch.tensor(ratios, dtype=torch.float64).log() - 1.0
        torch.testing.assert_close(loss.values, loss.slopes * log_policy)


@pytest.mark.parametrize(
    ("changes", "advantage", "weight"),
    [
        ({"k_pos": 0.0}, 1.0, math.exp(-3)),
        ({"lambda_pos": 0.0}, 1.0, 4.0),
        ({"k_neg": 0.0}, -1.0, math.exp(-2)),
        ({"lambda_neg": 0.0}, -1.0, 8.0),
    ],
)
def test_every_setting_reaches_its_factor(changes, advantage, weight):
    # W = 2: W^c1 exp(-c2) without one of its factors.
    slopes = loss_of([(1.0, 2.0)], advantage, **changes).slopes
    assert slopes[0, 0].item() == pytest.approx(-advantage * weight)


def test_the_weight_is_largest_where_the_paper_says():
    # phi' = 0 at W = c1 / c2: 2/3 for positive, 3/2 for negative advantages.
    grid = torch.linspace(0.1, 4.0, 40, dtype=torch.float64).tolist()
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        weights = loss_of([(1.0, w) for w in grid], advantage).slopes[:, 0].abs()
        top = loss_of([(1.0, peak)], advantage).slopes[0, 0].abs()
        assert (weights <= top + 1e-12).all()


def test_long_responses_stay_finite_in_float32():
    far = torch.tensor([[-20.0] * 500, [20.0] * 500])
    for sign in (-1.0, 1.0):
        loss = vespo_loss(token_batch(far, torch.full_like(far, sign)), VESPOSettings())
        assert torch.isfinite(loss.values).all()
        assert loss.slopes.abs().max() < 1e-12


def trl_loss(log_prob, old_log_prob, advantages, mask):
    """TRL's loss, re-derived from its formulas: log W within log 1e-8 and 20, mean over tokens."""
    log_w = ((log_prob - old_log_prob).clamp(-20, 20) * mask).sum(dim=1)
    log_w = log_w.clamp(math.log(1e-8), 20.0)
    positive = advantages >= 0
    k, decay = torch.where(positive, 2.0, 3.0), torch.where(positive, 3.0, 2.0)
    phi = torch.exp(decay + k * log_w - decay * log_w.exp()).detach()
    per_token = -phi[:, None] * advantages[:, None] * log_prob
    return (per_token * mask).sum() / mask.sum()


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_it_is_trls(scale):
    batch = make_batch(rows=32, width=16, scale=scale)
    log_prob = batch["log_prob"].double().requires_grad_()
    mask, advantages = batch["response_mask"], batch["advantages"][:, 0].double()
    expected = trl_loss(log_prob, batch["old_log_prob"].double(), advantages, mask)
    (slopes,) = torch.autograd.grad(expected, log_prob)
    config = actor_config(counts=counts_of(mask))
    loss, gradient, _ = evaluate("vespo", batch, config=config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-4, atol=1e-8)


def objective(batch, settings):
    """Eq. 20 of the paper; `test_records` compares values and slopes with it."""
    ratio = batch.log_ratio.sum(dim=-1, keepdim=True).exp()
    positive = batch.advantages >= 0
    c1 = torch.where(positive, settings.k_pos, settings.k_neg).double()
    c2 = torch.where(positive, settings.lambda_pos, settings.lambda_neg).double()
    phi = (ratio**c1 * torch.exp(c2 * (1 - ratio))).detach()
    return -phi * batch.advantages * (batch.old_log_prob + batch.log_ratio)


@pytest.mark.parametrize("name", ["k_pos", "lambda_pos", "k_neg", "lambda_neg"])
@pytest.mark.parametrize("value", [-0.1, float("inf"), "2", True])
def test_settings_out_of_range_are_refused_by_their_path(name, value):
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{PATH}.{name} = {value!r}: must be')}"):
        VESPOSettings(**{name: value})
