import pytest
import torch

from hpo_verl.core.signs import positive_negative_ratio, weight_negatives


@pytest.mark.parametrize(
    ("positives", "negatives", "low", "expected"),
    [
        (1, 9, 0.1, 1 / 9),  # success .1
        (2, 8, 0.1, 0.25),  # .2
        (3, 7, 0.1, 3 / 7),  # .3
        (3, 5, 0.1, 0.6),  # .375, the best fixed weight of the paper
        (5, 5, 0.1, 1.0),  # .5
        (9, 1, 0.1, 1.0),  # bounded above
        (1, 31, 0.1, 0.1),  # bounded below
        (1, 31, 0.0, 1 / 31),
        (0, 5, 0.1, 0.1),
        (0, 5, 0.0, 0.0),
        (0, 0, 0.1, 1.0),  # nothing to damp
        (4, 0, 0.1, 1.0),
        (0, 1, 0.3, 0.3),
    ],
)
def test_ratio_of_counts(positives, negatives, low, expected):
    assert positive_negative_ratio(positives, negatives, low) == pytest.approx(expected, abs=1e-15)


def test_only_negatives_are_weighted():
    advantages = torch.tensor([2.0, -2.0, 0.0, -1e-9])
    weighted = weight_negatives(advantages, 0.25)
    torch.testing.assert_close(weighted, torch.tensor([2.0, -0.5, 0.0, -0.25e-9]), rtol=0, atol=0)


def test_alpha_one_changes_nothing_and_zero_removes_negatives():
    advantages = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight_negatives(advantages, 1.0), advantages)
    assert torch.equal(weight_negatives(advantages, 0.0), advantages.clamp(min=0))
