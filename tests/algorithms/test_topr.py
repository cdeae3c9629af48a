import math
import re

import pytest
import torch
from token_batches import token_batch

from hpo_verl.algorithms.topr import TOPRSettings, topr_loss
from hpo_verl.errors import ConfigError

PATH = "actor_rollout_ref.actor.policy_loss"


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def loss_of(ratios, advantages, old=None, **changes):
    advantages = torch.tensor(advantages, dtype=torch.float64)[:, None].expand(ratios.shape)
    batch = token_batch(ratios, advantages.clone())
    batch = batch._replace(old_log_prob=torch.zeros_like(ratios) if old is None else old)
    return topr_loss(batch, TOPRSettings(**changes))


# Ratios of whole responses: 0.5 * 0.4 = 0.2 and 2 * 3 = 6.
LOW, HIGH = (0.5, 0.4), (2.0, 3.0)


def test_by_hand():
    # Eq. 8: weights 1, 1 for A = 2; 0.2 and 1 for A = -2.
    loss = loss_of(logs(LOW, HIGH, LOW, HIGH), [2.0, 2.0, -2.0, -2.0])
    assert loss.slopes[:, 0].tolist() == pytest.approx([-2.0, -2.0, 0.4, 2.0])
    assert torch.equal(loss.slopes[:, 0], loss.slopes[:, 1])
    # Values are the slopes times log pi: pi_old = 0.25, so pi = 0.125 and 0.1.
    old = torch.full((1, 2), math.log(0.25), dtype=torch.float64)
    values = loss_of(logs(LOW), [-2.0], old).values
    assert values[0].tolist() == pytest.approx([0.4 * math.log(0.125), 0.4 * math.log(0.1)])


@pytest.mark.parametrize(
    ("changes", "advantage", "low", "high"),
    [
        # TIS: both signs in [0, 1]. REINFORCE: all limits 1. Eq. 7 with further limits.
        ({"positive_low": 0.0}, 1.0, 0.2, 1.0),
        ({"negative_low": 1.0}, -1.0, 1.0, 1.0),
        ({"negative_low": 0.3, "negative_high": 4.0}, -1.0, 0.3, 4.0),
        ({"positive_low": 0.5, "positive_high": 5.0}, 1.0, 0.5, 5.0),
        # The geometric means of the tokens' ratios are sqrt(0.2) and sqrt(6).
        ({"length_normalized": True}, -1.0, math.sqrt(0.2), 1.0),
        ({"length_normalized": True, "negative_high": 9.0}, -1.0, math.sqrt(0.2), math.sqrt(6)),
    ],
)
def test_limits_and_ratio_of_either_sign(changes, advantage, low, high):
    slopes = loss_of(logs(LOW, HIGH), [advantage] * 2, **changes).slopes[:, 0]
    assert (-slopes / advantage).tolist() == pytest.approx([low, high])


def test_masked_tokens_are_in_neither_ratio():
    # 0.5 alone: the other tokens are masked, and 0 as a loss sees them.
    log_ratio = logs((0.5, 1.0, 1.0))
    mask = torch.tensor([[True, False, False]])
    batch = token_batch(log_ratio, torch.tensor([[-1.0, 0.0, 0.0]]))._replace(mask=mask)
    for normalized in (False, True):
        loss = topr_loss(batch, TOPRSettings(length_normalized=normalized))
        assert loss.slopes[0].tolist() == pytest.approx([0.5, 0.0, 0.0])
        assert (loss.values[0, 1:] == 0).all()


def test_on_policy_it_is_reinforce_and_long_responses_stay_finite():
    ones = torch.zeros(2, 3, dtype=torch.float64)
    assert (loss_of(ones, [1.5, -0.5]).slopes[:, 0] == torch.tensor([-1.5, 0.5])).all()
    far = torch.tensor([[-20.0] * 500, [20.0] * 500])
    slopes = loss_of(far, [-1.0, -1.0]).slopes[:, 0]
    assert slopes.tolist() == pytest.approx([math.exp(-20), 1.0])


def objective(batch, settings):
    """Algorithm 1 of the paper; `test_records` compares values and slopes with it."""
    rho = torch.exp(batch.log_ratio.sum(dim=-1, keepdim=True)).detach()
    alpha = torch.where(batch.advantages < 0, torch.minimum(rho, torch.ones_like(rho)), 1.0)
    return -alpha * batch.advantages * (batch.old_log_prob + batch.log_ratio)


@pytest.mark.parametrize(
    ("changes", "key", "permitted"),
    [
        ({"positive_low": -0.1}, "positive_low", "a number in [0, inf)"),
        ({"positive_high": 0.9}, "positive_high", "a number in [1, inf)"),
        ({"negative_low": "0"}, "negative_low", "a number in [0, inf)"),
        ({"negative_low": 1.5}, "negative_high", "a number in [1.5, inf)"),
        ({"negative_high": math.inf}, "negative_high", "a number in [0, inf)"),
        ({"length_normalized": 1}, "length_normalized", "true or false"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(changes, key, permitted):
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{PATH}.{key} = ')}.*must be ") as caught:
        TOPRSettings(**changes)
    assert permitted in str(caught.value)
