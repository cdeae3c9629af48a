"""Sampling: hand-derived draws, restrictions, and the distribution itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.algorithms.base import TokenTemperature
from hpo_verl.verl_plugin.cpu.sampling import adapted, entropies, sample_tokens


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def drawn_from(logits, **restrictions):
    """All tokens that a fine grid of uniforms draws."""
    uniforms = torch.arange(0, 1, 1e-3, dtype=torch.float64)
    token, _ = sample_tokens(logits.expand(len(uniforms), -1), uniforms, **restrictions)
    return set(token.tolist())


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.0, 0), (0.49, 0), (0.5, 1), (0.79, 1), (0.8, 3), (0.999999, 3)],
)
def test_inverts_the_cumulative_distribution_and_skips_impossible_tokens(uniform, expected):
    logits = logits_of(0.5, 0.3, 0.0, 0.2)
    token, log_prob = sample_tokens(logits, torch.tensor([uniform]))
    assert token.item() == expected
    assert log_prob.item() == pytest.approx(math.log([0.5, 0.3, 0, 0.2][expected]), rel=1e-6)


def test_temperature_divides_the_logits():
    logits = logits_of(0.8, 0.2)
    _, log_prob = sample_tokens(logits, torch.tensor([0.0]), temperature=2.0)
    # sqrt(.8) : sqrt(.2) = 2 : 1
    assert log_prob.item() == pytest.approx(math.log(2 / 3), rel=1e-6)


def test_greedy_takes_the_first_maximum_and_reports_its_probability_at_temperature_1():
    logits = logits_of(0.2, 0.4, 0.4)
    token, log_prob = sample_tokens(logits, torch.tensor([0.99]), temperature=0.0)
    assert token.item() == 1
    assert log_prob.item() == pytest.approx(math.log(0.4), rel=1e-6)


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [
        (1, {1}),
        (2, {1, 2}),
        (3, {0, 1, 2, 3}),
        (4, {0, 1, 2, 3}),
        (0, {0, 1, 2, 3}),
        (99, {0, 1, 2, 3}),
    ],
)
def test_top_k_keeps_ties_with_the_kth(top_k, kept):
    logits = logits_of(0.15, 0.45, 0.25, 0.15)
    assert drawn_from(logits, top_k=top_k) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    logits = logits_of(0.3, 0.2, 0.5)
    assert drawn_from(logits, top_p=top_p) == kept


def test_top_p_works_within_top_k():
    # Within the top 2, .5 and .3 become .625 and .375: the first alone reaches .6.
    assert drawn_from(logits_of(0.5, 0.3, 0.2), top_k=2, top_p=0.6) == {0}


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.1, 0.6, 0.3])
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, _ = sample_tokens(probability.log().expand(40_000, 3), uniforms)
    observed = torch.bincount(token, minlength=3) / 40_000
    # Four standard errors of the largest share.
    torch.testing.assert_close(observed, probability, atol=4 * 0.00245, rtol=0)


def test_a_large_vocabulary_in_float32_is_drawn_as_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 150_001, generator=generator)
    uniforms = torch.rand(64, 4, dtype=torch.float64, generator=generator)
    exact = logits.double().softmax(-1)
    ends = exact.cumsum(-1)
    for uniform in uniforms:
        token, log_prob = sample_tokens(logits, uniform)
        end = ends.gather(-1, token[:, None]).squeeze(-1)
        probability = exact.gather(-1, token[:, None]).squeeze(-1)
        assert bool((uniform <= end + 1e-6).all())
        assert bool((uniform >= end - probability - 1e-6).all())
        torch.testing.assert_close(log_prob.double(), probability.log(), atol=1e-5, rtol=0)


def test_logits_that_are_no_numbers_draw_a_token_of_the_vocabulary():
    token, log_prob = sample_tokens(torch.full((1, 40), torch.nan), torch.tensor([0.5]))
    assert 0 <= token.item() < 40
    assert log_prob.isnan()


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(-1, 12),
    top_p=st.floats(0.01, 1),
)
def test_a_drawn_token_is_always_permitted(logits, uniform, temperature, top_k, top_p):
    row = torch.tensor([logits])
    token, log_prob = sample_tokens(
        row,
        torch.tensor([uniform], dtype=torch.float64),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    assert 0 <= token.item() < len(logits)
    assert torch.isfinite(log_prob).all()
    assert log_prob.item() <= 1e-6


# ---------------------------------------------------------------- temperature per token


def test_entropies_are_those_of_the_rows():
    # 300 equal tokens are more than a chunk; an impossible token has no mass.
    logits = torch.zeros(2, 300, dtype=torch.float64)
    logits[1, 2:] = -torch.inf
    logits[1, 0] = math.log(3.0)
    two = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert entropies(logits).tolist() == pytest.approx([math.log(300), two], rel=1e-12)


def test_the_factor_is_linear_in_the_log_entropy_on_either_side_of_the_pivot():
    rule = TokenTemperature(scale=0.5, pivot=0.0, low=-2.0, high=4.0)
    entropy = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 4.0, 9.0]).double().exp()
    expected = [0.5, 0.5, 0.75, 1.0, 1.125, 1.5, 1.5]
    assert adapted(entropy, rule).tolist() == pytest.approx(expected, rel=1e-6)
    assert adapted(torch.zeros(1), rule).tolist() == [0.5]
    unknown = rule._replace(low=0.0, high=0.0)
    assert adapted(entropy, unknown).tolist() == [1.0] * 7


def test_every_row_is_sampled_at_its_own_temperature():
    # Entropies of 2 tokens: log 2 at (1/2, 1/2), less at (4/5, 1/5), where T is halved: 16 : 1.
    logits = torch.cat([logits_of(0.5, 0.5), logits_of(0.8, 0.2)])
    pivot = math.log(math.log(2))
    rule = TokenTemperature(0.5, pivot, pivot - 1e-6, pivot + 1.0)
    token, log_prob = sample_tokens(logits, torch.tensor([0.0, 0.0]), by_token=rule)
    assert token.tolist() == [0, 0]
    assert log_prob.tolist() == pytest.approx([math.log(1 / 2), math.log(16 / 17)], rel=1e-5)
    # The request's own temperature comes first: at T = 2 they are 2 : 1, and halved 4 : 1.
    _, log_prob = sample_tokens(logits, torch.tensor([0.0, 0.0]), 2.0, by_token=rule)
    assert log_prob[1].item() == pytest.approx(math.log(4 / 5), rel=1e-5)
    greedy = sample_tokens(logits, torch.tensor([0.9, 0.9]), 0.0, by_token=rule)
    assert greedy[1].tolist() == pytest.approx([math.log(0.5), math.log(0.8)], rel=1e-6)
