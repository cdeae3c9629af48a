"""Estimators that read the entropies of verl's old-policy pass, and who hands these over."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from policy_batches import actor_config as full_actor_config
from policy_batches import evaluate, make_batch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.hapo import HAPOSettings, entropy_deviation
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin import entropy as plugin
from hpo_verl.verl_plugin.config import HAPOPolicyLossConfig
from hpo_verl.verl_plugin.estimator_inputs import borrow, lend
from hpo_verl.verl_plugin.validation import check_trainer_mode

ALL = pytest.mark.parametrize("name", plugin.ESTIMATORS)
UIDS = np.array(list("aaaabb"), dtype=object)
REWARDS = [1.0, 0.0, 0.0, 0.0, 0.7, 0.7]
LENGTHS = torch.tensor([1, 2, 3, 4, 2, 2])
MASK = torch.arange(4) < LENGTHS[:, None]


def entropies(mask=MASK, seed=0):
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))


def estimate(name, config=None, entropy=None, mask=MASK, rewards=REWARDS, uids=UIDS):
    """Call the registered estimator as verl does, the reward at the last token."""
    token_level_rewards = torch.zeros(mask.shape)
    token_level_rewards[torch.arange(len(mask)), mask.sum(-1).long().clamp(min=1) - 1] = (
        torch.tensor(rewards)
    )
    with lend(entropy=entropies(mask) if entropy is None else entropy):
        advantages, returns = get_adv_estimator_fn(name)(
            token_level_rewards=token_level_rewards,
            response_mask=mask,
            config={} if config is None else config,
            index=uids,
        )
    assert returns is advantages
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad
    return advantages


def test_aepo_by_hand():
    # Group a: 1.5 -.5 -.5 -.5; z over the fourteen live tokens.
    entropy = entropies()
    live = entropy[MASK]
    z = (entropy - live.mean()) / live.std()
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0])[:, None] * (1 + 0.2 * z) * MASK
    torch.testing.assert_close(estimate("aepo_advantage"), expected, rtol=1e-5, atol=1e-6)
    config = {"norm_adv_by_std_in_grpo": False, "aepo_advantage": {"entropy_scale": 0.0}}
    plain = torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0])[:, None] * MASK
    torch.testing.assert_close(estimate("aepo_advantage", config), plain)


def test_hapo_by_hand():
    # Group a: one token of reward 1, nine of 0: A = 3 and -1/3.
    expected = torch.tensor([3.0, -1 / 3, -1 / 3, -1 / 3, 0, 0])[:, None] * MASK
    torch.testing.assert_close(estimate("hapo"), expected, rtol=1e-5, atol=1e-6)
    limited = estimate("hapo", {"hapo": {"advantage_limit": 2.9}})
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, 0, 0])[:, None] * MASK
    torch.testing.assert_close(limited, expected, rtol=1e-5, atol=1e-6)


@ALL
def test_equal_rewards_give_exactly_zero(name):
    assert (estimate(name)[4:] == 0).all()


@ALL
def test_what_stands_at_masked_tokens_changes_nothing(name):
    entropy = entropies()
    for bad in (float("nan"), float("inf"), -1e9):
        dirty = entropy.masked_fill(~MASK, bad)
        assert torch.equal(estimate(name, entropy=dirty), estimate(name))


@ALL
def test_padding_rows_count_for_nothing(name):
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)])
    entropy = torch.cat([entropies(), torch.full((2, 4), 1e6)])
    padded = estimate(
        name, entropy=entropy, mask=mask, rewards=[*REWARDS, 1.0, 0.0], uids=[*UIDS, "pad", "a"]
    )
    assert torch.equal(padded[:6], estimate(name))
    assert (padded[6:] == 0).all()


@ALL
def test_the_order_of_responses_and_the_width_do_not_matter(name):
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    shuffled = estimate(
        name, entropy=entropies()[order], mask=MASK[order], uids=UIDS[order.numpy()],
        rewards=[REWARDS[i] for i in order],
    )  # fmt: skip
    torch.testing.assert_close(shuffled, estimate(name)[order], rtol=1e-6, atol=0)
    wide = torch.nn.functional.pad(MASK, (0, 3))
    entropy = torch.nn.functional.pad(entropies(), (0, 3))
    torch.testing.assert_close(
        estimate(name, entropy=entropy, mask=wide)[:, :4], estimate(name), rtol=1e-6, atol=0
    )


@ALL
def test_masks_of_numbers_equal_bool_masks(name):
    for dtype in (torch.float32, torch.int64):
        assert torch.equal(estimate(name, mask=MASK.to(dtype), entropy=entropies()), estimate(name))


@pytest.mark.parametrize("name", ["aepo_advantage"])
def test_without_entropies_it_says_what_is_needed(name):
    with pytest.raises(ConfigError, match=rf"adv_estimator = '{name}' needs entropy.*hpo_sync"):
        get_adv_estimator_fn(name)(
            token_level_rewards=torch.zeros(2, 3), response_mask=torch.ones(2, 3), config={},
            index=["a", "a"],
        )  # fmt: skip


@pytest.mark.parametrize("name", ["aepo_advantage"])
def test_entropies_of_another_shape_or_not_finite_are_refused(name):
    with pytest.raises(DataError, match=r"^entropy \(6, 3\) must have the shape of response_mask"):
        estimate(name, entropy=entropies()[:, :3])
    bad = entropies()
    bad[3, 3] = float("nan")
    with pytest.raises(DataError, match=r"^entropy: 1 of 14 live values are not finite"):
        estimate(name, entropy=bad)


def test_entropies_are_gone_after_the_step_even_if_it_failed():
    def fail():
        with lend(entropy=torch.ones(1, 1)):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(ConfigError):
        plugin.lent_entropy("aepo_advantage", torch.ones(1, 1, dtype=torch.bool))


@ALL
def test_missing_uids_and_bad_settings_are_refused(name):
    with pytest.raises(DataError, match=f"^{name}: uid is missing"):
        estimate(name, uids=None)
    with pytest.raises(ConfigError, match=rf"^algorithm\.{name}\.scale = 1: unknown setting"):
        estimate(name, {name: {"scale": 1}})
    with pytest.raises(ConfigError, match=r"^algorithm\.norm_adv_by_std_in_grpo = 1"):
        estimate(name, {"norm_adv_by_std_in_grpo": 1})


@ALL
def test_registering_twice_changes_nothing(name):
    before = get_adv_estimator_fn(name)
    plugin.register()
    assert get_adv_estimator_fn(name) is before


# ---------------------------------------------------------------- configuration


def config(estimator="aepo_advantage", mode="hpo_sync", loss="vanilla", **algorithm):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator, **algorithm},
            "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": loss}}},
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


@ALL
def test_the_settings_are_checked_before_anything_starts(name):
    plugin.check_entropy(config(name))
    key = next(iter(plugin.SETTINGS[name][0].__dataclass_fields__))
    message = re.escape(f"algorithm.{name}.{key} = -1: must be a number in")
    with pytest.raises(ConfigError, match=f"^{message}"):
        plugin.check_entropy(config(name, **{name: {key: -1}}))


def test_the_pass_that_computes_entropies_must_not_be_skipped():
    skipped = {"bypass_mode": True}
    with pytest.raises(ConfigError, match=r"^algorithm\.rollout_correction\.bypass_mode = True"):
        plugin.check_entropy(config(rollout_correction=skipped))
    plugin.check_entropy(config(rollout_correction={"bypass_mode": False}))
    plugin.check_entropy(config("grpo", rollout_correction=skipped))


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_the_trainer_mode_must_be_one_that_provides_entropies(mode):
    check_trainer_mode(config(mode=f"hpo_{mode}"))
    check_trainer_mode(config("grpo", mode=mode))
    with pytest.raises(ConfigError, match=r"policy_loss\.loss_mode = 'hapo' needs hpo_sync"):
        check_trainer_mode(config("grpo", mode=mode, loss="hapo"))
    with pytest.raises(ConfigError, match=rf"^trainer\.v1\.trainer_mode = '{mode}'.*hpo_sync"):
        check_trainer_mode(config(mode=mode))
    assert issubclass(get_trainer_cls(f"hpo_{mode}"), plugin.TokenEntropy)


# ---------------------------------------------------------------- trainer


def nested(values, lengths=LENGTHS):
    rows = [row[: int(length)] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def lent():
    """What an estimator would get now."""
    try:
        return borrow("aepo_advantage", "entropy")
    except ConfigError:
        return None


class Parent:
    """Verl's trainer as far as needed: runs the estimator while advantages are computed."""

    def _compute_advantage(self, batch, metrics):
        self.seen = lent()
        return batch


