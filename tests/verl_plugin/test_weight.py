"""The hysteretic weight as verl calls it: beside verl's RLOO, with both lengths, before others."""

import re

import numpy as np
import pytest
import torch
from estimator_calls import call
from policy_batches import actor_config, counts_of, evaluate, make_batch
from verl.trainer.ppo.core_algos import compute_rloo_outcome_advantage

from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import trainer_modes

NORM = "seq-mean-token-sum-norm"


def test_leaving_one_out_is_verls_rloo():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (48, 1), generator=generator).float()
    uids, mask = np.arange(48) // torch.tensor([6]).numpy(), torch.ones(48, 1)
    section = {"norm_adv_by_std_in_grpo": False}
    section["hpo"] = {"alpha": 1.0, "baseline": "leave_one_out"}
    ours = call("hpo", rewards, uids, section, mask)
    theirs, _ = compute_rloo_outcome_advantage(rewards, mask, uids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-7)


def test_one_mini_batch_gives_the_same_loss_with_the_length_of_the_rollout():
    """(1/N) sum_i (1/L) sum_t is the mean over tokens where the mini-batch is the rollout."""
    batch = make_batch()
    mask, rewards = batch["response_mask"], torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0])
    matrix = torch.zeros(mask.shape)
    matrix[:, 0] = rewards
    config, losses = {"hpo": {"alpha": 0.5}}, []
    for length, mode, factor in (("mini_batch", "token-mean", None), ("rollout", NORM, 1)):
        config["hpo"]["length"] = length
        advantages = call("hpo", matrix, list("aaaabbbb"), config, mask)
        actor = actor_config(mode, counts={**counts_of(mask), "loss_scale_factor": factor})
        losses.append(evaluate("hpo", batch | {"advantages": advantages}, mode, actor))
    torch.testing.assert_close(losses[0][:2], losses[1][:2], rtol=1e-6, atol=1e-9)
    assert losses[0][0] != 0


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        ("a_hpo", {"ema": 0.5}, "'a_hpo' needs memory from the trainer: trainer.v1.trainer_mode"),
        ("hpo", {"alpha_end": 1.0}, "'hpo' needs progress from the trainer"),
    ],
)
def test_what_verls_own_trainer_lacks_is_named(estimator, settings, message):
    config = {"hpo": settings}
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(estimator, [1.0, 0.0], ["a", "a"], config)
    assert len(trainer_modes(ESTIMATORS[estimator], config)) == 3
    assert trainer_modes(ESTIMATORS[estimator], {"hpo": {}}) == ()
