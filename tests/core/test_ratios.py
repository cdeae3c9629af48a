import pytest
import torch

from hpo_verl.core.ratios import (
    LOG_RATIO_BOUND,
    beyond_bound,
    bound_log_ratio,
    masked_log_ratio,
    response_log_ratio,
)

NAN, INF = float("nan"), float("inf")


def test_log_ratio_at_live_places_and_zero_elsewhere():
    log_prob = torch.tensor([[-1.0, NAN, -INF, INF]])
    old_log_prob = torch.tensor([[-1.5, -1.0, NAN, INF]])
    mask = torch.tensor([[True, False, False, False]])
    log_ratio = masked_log_ratio(log_prob, old_log_prob, mask)
    assert log_ratio.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_the_gradient_at_masked_places_is_zero_even_for_nan():
    log_prob = torch.tensor([[-1.0, NAN]], requires_grad=True)
    masked_log_ratio(log_prob, torch.zeros(1, 2), torch.tensor([[True, False]])).sum().backward()
    assert log_prob.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_narrow_types_are_widened_before_the_difference(given, computed):
    # At -5.3 one unit in the last place of bfloat16 is 1/32.
    log_prob = torch.tensor([[-5.28125]], dtype=given)
    old_log_prob = torch.tensor([[-5.3125]], dtype=given)
    log_ratio = masked_log_ratio(log_prob, old_log_prob, torch.ones(1, 1).bool())
    assert log_ratio.dtype == computed
    assert log_ratio.item() == 0.03125


def test_mixed_types_keep_the_precision_of_the_wider_one():
    log_prob = torch.full((1, 1), -1.0, dtype=torch.bfloat16)
    old_log_prob = torch.full((1, 1), -1.001)
    log_ratio = masked_log_ratio(log_prob, old_log_prob, torch.ones(1, 1).bool())
    assert log_ratio.item() == pytest.approx(0.001, rel=1e-3)


def test_the_bound_is_twenty_nats():
    assert LOG_RATIO_BOUND == 20.0
    log_ratio = torch.tensor([-1e4, -20.5, -20.0, 0.3, 20.0, 20.5, 1e4])
    assert bound_log_ratio(log_ratio).tolist() == pytest.approx(
        [-20, -20, -20, 0.3, 20, 20, 20], rel=1e-6
    )
    assert beyond_bound(log_ratio).tolist() == [True, True, False, False, False, True, True]


def test_the_ratio_of_a_response_is_a_product_or_a_geometric_mean():
    log_ratio = torch.tensor([[0.5, -0.2, 0.0], [0.0, 0.0, 0.0], [-15.0, -15.0, -15.0]])
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    product = response_log_ratio(log_ratio, mask)
    mean = response_log_ratio(log_ratio, mask, per_token=True)
    assert product.flatten().tolist() == pytest.approx([0.3, 0.0, -20.0])
    assert mean.flatten().tolist() == pytest.approx([0.15, 0.0, -15.0])
    assert product.shape == mean.shape == (3, 1)


def test_the_sum_over_a_long_response_is_exact():
    # In float32 16 + 2^-21 is 16 again, whatever the number of terms.
    log_ratio = torch.tensor([[16.0, *[2.0**-21] * 4096, -15.0]])
    assert response_log_ratio(log_ratio, torch.ones_like(log_ratio).bool()).item() == 1 + 2**-9
