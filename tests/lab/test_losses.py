"""The comparators' losses and aggregations: numbers by hand, and their equations by autograd."""

import math

import pytest
import torch

from hpo_verl.lab.aggregation import token_weights
from hpo_verl.lab.gspo import gspo_loss
from hpo_verl.lab.sapo import sapo_loss
from hpo_verl.lab.vanilla import vanilla_loss

LOG2 = math.log(2.0)


def test_gspo_by_hand():
    # Mean log-ratio of row 0 is log 2, of row 1 0 and of row 2 -log 2; the last token is masked.
    log_ratio = torch.tensor([[2 * LOG2, 0.0, 0.0], [0.5, -0.5, 0.0], [-LOG2, -LOG2, 0.0]])
    mask = torch.tensor([[True, True, False]] * 3)
    ones = torch.ones(3, 3)
    positive = gspo_loss(log_ratio, ones, mask, 0.1, 0.2)
    # A > 0: ratio 2 is clipped to 1.2 and stops; 1 and 1/2 pass.
    torch.testing.assert_close(positive.values[:, 0], torch.tensor([-1.2, -1.0, -0.5]))
    torch.testing.assert_close(positive.slopes[:, 1], torch.tensor([0.0, -1.0, -0.5]))
    negative = gspo_loss(log_ratio, -2 * ones, mask, 0.1, 0.2)
    # A = -2: ratio 2 and 1 pass, 1/2 is clipped to 0.9 and stops.
    torch.testing.assert_close(negative.values[:, 0], torch.tensor([4.0, 2.0, 1.8]))
    torch.testing.assert_close(negative.slopes[:, 0], torch.tensor([4.0, 2.0, 0.0]))


def test_gspo_stops_beyond_ten_nats():
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = gspo_loss(torch.full((1, 2), 11.0), -torch.ones(1, 2), mask, 0.1, 0.2)
    assert loss.values[0, 0].item() == pytest.approx(math.exp(10.0))
    assert (loss.slopes == 0).all()


def test_sapo_by_hand():
    # r = 1: gate 1/2, so l = -(2 / tau) A and the slope is -A for every tau.
    loss = sapo_loss(torch.zeros(1, 2), torch.tensor([[3.0, -3.0]]), 1.0, 1.6)
    torch.testing.assert_close(loss.values, torch.tensor([[-6.0, 3.75]]))
    torch.testing.assert_close(loss.slopes, torch.tensor([[-3.0, 3.0]]))
    # r = 2, tau = 1: p = sigmoid(1) = 0.731059, l = -4 p, slope -4 p (1 - p) 2 = -1.572895.
    loss = sapo_loss(torch.full((1, 1), LOG2), torch.ones(1, 1), 1.0, 1.6)
    assert loss.values.item() == pytest.approx(-2.924234, abs=1e-5)
    assert loss.slopes.item() == pytest.approx(-1.572895, abs=1e-5)


def test_vanilla_by_hand():
    log_ratio = torch.tensor([[2 * LOG2, LOG2, 0.0, -LOG2]])
    negative = vanilla_loss(log_ratio, torch.full((1, 4), -2.0), 0.2, 0.2, 3.0)
    # A = -2: ratio 4 is held at c = 3 and stops; 2 and 1 pass; 1/2 is clipped to 0.8.
    torch.testing.assert_close(negative.values, torch.tensor([[6.0, 4.0, 2.0, 1.6]]))
    torch.testing.assert_close(negative.slopes, torch.tensor([[0.0, 4.0, 2.0, 0.0]]))
    positive = vanilla_loss(log_ratio, torch.ones(1, 4), 0.2, 0.2, 3.0)
    # A = 1: the second clip does not concern it.
    torch.testing.assert_close(positive.values, torch.tensor([[-1.2, -1.2, -1.0, -0.5]]))
    torch.testing.assert_close(positive.slopes, torch.tensor([[0.0, 0.0, -1.0, -0.5]]))


def _gspo_equation(log_prob, old, advantages, mask):
    lengths = mask.sum(-1, keepdim=True)
    mean = ((log_prob - old) * mask).sum(-1, keepdim=True).detach() / lengths
    ratio = (mean + log_prob - log_prob.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)


def _sapo_equation(log_prob, old, advantages, mask):
    tau = torch.where(advantages > 0, 1.0, 1.05)
    return -torch.sigmoid(tau * ((log_prob - old).exp() - 1)) * 4 / tau * advantages


@pytest.mark.parametrize(
    ("equation", "loss"),
    [
        (_gspo_equation, lambda ratio, a, mask: gspo_loss(ratio, a, mask, 0.1, 0.2)),
        (_sapo_equation, lambda ratio, a, mask: sapo_loss(ratio, a, 1.0, 1.05)),
    ],
)
def test_values_and_slopes_are_those_of_the_equation(equation, loss):
    generator = torch.Generator().manual_seed(0)
    shape = (32, 6)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    log_prob = old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 7, (32, 1), generator=generator)
    mask = torch.arange(6) < lengths
    advantages = torch.randn((32, 1), generator=generator, dtype=torch.float64).expand(shape)
    leaf = log_prob.clone().requires_grad_()
    expected = equation(leaf, old, advantages, mask)
    (gradient,) = torch.autograd.grad((expected * mask).sum(), leaf)
    found = loss(torch.where(mask, log_prob - old, 0.0), advantages * mask, mask)
    torch.testing.assert_close(found.values[mask], expected.detach()[mask])
    torch.testing.assert_close(found.slopes * mask, gradient)


def test_aggregations_by_hand():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    loss = torch.tensor([[1.0, 2.0, 3.0, 99.0], [10.0, 99.0, 99.0, 99.0]])

    def value(mode, factor=None):
        return float((token_weights(mask, mode, factor) * loss).sum())

    assert value("token-mean") == pytest.approx(16 / 4)
    assert value("seq-mean-token-mean") == pytest.approx((6 / 3 + 10) / 2)
    assert value("seq-mean-token-sum-norm", 8) == pytest.approx((6 + 10) / (2 * 8))
    assert value("seq-mean-token-sum-norm") == pytest.approx((6 + 10) / (2 * 4))
