"""Masks, padding, order and types: the same for every estimator of ours."""

import functools

import pytest
import torch
from estimator_calls import NAMED, PER_OUTPUT, call, named_rewards, token_rewards

from hpo_verl.algorithms.registry import OUR_ESTIMATORS
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.estimator_input import TOKEN_VALUES

EVERY = pytest.mark.parametrize("name", OUR_ESTIMATORS)
UIDS = list("aaaabbbbcc")
# Distinct advantages, so that nothing depends on how ties are broken.
DISTINCT = [1.0, 0.0, 0.1, 0.3, 0.9, 0.8, 0.0, 0.2, 0.5, 0.5]
BINARY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
LENGTHS = torch.tensor([4, 2, 3, 1, 4, 4, 2, 3, 1, 4])
MASK = torch.arange(4) < LENGTHS[:, None]
NAN, INF = float("nan"), float("inf")


def provided(rows=10, width=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "entropy": torch.rand(rows, width, generator=generator),
        "old_log_prob": -torch.rand(rows, width, generator=generator),
        "progress": 0.5,
        "memory": {},
        "values": {"a": 0.3, "b": 0.6, "c": 0.5},
        **named_rewards(rows),
    }


@functools.cache
def rewards_of(name):
    """Distinct ones, or of two values where the estimator takes no others."""
    try:
        call(name, DISTINCT, UIDS, mask=MASK, provided=provided())
    except DataError:
        return BINARY
    return DISTINCT


def estimate(name, rewards=None, uids=UIDS, mask=MASK, given=None, **kwargs):
    rewards = rewards_of(name) if rewards is None else rewards
    return call(name, rewards, uids, mask=mask, provided=given or provided(), **kwargs)


@EVERY
def test_the_result_is_float32_detached_and_zero_at_masked_places(name):
    rewards = token_rewards(rewards_of(name)).requires_grad_()
    before = rewards.detach().clone()
    advantages = estimate(name, rewards)
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad
    assert (advantages[~MASK] == 0).all()
    assert (advantages != 0).any()
    assert torch.equal(rewards.detach(), before)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_masks_of_every_type_give_the_same(name, dtype):
    assert torch.equal(estimate(name, mask=MASK.to(dtype)), estimate(name))


@EVERY
@pytest.mark.parametrize("reward", [0.0, 1.0, NAN])
def test_padding_rows_count_for_nothing(name, reward):
    given = provided()
    for field in TOKEN_VALUES:
        given[field] = torch.cat([given[field], torch.full((3, 4), NAN)])
    for name_of_reward in NAMED:
        given[name_of_reward] = torch.cat([given[name_of_reward], torch.full((3,), NAN)])
    given["output"] = torch.zeros(13, dtype=torch.int64)
    mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)])
    rewards = [*rewards_of(name), *[reward] * 3]
    padded = estimate(name, rewards, [*UIDS, *"ppp"], mask, given)
    assert torch.equal(padded[:10], estimate(name))
    assert (padded[10:] == 0).all()


@EVERY
def test_masked_equals_removed(name):
    given = provided()
    for field in TOKEN_VALUES:
        given[field] = torch.nn.functional.pad(given[field], (0, 3), value=INF)
    wide = torch.nn.functional.pad(MASK, (0, 3))
    rewards = torch.nn.functional.pad(token_rewards(rewards_of(name)), (0, 3), value=NAN)
    assert torch.equal(estimate(name, rewards, mask=wide, given=given)[:, :4], estimate(name))


@EVERY
def test_the_order_of_responses_does_not_matter(name):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    given = provided()
    for field in (*TOKEN_VALUES, *PER_OUTPUT):
        given[field] = given[field][order]
    shuffled = estimate(
        name, token_rewards(rewards_of(name))[order], [UIDS[i] for i in order], MASK[order], given
    )
    torch.testing.assert_close(shuffled, estimate(name)[order], rtol=1e-6, atol=0)


@EVERY
def test_narrow_types_are_computed_wide(name):
    rewards = token_rewards(rewards_of(name)).bfloat16()
    assert torch.equal(estimate(name, rewards), estimate(name, rewards.float()))


@EVERY
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_live_reward_that_is_not_finite_is_refused_by_name_and_place(name, bad):
    rewards = token_rewards(rewards_of(name))
    rewards[4, 3] = bad
    with pytest.raises(DataError, match=r"^token_level_rewards: 1 of 28 .* the first at \(4, 3\)"):
        estimate(name, rewards)


@EVERY
def test_shapes_and_uids_are_checked(name):
    with pytest.raises(DataError, match=r"token_level_rewards \(10, 4\).*response_mask \(10, 5\)"):
        estimate(name, mask=torch.ones(10, 5))
    with pytest.raises(DataError, match=f"^{name}: uid is missing"):
        estimate(name, uids=None)
    with pytest.raises(DataError, match=r"^uid: 2 labels for 10 responses$"):
        estimate(name, uids=["a", "b"])


@EVERY
def test_an_empty_batch(name):
    assert estimate(name, torch.zeros(0, 4), [], torch.zeros(0, 4), provided(rows=0)).shape == (
        0,
        4,
    )


@EVERY
def test_baselines_of_remax_are_ignored_and_other_keywords_refused(name):
    assert torch.equal(estimate(name, reward_baselines=torch.zeros(10)), estimate(name))
    with pytest.raises(TypeError, match="unexpected keyword"):
        estimate(name, values=torch.zeros(10))


@EVERY
@pytest.mark.parametrize("by_std", [True, False])
def test_a_weight_in_front_multiplies_the_advantages_of_each_sign(name, by_std):
    record, plain = OUR_ESTIMATORS[name], {"norm_adv_by_std_in_grpo": by_std}
    if record.weights_by_sign:
        return
    before = estimate(name, config=plain)
    weight = {"hpo": {"alpha": 0.25, "positive_weight": 2.0}}
    weighted = estimate(name, config=plain | weight)
    # Powers of two: to the bit.
    assert torch.equal(weighted, torch.where(before > 0, 2 * before, before / 4))
    adaptive = estimate(name, config=plain | {"hpo": {"alpha_min": 0.0}})
    of_response = (before * MASK).sum(dim=-1)
    positives, negatives = int((of_response > 0).sum()), int((of_response < 0).sum())
    alpha = min(positives / negatives, 1.0) if negatives else 1.0
    expected = torch.where(before < 0, alpha * before, before)
    torch.testing.assert_close(adaptive, expected, rtol=1e-6, atol=0)
