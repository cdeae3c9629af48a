"""HAPO's temperature per token: what it remembers of a step, and the rule that follows."""

import math
import re

import pytest
import torch

from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.hapo import (
    HAPOAdvantageSettings,
    token_group_advantages,
    token_temperature,
)
from hpo_verl.errors import ConfigError


def test_the_temperature_follows_the_log_entropies_of_the_last_step():
    settings = HAPOAdvantageSettings(temperature_scale=0.1, temperature_pivot=0.5)
    entropy = torch.tensor([[1.0, 2.0], [4.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    rollout = Rollout(torch.tensor([1.0, 0.0]), torch.zeros(2).long(), mask.any(-1), mask)
    rollout = rollout._replace(extras={"entropy": entropy})
    memory = token_group_advantages(rollout, settings).memory
    rule = token_temperature(memory, settings)
    assert tuple(rule) == pytest.approx((0.1, math.log(2), 0.0, math.log(4)))
    # Nothing is known before, and nothing new without a live token.
    assert tuple(token_temperature({}, settings)) == (0.1, 0.0, 0.0, 0.0)
    nothing = rollout._replace(mask=torch.zeros_like(mask), live=torch.zeros(2).bool())
    assert token_group_advantages(nothing, settings).memory == {}


def test_without_a_scale_there_is_no_temperature_and_no_need():
    assert token_temperature({}, HAPOAdvantageSettings()) is None
    assert HAPOAdvantageSettings().needs == ()
    assert HAPOAdvantageSettings(temperature_scale=0.1).needs == ("entropy",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature_scale": 1.0}, "temperature_scale = 1.0: must be a number in [0, 0.9]"),
        ({"temperature_scale": -0.1}, "temperature_scale = -0.1"),
        ({"temperature_pivot": 1.1}, "temperature_pivot = 1.1"),
    ],
)
def test_bad_temperatures_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"^algorithm\.hapo\.{re.escape(message)}"):
        HAPOAdvantageSettings(**changes)
