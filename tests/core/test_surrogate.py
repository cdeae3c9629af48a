import math

import pytest
import torch

from hpo_verl.core.surrogate import TokenLoss, attach, clipped_surrogate


def test_the_gradient_is_the_slope_times_what_comes_from_above():
    log_prob = torch.zeros(1, 3, requires_grad=True)
    loss = TokenLoss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 0.0, 4.0]]))
    losses = attach(log_prob, loss)
    assert losses.tolist() == [[1.0, 2.0, 3.0]]
    (losses * torch.tensor([[1.0, 1.0, 0.5]])).sum().backward()
    assert log_prob.grad.tolist() == [[-1.0, 0.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_has_the_type_of_the_log_probability(dtype):
    log_prob = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    losses = attach(log_prob, TokenLoss(torch.ones(2, 2), torch.full((2, 2), 0.5)))
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert log_prob.grad.dtype == dtype
    assert log_prob.grad.tolist() == [[0.5, 0.5]] * 2


def test_values_of_the_loss_stay_untouched_by_changes_of_the_result():
    values = torch.ones(1, 1)
    log_prob = torch.zeros(1, 1, requires_grad=True)
    losses = attach(log_prob, TokenLoss(values, torch.ones(1, 1)))
    assert losses.requires_grad
    assert not values.requires_grad


def test_weights_scale_value_and_slope():
    loss = TokenLoss(torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]))
    scaled = loss.scaled(torch.tensor([0.5, 0.0]))
    assert scaled.values.tolist() == [1.0, 0.0]
    assert scaled.slopes.tolist() == [2.5, 0.0]


def test_bounds_per_token_equal_one_bound_at_a_time():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    low = torch.rand(8, 16, generator=generator, dtype=torch.float64) / 2
    high = torch.rand(8, 16, generator=generator, dtype=torch.float64)
    together = clipped_surrogate(log_ratio, advantages, low, high)
    for row in range(8):
        for column in range(16):
            place = (slice(row, row + 1), slice(column, column + 1))
            alone = clipped_surrogate(
                log_ratio[place], advantages[place], low[row, column].item(),
                high[row, column].item(),
            )  # fmt: skip
            assert torch.equal(together.values[place], alone.values)
            assert torch.equal(together.slopes[place], alone.slopes)


def test_the_dual_clip_by_hand():
    # A = -2 and c = 3: at most 6. A = 2 is left alone; so is a ratio of exactly 3.
    log_ratio = torch.tensor([0.5, 2.0, 3.0, 4.0, 1e6, 4.0, 4.0], dtype=torch.float64).log()
    advantages = torch.tensor([-2.0, -2.0, -2.0, -2.0, -2.0, 2.0, 0.0]).double()
    loss = clipped_surrogate(log_ratio, advantages, 0.2, 0.2, 3.0)
    assert loss.values.tolist() == pytest.approx([1.6, 4.0, 6.0, 6.0, 6.0, -2.4, 0.0])
    slopes = loss.slopes.tolist()
    assert slopes[:2] + slopes[3:] == pytest.approx([0.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    off = clipped_surrogate(log_ratio, advantages, 0.2, 0.2, math.inf)
    assert off.values.tolist() == pytest.approx([1.6, 4.0, 6.0, 8.0, 2e6, -2.4, 0.0])
