import re
from pathlib import Path

import pytest
import torch
import yaml

from hpo_verl.algorithms import ngrpo as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.ngrpo import NGRPOSettings
from hpo_verl.core.surrogate import clipped_surrogate
from hpo_verl.errors import ConfigError, DataError

RECIPE = Path(__file__).parents[2] / "recipes" / "algo" / "ngrpo.yaml"


def advantages_of(rewards, groups=None, settings=None, live=None, normalize_by_std=True):
    live = torch.tensor([True] * len(rewards) if live is None else live)
    groups = torch.tensor([0] * len(rewards) if groups is None else groups)
    rollout = Rollout(torch.tensor(rewards), groups, live, live[:, None], normalize_by_std)
    settings = NGRPOSettings() if settings is None else settings
    return module.calibrated_advantages(rollout, settings).values


@pytest.mark.parametrize(
    ("rewards", "values"),
    [
        # One of eight: mean 2/9, variance (2 (7/9)^2 + 7 (2/9)^2) / 8 = 7/36; the paper's example.
        ([1.0] + [0.0] * 7, [1.763834] + [-0.503953] * 7),
        # Failures alone: mean 1/3, variance (2/9 + 4/9) / 2 = 1/3.
        ([0.0, 0.0], [-0.577350, -0.577350]),
        ([0.0], [-0.707107]),  # mean 1/2, variance 1/2
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
        ([1.0], [0.0]),
        # Mean 0, variance (1/4 + 1/4 + 4 + 1) / 3 = 11/6; std 1.354006.
        ([0.5, 0.5, -2.0], [0.369274, 0.369274, -1.477098]),
    ],
)
def test_by_hand(rewards, values):
    result = advantages_of(rewards)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx(values, abs=1e-5)
    assert not any(result[torch.tensor(values) == 0.0])


def test_every_group_has_one_virtual_response():
    groups = [5, 0, 5, 0, 0, 2]
    result = advantages_of([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], groups)
    assert result[[0, 2]].tolist() == advantages_of([0.0, 0.0]).tolist()
    assert result[[1, 3, 4]].tolist() == advantages_of([1.0, 0.0, 0.0]).tolist()
    assert result[[5]].tolist() == advantages_of([0.0]).tolist()


def test_without_the_standard_deviation():
    values = advantages_of([1.0, 0.0, 0.0], normalize_by_std=False)
    assert values.tolist() == [0.5, -0.5, -0.5]


@pytest.mark.parametrize("dead", [1.0, 7.0, float("nan")])
def test_rows_that_are_not_live_count_for_nothing(dead):
    values = advantages_of([0.0, 0.0, dead, dead], [0, 0, 0, 1], live=[True, True, False, False])
    assert values.tolist() == [*advantages_of([0.0, 0.0]).tolist(), 0.0, 0.0]


def test_another_largest_reward():
    values = advantages_of([3.0, 1.0], settings=NGRPOSettings(max_reward=3))
    # Mean 7/3, variance 4/3.
    assert values.tolist() == pytest.approx([0.577350, -1.154700], abs=1e-5)
    message = r"^reward 3 of response 1: above algorithm\.ngrpo\.max_reward = 1$"
    with pytest.raises(DataError, match=message):
        advantages_of([1.0, 3.0])


def test_the_recipes_clip_is_that_by_the_sign_of_the_advantage():
    """Values and slopes of `clip_ratio_low` and `_high` against the paper's two ranges."""
    actor = yaml.safe_load(RECIPE.read_text())["actor_rollout_ref"]["actor"]
    low, high = actor["clip_ratio_low"], actor["clip_ratio_high"]
    ratios = torch.tensor([0.5, 0.75, 0.77, 0.83, 0.85, 1.0, 1.15, 1.17, 1.23, 1.25, 3.0]).double()
    log_ratio = ratios.log().repeat(2).requires_grad_()
    advantages = torch.tensor([1.5, -1.5]).double().repeat_interleave(len(ratios))
    bound = torch.where(advantages > 0, 0.24, 0.16).double()
    ratio = log_ratio.exp()
    clipped = torch.minimum(torch.maximum(ratio, 1 - bound), 1 + bound)
    values = -torch.minimum(ratio * advantages, clipped * advantages)
    (slopes,) = torch.autograd.grad(values.sum(), log_ratio)
    found = clipped_surrogate(log_ratio.detach(), advantages, low, high)
    torch.testing.assert_close(found.values, values.detach())
    torch.testing.assert_close(found.slopes, slopes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_largest_reward_out_of_range_is_refused_by_its_path(value):
    message = f"algorithm.ngrpo.max_reward = {value!r}: must be a number in [-inf, inf)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        NGRPOSettings(max_reward=value)
