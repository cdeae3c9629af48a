import math

import pytest
import torch
from policy_batches import actor_config, counts_of, evaluate, make_batch
from token_batches import token_batch

from hpo_verl.algorithms.gmpo import gmpo_loss

MODE = "seq-mean-token-mean"


def loss_of(log_ratios, advantage):
    log_ratio = torch.tensor([log_ratios], dtype=torch.float64)
    return gmpo_loss(
        token_batch(log_ratio, torch.full_like(log_ratio, advantage), (0.4, 0.5)), None
    )


def test_by_hand():
    # A > 0 clips 0.9 at 0.5 and leaves -0.8: the mean of 0.5, 0.3 and -0.8 is 0.
    loss = loss_of([0.9, 0.3, -0.8], 2.0)
    assert loss.values[0].tolist() == pytest.approx([-2.0] * 3)
    assert loss.slopes[0].tolist() == pytest.approx([0.0, -2.0, -2.0])
    # A < 0 clips -0.8 at -0.4 and leaves 0.9: the mean of 0.9, 0.3 and -0.4 is 0.8 / 3.
    loss = loss_of([0.9, 0.3, -0.8], -2.0)
    weight = 2.0 * math.exp(0.8 / 3)
    assert loss.values[0].tolist() == pytest.approx([weight] * 3)
    assert loss.slopes[0].tolist() == pytest.approx([weight, weight, 0.0])


def test_masked_tokens_and_tokens_without_advantage():
    # Only 0.3 and -0.1 count; the token without an advantage has ratio 1 in the mean of three.
    log_ratio = torch.tensor([[0.3, -0.1, 0.2, 0.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    loss = gmpo_loss(token_batch(log_ratio, advantages, (0.4, 0.4))._replace(mask=mask), None)
    weight = -math.exp(0.2 / 3)
    assert loss.slopes[0].tolist() == pytest.approx([weight, weight, 0.0, 0.0])


@pytest.mark.parametrize("log_ratio", [-20.0, 20.0])
def test_extremes_stay_finite_in_float32(log_ratio):
    for sign in (-1.0, 1.0):
        batch = token_batch(torch.full((1, 9), log_ratio), torch.full((1, 9), sign), (0.4, 0.4))
        loss = gmpo_loss(batch, None)
        assert torch.isfinite(loss.values).all()
        assert torch.isfinite(loss.slopes).all()


def settings_of(mask):
    return actor_config(MODE, counts=counts_of(mask), clip_ratio_low=0.4, clip_ratio_high=0.4)


def test_it_is_verls_on_a_whole_mini_batch():
    batch = make_batch(rows=16, width=16, scale=0.5)
    config = settings_of(batch["response_mask"])
    ours, verls = (evaluate(name, batch, MODE, config) for name in ("gmpo", "geo_mean"))
    torch.testing.assert_close(ours[0], verls[0])
    torch.testing.assert_close(ours[1], verls[1])


def test_verls_gradient_grows_with_the_number_of_micro_batches_and_ours_does_not():
    batch = make_batch(rows=16, width=16, scale=0.5)
    config = settings_of(batch["response_mask"])
    for name, factor in (("gmpo", 1), ("geo_mean", 4)):
        whole = evaluate(name, batch, MODE, config)[1]
        parts = [
            evaluate(name, {key: value[rows] for key, value in batch.items()}, MODE, config)[1]
            for rows in torch.arange(16).chunk(4)
        ]
        torch.testing.assert_close(torch.cat(parts), factor * whole)


def objective(batch, settings):
    """A token's share of the paper's objective; `test_records` compares with it."""
    low, high = batch.clip_range
    kept = (
        torch.where(
            batch.advantages > 0, batch.log_ratio.clamp(max=high), batch.log_ratio.clamp(min=-low)
        )
        * batch.mask
    )
    mean = kept.sum(dim=-1, keepdim=True) / batch.mask.sum(dim=-1, keepdim=True)
    return -batch.advantages * torch.exp(mean.detach() + kept - kept.detach())