class Mode(plugin.TokenEntropy, Parent):
    pass


@pytest.fixture
def store(monkeypatch):
    """Fields of TransferQueue, and which of them were fetched."""
    fields, asked = {"entropy": nested(entropies())}, []

    def kv_batch_get(keys, partition_id, select_fields):
        asked.extend(select_fields)
        return {name: fields[name] for name in select_fields}

    def kv_batch_put(keys, partition_id, fields):
        stored.update(fields.items())
        return SimpleNamespace(keys=keys, partition_id=partition_id)

    stored = fields
    monkeypatch.setattr("transfer_queue.kv_batch_get", kv_batch_get)
    monkeypatch.setattr("transfer_queue.kv_batch_put", kv_batch_put)
    return SimpleNamespace(fields=fields, asked=asked)


def step(configuration):
    trainer = Mode()
    trainer.config = configuration
    batch = SimpleNamespace(keys=["k"] * 6, partition_id="train")
    assert trainer._compute_advantage(batch, {}).keys == batch.keys
    return trainer


def test_the_trainer_provides_the_entropies_of_the_whole_batch(store):
    seen = step(config()).seen
    assert torch.equal(seen, entropies() * MASK)
    assert lent() is None


def test_the_loss_of_hapo_gets_a_field_computed_over_the_whole_batch(store):
    # A rollout correction masked the last row meanwhile.
    mask = MASK.clone()
    mask[5] = False
    store.fields["response_mask"] = nested(mask.long())
    for changes in ({}, {"entropy_pivot": 0.3, "repo_compatible": True}):
        configuration = config("grpo", loss="hapo")
        configuration.actor_rollout_ref.actor.policy_loss.update(changes)
        step(configuration)
        field = store.fields[plugin.ENTROPY_DEVIATION]
        assert field.offsets().diff().tolist() == LENGTHS.tolist()
        expected = entropy_deviation(entropies(), mask, HAPOSettings(**changes))
        assert torch.equal(field.to_padded_tensor(0.0), expected)
        assert (expected[5] == 0).all()


