import re
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    get_adv_estimator_fn,
)

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin import advantages as adapter
from hpo_verl.verl_plugin.advantages import register
from hpo_verl.verl_plugin.estimator_input import group_codes

BOTH = pytest.mark.parametrize("name", ["hpo", "a_hpo"])


def estimate(name, rewards, uids, config=None, mask=None, width=4, **kwargs):
    """Call the registered estimator as verl does, the reward at the last token."""
    if not isinstance(rewards, torch.Tensor):
        column = torch.tensor(rewards, dtype=torch.float32)
        rewards = torch.zeros(len(column), width)
        rewards[:, -1] = column
    mask = torch.ones_like(rewards) if mask is None else mask
    advantages, returns = get_adv_estimator_fn(name)(
        token_level_rewards=rewards,
        response_mask=mask,
        config={} if config is None else config,
        index=uids,
        **kwargs,
    )
    assert returns is advantages
    return advantages


@BOTH
def test_registering_twice_changes_nothing(name):
    before = get_adv_estimator_fn(name)
    register(core_algos)
    assert get_adv_estimator_fn(name) is before


def test_hand_derived_numbers():
    uids = np.array(list("aaaabb"), dtype=object)
    rewards = [1.0, 0.0, 0.0, 0.0, 0.7, 0.7]
    fixed = estimate("hpo", rewards, uids)
    assert fixed.dtype == torch.float32
    torch.testing.assert_close(
        fixed[:, 0], torch.tensor([1.5, -0.3, -0.3, -0.3, 0, 0]), rtol=1e-5, atol=0
    )
    assert torch.equal(fixed, fixed[:, :1].expand(6, 4))
    adaptive = estimate("a_hpo", rewards, uids)[:, 0]
    torch.testing.assert_close(
        adaptive, torch.tensor([1.5, -1 / 6, -1 / 6, -1 / 6, 0, 0]), rtol=1e-5, atol=0
    )


@BOTH
@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b", "a", "b"],
        [3, 7, 3, 7],
        [(1, "x"), (2, "x"), (1, "x"), (2, "x")],
        [None, 1.5, None, 1.5],
        [frozenset({1}), "y", frozenset({1}), "y"],
    ],
)
def test_uids_may_be_interleaved_and_of_any_hashable_type(name, labels):
    uids = np.empty(4, dtype=object)
    uids[:] = labels
    rewards = [1.0, 5.0, 0.0, 3.0]
    expected = estimate(name, [1.0, 0.0, 5.0, 3.0], ["p", "p", "q", "q"])[[0, 2, 1, 3]]
    assert torch.equal(estimate(name, rewards, uids), expected)
    assert torch.equal(estimate(name, rewards, labels), expected)


@BOTH
def test_uids_as_number_arrays_and_tensors(name):
    expected = estimate(name, [1.0, 0.0, 1.0], ["p", "p", "q"])
    for uids in (np.array([9, 9, -1]), torch.tensor([9, 9, -1]), np.array(["x", "x", "y"])):
        assert torch.equal(estimate(name, [1.0, 0.0, 1.0], uids), expected)


def test_codes_follow_the_order_of_appearance():
    assert group_codes(["z", "a", "z", "b"], 4)[0].tolist() == [0, 1, 0, 2]
    assert group_codes([], 0)[0].dtype == torch.int64


@BOTH
def test_missing_unhashable_and_too_few_uids_are_refused(name):
    with pytest.raises(DataError, match=f"^{name}: uid is missing"):
        estimate(name, [1.0, 0.0], None)
    with pytest.raises(DataError, match=r"^uid: labels must be hashable"):
        estimate(name, [1.0, 0.0], [["a"], ["a"]])
    with pytest.raises(DataError, match=r"^uid: 1 labels for 2 responses$"):
        estimate(name, [1.0, 0.0], ["a"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_masks_of_every_type_give_the_same(name, dtype):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    advantages = estimate(name, [1.0, 0.0], ["a", "a"], mask=mask.to(dtype))
    assert (advantages[0, 2:] == 0).all()
    assert (advantages[0, :2] > 0).all()
    assert (advantages[1] < 0).all()
    assert torch.equal(advantages, estimate(name, [1.0, 0.0], ["a", "a"], mask=mask.bool()))


@BOTH
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, -0.3, 1.0])
@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(name, reward, size):
    assert (estimate(name, [reward] * size, ["a"] * size) == 0).all()


