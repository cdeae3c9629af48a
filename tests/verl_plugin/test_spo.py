"""SPO as verl calls it: estimator and checks."""

import re

import pytest
import torch
from estimator_calls import call
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

# ---------------------------------------------------------------- estimator


def test_by_hand():
    # Differences .5, -.5, .75, -.75: deviation .735980.
    values = {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.75}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = torch.zeros(4, 3)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages = call("spo", rewards, list("abcd"), mask=mask, provided={"values": values})
    expected = torch.tensor([0.679366, -0.679366, 1.019049, -1.019049])[:, None] * mask
    torch.testing.assert_close(advantages, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("reward", [-0.1, 1.5])
def test_a_reward_that_is_no_rate_is_refused(reward):
    with pytest.raises(DataError, match=rf"^spo: reward {reward} of response 1: must be in \[0, 1"):
        call("spo", [1.0, reward], ["a", "b"], provided={"values": {"a": 0.5, "b": 0.5}})


def test_a_prompt_without_a_value_is_refused():
    with pytest.raises(DataError, match=r"^spo: uid 'b' is of no prompt that was drawn"):
        call("spo", [1.0, 0.0], ["a", "b"], provided={"values": {"a": 0.5}})


def test_without_a_trainer_of_ours_the_estimator_says_which_to_use():
    with pytest.raises(ConfigError, match=r"'spo' needs values .*trainer_mode must be hpo_sync$"):
        get_adv_estimator_fn("spo")(
            token_level_rewards=torch.zeros(1, 1), response_mask=torch.ones(1, 1), index=["a"]
        )


# ---------------------------------------------------------------- checks


def config(n=1, mode="hpo_sync", **algorithm):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "spo", "spo": {}, **algorithm},
            "actor_rollout_ref": {
                "actor": {
                    "policy_loss": {"loss_mode": "vanilla"},
                    "loss_agg_mode": "token-mean",
                },
                "rollout": {"n": n},
            },
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


def test_the_recipes_settings_pass():
    assert check_algorithm(config()) == []
    check_trainer_mode(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 8}, "actor_rollout_ref.rollout.n = 8: algorithm.adv_estimator = 'spo' takes one"),
        ({"spo": {"rho_min": 2}}, "algorithm.spo.rho_min = 2: must be a number in [0, 0.999]"),
        ({"spo": {"rho": 0.9}}, "algorithm.spo.rho = 0.9: unknown setting"),
        ({"use_kl_in_reward": True}, "algorithm.use_kl_in_reward = True: adv_estimator = 'spo'"),
        ({"adv_estimator": "grpo", "spo": {"rho_min": 0.5}}, "'grpo' ignores it; use spo"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(config(**changes))


@pytest.mark.parametrize("mode", ["sync", "hpo_colocate_async", "hpo_separate_async"])
def test_other_trainer_modes_are_refused(mode):
    with pytest.raises(ConfigError, match=f"trainer_mode = '{mode}': .*'spo' needs hpo_sync$"):
        check_trainer_mode(config(mode=mode))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("[[1, 0], [", "cannot be read as JSON"),
        ('{"a": [1]}', "must hold a list of lists of numbers"),
        ("[1, 0]", "entry 0 must be a list of numbers"),
        ('[[1], ["yes"]]', "entry 1 must be a list of numbers"),
        ("[[true]]", "entry 0 must be a list of numbers"),
        ("[[], [0.5, 1.5], []]", r"entry 1 must be a list of numbers in \[0, 1\]"),
        ("[[], [], [NaN]]", "entry 2 must be a list of numbers"),
    ],
)
def test_a_bad_file_of_offline_rewards_is_named(tmp_path, content, message):
    file = tmp_path / "rewards.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=rf"^algorithm\.spo\.initial_rewards: {file}:? {message}"):
        check_algorithm(config(spo={"initial_rewards": str(file)}))
