"""Estimators and losses that read the entropies of verl's old-policy pass, as verl calls them."""

import re

import numpy as np
import pytest
import torch
from estimator_calls import call
from omegaconf import OmegaConf
from policy_batches import actor_config, evaluate, make_batch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.registry import OUR_ESTIMATORS
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.config import SECTIONS
from hpo_verl.verl_plugin.engine import loss_statistics
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

HAPOPolicyLossConfig = SECTIONS["hapo"]
FIELD = "entropy_deviation"
ALL = pytest.mark.parametrize("name", ["aepo_advantage", "hapo"])
UIDS = np.array(list("aaaabb"), dtype=object)
REWARDS = [1.0, 0.0, 0.0, 0.0, 0.7, 0.7]
LENGTHS = torch.tensor([1, 2, 3, 4, 2, 2])
MASK = torch.arange(4) < LENGTHS[:, None]


def entropies(mask=MASK, seed=0):
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))


def estimate(name, config=None, entropy=None, mask=MASK, rewards=REWARDS, uids=UIDS):
    """Call the registered estimator, the reward at the last token."""
    token_level_rewards = torch.zeros(mask.shape)
    token_level_rewards[torch.arange(len(mask)), mask.sum(-1).long().clamp(min=1) - 1] = (
        torch.tensor(rewards)
    )
    given = entropies(mask) if entropy is None else entropy
    return call(name, token_level_rewards, uids, config, mask, provided={"entropy": given})


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


@ALL
def test_bad_settings_are_refused(name):
    with pytest.raises(ConfigError, match=rf"^algorithm\.{name}\.scale = 1: unknown setting"):
        estimate(name, {name: {"scale": 1}})
    with pytest.raises(ConfigError, match=r"^algorithm\.norm_adv_by_std_in_grpo = 1"):
        estimate(name, {"norm_adv_by_std_in_grpo": 1})


# ---------------------------------------------------------------- configuration


def config(estimator="aepo_advantage", mode="hpo_sync", loss="vanilla", **algorithm):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator, **algorithm},
            "actor_rollout_ref": {
                "actor": {"policy_loss": {"loss_mode": loss}, "loss_agg_mode": "token-mean"}
            },
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


@ALL
def test_the_settings_are_checked_before_anything_starts(name):
    check_algorithm(config(name))
    key = next(iter(OUR_ESTIMATORS[name].settings.__dataclass_fields__))
    message = re.escape(f"algorithm.{name}.{key} = -1: must be a number in")
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_algorithm(config(name, **{name: {key: -1}}))


def test_the_pass_that_computes_entropies_must_not_be_skipped():
    skipped = {"bypass_mode": True}
    with pytest.raises(ConfigError, match=r"^algorithm\.rollout_correction\.bypass_mode = True"):
        check_algorithm(config(rollout_correction=skipped))
    check_algorithm(config(rollout_correction={"bypass_mode": False}))
    check_algorithm(config("grpo", rollout_correction=skipped))


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_the_trainer_mode_must_be_one_that_provides_entropies(mode):
    check_trainer_mode(config(mode=f"hpo_{mode}"))
    check_trainer_mode(config("grpo", mode=mode))
    with pytest.raises(ConfigError, match=r"policy_loss\.loss_mode = 'hapo' needs hpo_sync"):
        check_trainer_mode(config("grpo", mode=mode, loss="hapo"))
    with pytest.raises(ConfigError, match=rf"^trainer\.v1\.trainer_mode = '{mode}'.*hpo_sync"):
        check_trainer_mode(config(mode=mode))
    assert issubclass(get_trainer_cls(f"hpo_{mode}"), AlgorithmStep)


# ---------------------------------------------------------------- worker


def nested(values, lengths=LENGTHS):
    rows = [row[: int(length)] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_a_worker_provides_the_field_to_the_loss_and_forgets_it(monkeypatch):
    seen = []

    def note(*arguments):
        seen.append(extras.get(FIELD))
        return torch.zeros(()), {}

    monkeypatch.setattr("verl.workers.utils.losses.ppo_loss", note)
    monkeypatch.setattr(loss_statistics, "policy_loss_sums", lambda *arguments: note()[1])
    data = tu.get_tensordict({FIELD: nested(entropies() - 0.5)})
    reads, plain = (
        actor_config(policy_loss=policy_loss)
        for policy_loss in (HAPOPolicyLossConfig(), PolicyLossConfig())
    )
    loss_statistics.loss_with_statistics(reads, {}, data)
    assert all(torch.equal(field, (entropies() - 0.5) * MASK) for field in seen)
    assert extras.get(FIELD) is None
    loss_statistics.loss_with_statistics(plain, {}, data)
    loss_statistics.loss_with_statistics(reads, {}, tu.get_tensordict({"a": torch.zeros(1)}))
    assert seen[2:] == [None] * 4


@pytest.mark.parametrize("policy_loss", [PolicyLossConfig(), HAPOPolicyLossConfig()])
def test_the_loss_without_the_field_says_what_is_needed(policy_loss):
    batch = make_batch()
    with pytest.raises(ConfigError, match=r"loss_mode = 'hapo' needs the tokens' entropies.*sync"):
        get_policy_loss_fn("hapo")(**batch, config=actor_config(policy_loss=policy_loss))


@pytest.mark.parametrize("bad", ["shape", "nan"])
def test_a_field_of_another_shape_or_not_finite_is_refused(bad):
    batch = make_batch()
    field = torch.zeros(8, 11 if bad == "shape" else 12)
    field[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"^entropy_deviation(: 1 of| \(8, 11\) must have the)"):
        evaluate("hapo", batch, provided={FIELD: field})


@pytest.mark.parametrize("name", ["entropy_pivot", "adv_beta", "clip_alpha", "repo_compatible"])
def test_every_setting_of_hapo_is_typed_and_those_of_the_loss_reach_it(name):
    batch = make_batch(scale=0.2)
    value = True if name == "repo_compatible" else 0.37
    changed = actor_config(policy_loss=HAPOPolicyLossConfig(**{name: value}))
    same = torch.equal(evaluate("hapo", batch)[1], evaluate("hapo", batch, config=changed)[1])
    # The pivot is used on the driver only.
    assert same == (name == "entropy_pivot")