@BOTH
@pytest.mark.parametrize("zero_advantage", ["ignore", "negative"])
@pytest.mark.parametrize("padding_reward", [0.0, 1.0, float("nan")])
def test_padding_rows_count_for_nothing(name, zero_advantage, padding_reward):
    config = {"hpo": {"zero_advantage": zero_advantage}}
    rewards, uids = [1.0, 0.0, 0.0, 0.0, 0.0], ["a", "a", "a", "b", "b"]
    alone = estimate(name, rewards, uids, config)
    mask = torch.ones(8, 4)
    mask[5:] = 0
    # verl gives its padding rows one fresh uid.
    padded = estimate(name, rewards + [padding_reward] * 3, [*uids, *["pad0"] * 3], config, mask)
    assert torch.equal(padded[:5], alone)
    assert (padded[5:] == 0).all()


@BOTH
def test_rewards_are_summed_over_the_response(name):
    spread = torch.tensor([[0.25, 0.25, 0.5], [0.0, 0.0, 0.0], [0.0, 2.0, -1.0]])
    torch.testing.assert_close(
        estimate(name, spread, ["a"] * 3),
        estimate(name, [1.0, 0.0, 1.0], ["a"] * 3, width=3),
    )


@BOTH
def test_a_reward_at_a_masked_last_token_counts(name):
    # A multi-turn response may end with a tool's tokens; verl puts the reward there.
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    advantages = estimate(name, [1.0, 0.0], ["a", "a"], mask=mask)
    assert advantages[0, 0] > 0 > advantages[1, 0]


@BOTH
def test_a_response_may_start_with_a_masked_token(name):
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    advantages = estimate(name, [1.0, 0.0], ["a", "a"], mask=mask)
    assert advantages[0, 1] > 0 > advantages[1, 3]
    assert (advantages[:, 0] == 0).all()


@BOTH
def test_what_is_not_finite_at_masked_tokens_is_ignored(name):
    rewards = torch.tensor([[0.0, 1.0, float("nan")], [0.0, 0.0, float("inf")]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    expected = estimate(name, rewards.nan_to_num(0, 0), ["a", "a"], mask=mask)
    assert torch.equal(estimate(name, rewards, ["a", "a"], mask=mask), expected)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_live_reward_that_is_not_finite_is_refused(name, bad):
    rewards = torch.zeros(2, 3)
    rewards[1, 2] = bad
    with pytest.raises(
        DataError,
        match=r"^token_level_rewards: 1 of 6 live values are not finite, the first at \(1, 2\)",
    ):
        estimate(name, rewards, ["a", "a"])


@BOTH
def test_shapes_must_agree(name):
    with pytest.raises(DataError, match=r"token_level_rewards \(2, 3\).*response_mask \(2, 4\)"):
        estimate(name, torch.zeros(2, 3), ["a", "a"], mask=torch.ones(2, 4))


@BOTH
def test_an_empty_batch(name):
    assert estimate(name, torch.zeros(0, 4), []).shape == (0, 4)


@BOTH
def test_the_inputs_are_not_changed_and_no_gradient_flows(name):
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    before = rewards.detach().clone()
    advantages = estimate(name, rewards, ["a", "a"])
    assert not advantages.requires_grad
    assert torch.equal(rewards.detach(), before)


def test_half_precision_rewards_are_computed_in_float32():
    rewards = torch.tensor([[0.1, 0.6], [0.0, 0.0]])
    wide = estimate("a_hpo", rewards.bfloat16().float(), ["a", "a"])
    assert torch.equal(estimate("a_hpo", rewards.bfloat16(), ["a", "a"]), wide)


# ---------------------------------------------------------------- settings

FORMS = pytest.mark.parametrize(
    "wrap", [dict, OmegaConf.create, lambda c: None if not c else OmegaConf.create(c)]
)


@FORMS
def test_absent_settings_are_the_defaults(wrap):
    rewards, uids = [1.0, 0.0, 0.0], ["a"] * 3
    assert torch.equal(
        estimate("hpo", rewards, uids, wrap({})),
        estimate("hpo", rewards, uids, {"hpo": {"alpha": 0.6}}),
    )
    assert torch.equal(
        estimate("a_hpo", rewards, uids, wrap({})),
        estimate("a_hpo", rewards, uids, {"hpo": {"alpha_min": 0.1, "zero_advantage": "ignore"}}),
    )


def test_verls_own_dataclass_means_the_defaults():
    rewards, uids = [1.0, 0.0, 0.0], ["a"] * 3
    assert torch.equal(
        estimate("a_hpo", rewards, uids, AlgoConfig()), estimate("a_hpo", rewards, uids)
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hpo", {"alpha": 1.5}, "algorithm.hpo.alpha = 1.5: must be a number in [0, 1]"),
        ("hpo", {"alpha": float("nan")}, "algorithm.hpo.alpha = nan: must be a number in [0, 1]"),
        ("hpo", {"alpha": "high"}, "algorithm.hpo.alpha = 'high': must be a number in [0, 1]"),
        ("hpo", {"alpha_min": 0.1}, "algorithm.hpo.alpha_min = 0.1: unknown setting"),
        ("a_hpo", {"alpha": 0.6}, "algorithm.hpo.alpha = 0.6: unknown setting"),
        ("a_hpo", {"alpha_min": -1}, "algorithm.hpo.alpha_min = -1: must be a number in [0, 1]"),
        ("a_hpo", {"alhpa_min": 0.1}, "did you mean algorithm.hpo.alpha_min?"),
        ("a_hpo", {"zero_advantage": "yes"}, "must be one of ignore, negative"),
        ("a_hpo", 0.5, "algorithm.hpo = 0.5: must be a mapping"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_bad_settings_name_key_value_and_range(name, settings, message, wrap):
    with pytest.raises(ConfigError, match=re.escape(message)):
        estimate(name, [1.0, 0.0], ["a", "a"], wrap({"hpo": settings}))


@BOTH
def test_normalisation_by_the_standard_deviation_can_be_switched_off(name):
    config = {"norm_adv_by_std_in_grpo": False, "hpo": {}}
    advantages = estimate(name, [1.0, 0.0, 0.0, 0.0], ["a"] * 4, config)
    assert advantages[0, 0].item() == 0.75
    with pytest.raises(ConfigError, match=r"algorithm\.norm_adv_by_std_in_grpo = 'no'"):
        estimate(name, [1.0, 0.0], ["a", "a"], {"norm_adv_by_std_in_grpo": "no"})


@BOTH
def test_baselines_of_remax_are_ignored_and_other_keywords_refused(name):
    estimate(name, [1.0, 0.0], ["a", "a"], reward_baselines=torch.zeros(2))
    with pytest.raises(TypeError, match="unexpected keyword"):
        estimate(name, [1.0, 0.0], ["a", "a"], values=torch.zeros(2))


# ---------------------------------------------------------------- verl's own

batches = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, 0.25, -2.0])), min_size=2, max_size=48
)


