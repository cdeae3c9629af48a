import re

import pytest
import torch
from token_batches import token_batch

from hpo_verl.algorithms.aspo import ASPOSettings, aspo_loss
from hpo_verl.errors import ConfigError

PATH = "actor_rollout_ref.actor.policy_loss"


def loss_of(ratios, advantage, clip_ratio_c=None, **changes):
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    batch = token_batch(log_ratio, torch.full_like(log_ratio, advantage), (0.2, 0.3))
    if clip_ratio_c is not None:
        batch = batch._replace(clip_ratio_c=clip_ratio_c)
    loss = aspo_loss(batch, ASPOSettings(**changes))
    return loss.values.tolist(), loss.slopes.tolist()


def test_positive_tokens_by_hand():
    # Weights 1 / r: 0.2 is cut to 3, 0.5 weighs 2, 1.25 weighs 0.8, 1.6 is stopped at 1.3.
    values, slopes = loss_of([0.2, 0.5, 1.0, 1.25, 1.6], 2.0)
    assert values == pytest.approx([-6.0, -4.0, -2.0, -1.6, -2 / 1.3])
    assert slopes == pytest.approx([-6.0, -4.0, -2.0, -1.6, 0.0])


def test_another_limit_of_the_reciprocal():
    _, slopes = loss_of([0.2, 0.5], 1.0, reciprocal_limit=10.0)
    assert slopes == pytest.approx([-5.0, -2.0])
    _, slopes = loss_of([0.2, 0.5], 1.0, reciprocal_limit=1.0)
    assert slopes == pytest.approx([-1.0, -1.0])


def test_negative_tokens_are_ppos():
    values, slopes = loss_of([0.5, 0.9, 2.0, 5.0], -1.0)
    assert values == pytest.approx([0.8, 0.9, 2.0, 5.0])
    assert slopes == pytest.approx([0.0, 0.9, 2.0, 5.0])
    # The dual clip at 3 stops the last; in the public code it keeps the weight 3.
    values, slopes = loss_of([0.5, 0.9, 2.0, 5.0], -1.0, 3.0)
    assert (values[-1], slopes[-1]) == (pytest.approx(3.0), 0.0)
    values, slopes = loss_of([0.5, 0.9, 2.0, 5.0], -1.0, 3.0, repo_compatible=True)
    assert values == pytest.approx([0.8, 0.9, 2.0, 3.0])
    assert slopes == pytest.approx([0.0, 0.9, 2.0, 3.0])


def test_the_public_codes_clip_leaves_positive_tokens_alone():
    given = [0.2, 0.5, 1.6, 5.0]
    assert loss_of(given, 1.0, 3.0, repo_compatible=True) == loss_of(given, 1.0)


@pytest.mark.parametrize("log_ratio", [-20.0, 20.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extremes_stay_finite_in_float32(log_ratio, sign):
    batch = token_batch(torch.tensor([log_ratio]), torch.tensor([sign]), (0.2, 0.2))
    loss = aspo_loss(batch, ASPOSettings())
    assert torch.isfinite(loss.values).all()
    assert torch.isfinite(loss.slopes).all()


def objective(batch, settings):
    """The equation with pi_old = 1; `test_records` compares values and slopes with it."""
    policy, advantages = batch.log_ratio.exp(), batch.advantages
    low, high = 1 - batch.clip_range[0], 1 + batch.clip_range[1]
    turned = policy / policy.detach() ** 2
    kept = torch.where(
        turned > settings.reciprocal_limit,
        settings.reciprocal_limit * policy / policy.detach(),
        torch.where(policy > high, torch.full_like(policy, 1 / high), turned),
    )
    weight = torch.where(advantages > 0, kept, policy.clamp(min=low))
    return -weight * advantages


@pytest.mark.parametrize(
    ("changes", "key", "permitted"),
    [
        ({"reciprocal_limit": 0.9}, "reciprocal_limit", "a number in [1, inf)"),
        ({"reciprocal_limit": float("nan")}, "reciprocal_limit", "a number in [1, inf)"),
        ({"reciprocal_limit": "3"}, "reciprocal_limit", "a number in [1, inf)"),
        ({"repo_compatible": 1}, "repo_compatible", "true or false"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(changes, key, permitted):
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{PATH}.{key} = ')}.*must be ") as caught:
        ASPOSettings(**changes)
    assert permitted in str(caught.value)
