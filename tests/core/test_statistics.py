import pytest
import torch

from hpo_verl.core.statistics import batch_statistics, token_means, token_sums

BATCH = {
    "alpha": 0.5,
    "positives": 1,
    "negatives": 2,
    "zero_spread_groups": 1,
    "groups": 4,
    "rewards": torch.tensor([1.0, 0.0, -1.0, 9.0, 0.5]),
    "live": torch.tensor([True, True, True, False, True]),
    "lengths": torch.tensor([10, 20, 40, 0, 7]),
    "advantages": torch.tensor([2.0, -0.5, -0.25, 0.0, 0.0]),
    "unweighted": torch.tensor([2.0, -1.0, -0.5, 0.0, 0.0]),
}


def test_hand_derived_numbers():
    assert batch_statistics(**BATCH) == {
        "alpha": 0.5,
        "positive_fraction": 0.25,
        "negative_fraction": 0.5,
        "zero_spread_group_fraction": 0.25,
        "solve_rate": 0.5,
        "response_length_positive": 10.0,
        "response_length_negative": 30.0,
        "advantage_mass_negative_over_positive": 1.0,  # (10 + 10) / 20
        "advantage_mass_negative_over_positive_before_weighting": 2.0,
    }


def test_a_weight_of_zero_keeps_the_lengths_of_the_negatives():
    removed = BATCH | {"alpha": 0.0, "advantages": BATCH["unweighted"].clamp(min=0)}
    result = batch_statistics(**removed)
    assert result["response_length_negative"] == 30.0
    assert result["advantage_mass_negative_over_positive"] == 0.0


def test_small_advantages_have_a_sign_as_well():
    small = BATCH | {"unweighted": BATCH["unweighted"] * 1e-3}
    result = batch_statistics(**small)
    assert result["response_length_positive"] == 10.0
    assert result["response_length_negative"] == 30.0


def test_a_batch_of_nothing_gives_zeros():
    empty = BATCH | {
        "positives": 0,
        "negatives": 0,
        "zero_spread_groups": 0,
        "groups": 0,
        "live": torch.zeros(5, dtype=torch.bool),
        "lengths": torch.zeros(5),
        "advantages": torch.zeros(5),
        "unweighted": torch.zeros(5),
    }
    result = batch_statistics(**empty)
    assert result.pop("alpha") == 0.5
    assert set(result.values()) == {0.0}


def test_no_key_contains_a_word_that_selects_another_reduction():
    keys = list(batch_statistics(**BATCH)) + list(token_means(token_sums(*tokens())))
    for word in ("min", "max", "sum", "total", "avg", "_lr"):
        assert not [key for key in keys if word in key]


def tokens():
    ratio = torch.tensor([[1.0, 1.5, 2.0], [0.5, 0.25, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0]])
    gradient = torch.tensor([[-1.0, 0.0, 5.0], [3.0, 0.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return ratio, advantages, gradient, mask


def test_sums_over_tokens_are_split_by_sign():
    assert token_sums(*tokens()) == {
        "tokens_positive": 2.0,
        "ratio_positive": 2.5,
        "clipped_positive": 1.0,
        "gradient_positive": 1.0,
        "tokens_negative": 2.0,
        "ratio_negative": 0.75,
        "clipped_negative": 1.0,
        "gradient_negative": 3.0,
    }


def test_every_stopped_token_is_counted_and_no_other():
    gradient = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    signs = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    sums = token_sums(torch.ones(2, 3), signs, gradient, torch.ones(2, 3).bool())
    assert (sums["clipped_positive"], sums["clipped_negative"]) == (3.0, 0.0)


def test_small_parts_are_not_lost_beside_large_ones():
    values = torch.tensor([[1e9, 1.0]])
    sums = token_sums(values, torch.ones(1, 2), values, torch.ones(1, 2).bool())
    assert sums["ratio_positive"] == sums["gradient_positive"] == 1e9 + 1


def test_what_stands_at_masked_places_does_not_matter():
    ratio, advantages, gradient, mask = tokens()
    expected = token_sums(ratio, advantages, gradient, mask)
    for tensor in (ratio, advantages, gradient):
        tensor[~mask] = float("nan")
    assert token_sums(ratio, advantages, gradient, mask) == expected


def test_means_of_summed_parts_are_the_means_of_the_whole():
    parts = [token_sums(*(tensor[row : row + 1] for tensor in tokens())) for row in range(2)]
    total = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert token_means(total) == token_means(token_sums(*tokens()))


def test_means_over_tokens():
    assert token_means(token_sums(*tokens())) == {
        "ratio_positive": 1.25,
        "clipped_fraction_positive": 0.5,
        "gradient_weight_positive": 1.0,
        "ratio_negative": 0.375,
        "clipped_fraction_negative": 0.5,
        "gradient_weight_negative": 3.0,
    }


def test_means_without_tokens_are_zero():
    ratio, advantages, gradient, mask = tokens()
    result = token_means(token_sums(ratio, advantages * 0, gradient, mask))
    assert set(result.values()) == {0.0}


def test_fractions_use_the_live_responses():
    assert batch_statistics(**BATCH | {"positives": 4})["positive_fraction"] == pytest.approx(1.0)
