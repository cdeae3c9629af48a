import pytest
import torch

from hpo_verl.core.surrogate import TokenLoss, attach


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