def actor_config(**changes):
    return SimpleNamespace(policy_loss=HAPOPolicyLossConfig(**changes))


def test_a_worker_hands_the_field_to_the_loss_and_forgets_it():
    actor = actor_config()
    field = nested(entropies() - 0.5)
    with plugin.token_fields(actor, {plugin.ENTROPY_DEVIATION: field}):
        given = actor.policy_loss.batch_info[plugin.ENTROPY_DEVIATION]
        assert torch.equal(given, (entropies() - 0.5) * MASK)
    assert actor.policy_loss.batch_info == {}
    for config_, data in ((actor, {}), (SimpleNamespace(policy_loss=PolicyLossConfig()), {"a": 1})):
        with plugin.token_fields(config_, data):
            assert not config_.policy_loss.get("batch_info")


@pytest.mark.parametrize("policy_loss", [PolicyLossConfig(), HAPOPolicyLossConfig()])
def test_the_loss_without_the_field_says_what_is_needed(policy_loss):
    batch = make_batch()
    with pytest.raises(ConfigError, match=r"loss_mode = 'hapo' needs the tokens' entropies.*sync"):
        get_policy_loss_fn("hapo")(**batch, config=full_actor_config(policy_loss=policy_loss))


@pytest.mark.parametrize("bad", ["shape", "nan"])
def test_a_field_of_another_shape_or_not_finite_is_refused(bad):
    batch = make_batch()
    policy_loss = HAPOPolicyLossConfig()
    field = torch.zeros(8, 11 if bad == "shape" else 12)
    field[0, 0] = float("nan")
    policy_loss.batch_info[plugin.ENTROPY_DEVIATION] = field
    with pytest.raises(DataError, match=r"^entropy_deviation(: 1 of| \(8, 11\) must have the)"):
        get_policy_loss_fn("hapo")(**batch, config=full_actor_config(policy_loss=policy_loss))


@pytest.mark.parametrize("name", ["entropy_pivot", "adv_beta", "clip_alpha", "repo_compatible"])
def test_every_setting_of_hapo_is_typed_and_those_of_the_loss_reach_it(name):
    batch = make_batch(scale=0.2)
    value = True if name == "repo_compatible" else 0.37
    changed = full_actor_config(policy_loss=HAPOPolicyLossConfig(**{name: value}))
    same = torch.equal(evaluate("hapo", batch)[1], evaluate("hapo", batch, config=changed)[1])
    # The pivot is used on the driver only.
    assert same == (name == "entropy_pivot")


def test_other_algorithms_fetch_nothing(store):
    assert step(config("grpo")).seen is None
    assert store.asked == []