@given(batches)
@settings(max_examples=60, deadline=None)
def test_alpha_one_agrees_with_verls_grpo_where_groups_are_larger_than_one(rows):
    uids = [str(uuid.UUID(int=code)) for code, _ in rows]
    rewards = torch.zeros(len(rows), 3)
    rewards[:, 2] = torch.tensor([reward for _, reward in rows])
    mask = torch.ones(len(rows), 3)
    ours = estimate("hpo", rewards, uids, {"hpo": {"alpha": 1.0}})
    theirs, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, np.array(uids, dtype=object))
    alone = torch.tensor([uids.count(uid) == 1 for uid in uids])
    torch.testing.assert_close(ours[~alone], theirs[~alone], rtol=1e-5, atol=1e-5)
    assert (ours[alone] == 0).all()


@BOTH
def test_t8_the_order_of_responses_does_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (64,), generator=generator).float()
    uids = np.array([f"u{i // 8}" for i in range(64)], dtype=object)
    order = torch.randperm(64, generator=generator)
    plain = estimate(name, rewards.tolist(), uids)
    shuffled = estimate(name, rewards[order].tolist(), uids[order.numpy()])
    assert torch.equal(shuffled, plain[order])


@BOTH
def test_a_wider_response_changes_nothing(name):
    narrow = estimate(name, [1.0, 0.0, 0.0], ["a"] * 3, width=2)
    wide = estimate(name, [1.0, 0.0, 0.0], ["a"] * 3, width=9)
    assert torch.equal(narrow[:, 0], wide[:, 0])


def test_verls_own_trainer_is_told_once_where_alpha_is_logged(monkeypatch, caplog):
    """One prompt, one success among four: 1 positive, 3 negatives, so alpha is 1/3."""
    monkeypatch.setattr(adapter, "_told", set())
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    for _ in range(2):
        adapter.ESTIMATORS["a_hpo"](rewards, torch.ones(4, 1), {}, index=["a"] * 4)
    (record,) = caplog.records
    assert "a_hpo: alpha = 0.333 in this batch" in record.message
    assert "trainer.v1.trainer_mode=hpo_sync logs hpo/alpha" in record.message
