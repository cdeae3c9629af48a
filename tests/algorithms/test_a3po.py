import re

import pytest
import torch

from hpo_verl.algorithms import a3po as module
from hpo_verl.algorithms.a3po import A3POSettings, lowest
from hpo_verl.algorithms.base import Rollout
from hpo_verl.errors import ConfigError

NAN = float("nan")
# Rewards 1, 0 and 0.5 of one prompt, without the deviation: A = 0.5, -0.5 and 0.
REWARDS = torch.tensor([1.0, 0.0, 0.5])
LOG_PROB = torch.tensor(
    [
        [-1.0, -5.0, -0.1, -4.0, -3.0, NAN],
        [-1.0, -5.0, -0.1, -4.0, -3.0, -0.2],
        [-1.0, -5.0, NAN, NAN, NAN, NAN],
    ]
)
MASK = ~LOG_PROB.isnan()


def shaped(progress=0.0, log_prob=LOG_PROB, **changes):
    live = torch.ones(3, dtype=torch.bool)
    extras = {"old_log_prob": log_prob, "progress": progress}
    rollout = Rollout(REWARDS, torch.zeros(3, dtype=torch.int64), live, MASK, False, extras)
    return module.shaped_advantages(rollout, A3POSettings(**changes))


def test_by_hand():
    # 0.2 of five tokens and of six, rounded down, is one: -5 of the success, -0.1 of the failure.
    result = shaped()
    assert result.values.dtype == torch.float64
    assert result.values.tolist() == [
        [0.5, 1.0, 0.5, 0.5, 0.5, 0.0],
        [-0.5, -0.5, -1.0, -0.5, -0.5, -0.5],
        [0.0] * 6,
    ]
    assert result.statistics == {"a3po_positive_scale": 2.0, "a3po_negative_scale": 2.0}


def test_shares_and_scales_of_either_sign():
    # 0.5 of five is two, 0.35 of six is two: -5, -4 and -0.1, -0.2.
    values = shaped(
        positive_share=0.5, positive_scale=3, negative_share=0.35, negative_scale=0.5
    ).values
    assert values[0].tolist() == [0.5, 1.5, 0.5, 1.5, 0.5, 0.0]
    assert values[1].tolist() == [-0.5, -0.5, -0.25, -0.5, -0.5, -0.25]


@pytest.mark.parametrize(("progress", "scale"), [(0.0, 2.0), (0.25, 1.75), (1.0, 1.0)])
def test_the_scales_reach_one_at_the_last_step(progress, scale):
    result = shaped(progress)
    assert result.values[0, 1] == 0.5 * scale
    assert result.values[1, 2] == -0.5 * scale
    assert result.statistics["a3po_negative_scale"] == scale
    constant = shaped(progress, decay="none")
    assert torch.equal(constant.values, shaped(0.0).values)


def test_scales_of_one_change_nothing():
    values = shaped(positive_scale=1.0, negative_scale=1.0).values
    assert torch.equal(values, torch.tensor([[0.5], [-0.5], [0.0]]).double() * MASK)


@pytest.mark.parametrize("dead", [NAN, float("inf"), -float("inf"), 1e9])
def test_masked_log_probabilities_change_nothing(dead):
    other = shaped(log_prob=LOG_PROB.masked_fill(~MASK, dead))
    assert torch.equal(other.values, shaped().values)


def test_all_outputs_of_a_session_are_shaped_by_their_own_tokens():
    rollout = Rollout(
        REWARDS, torch.zeros(3, dtype=torch.int64), torch.tensor([False, True, True]), MASK, False,
        {"old_log_prob": LOG_PROB, "progress": 0.0}, None, torch.tensor([1, 1, 2]),
    )  # fmt: skip
    # Sessions: reward 0 with two outputs, and 0.5; A = -0.25 and 0.25.
    values = module.shaped_advantages(rollout, A3POSettings()).values
    assert values[0].tolist() == [-0.25, -0.25, -0.5, -0.25, -0.25, 0.0]
    assert values[2].tolist() == [0.25, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_lowest_of_every_row():
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4])
    chosen = lowest(values, mask, torch.tensor([0.5, 0.1, 1.0]).double())
    # Ties go to the earlier token; a row has one at least, unless none is live.
    assert chosen.nonzero().tolist() == [[0, 1], [0, 2], [1, 1]]
    first = lowest(torch.zeros(1, 5), torch.ones(1, 5).bool(), torch.tensor([0.4]).double())
    assert first.nonzero().tolist() == [[0, 0], [0, 1]]


def test_defaults_are_those_of_the_authors_scripts():
    assert A3POSettings() == A3POSettings(0.2, 2.0, 0.2, 2.0, "linear")


@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("value", [-0.1, NAN, "1", None, True])
def test_settings_out_of_range_are_refused_by_their_path(sign, value):
    for name, permitted in ((f"{sign}_share", "(0, 1]"), (f"{sign}_scale", "[0, inf)")):
        message = f"algorithm.a3po.{name} = {value!r}: must be a number in {permitted}"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            A3POSettings(**{name: value})
    with pytest.raises(ConfigError, match=r"_share = 0: must be a number in \(0, 1\]$"):
        A3POSettings(**{f"{sign}_share": 0})


def test_decay_is_one_of_two_words():
    message = r"^algorithm\.a3po\.decay = 'cosine': must be one of linear, none$"
    with pytest.raises(ConfigError, match=message):
        A3POSettings(decay="cosine")
