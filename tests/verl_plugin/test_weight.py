"""The hysteretic weight as verl calls it: beside verl's RLOO, with both lengths, before others."""

import re

import numpy as np
import pytest
import torch
from composed_recipes import View, merged, with_algorithm
from estimator_calls import call
from policy_batches import actor_config, counts_of, evaluate, make_batch
from verl.trainer.ppo.core_algos import compute_rloo_outcome_advantage

from hpo_verl.algorithms.registry import ALGORITHMS, ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import needs, trainer_modes
from hpo_verl.verl_plugin.validation import check_algorithm

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


# ---------------------------------------------------------------- in front of other algorithms


def recipe(algorithm, **section):
    """An algorithm's recipe with changes in `algorithm`."""
    plain = with_algorithm("countdown3-1.5b", (), "8gpu", algorithm)
    return View(merged(plain, {"algorithm": section}))


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda one: one.name)
@pytest.mark.parametrize("weight", [{"alpha": 0.5, "positive_weight": 2.0}, {"alpha_min": 0.2}])
def test_the_weight_goes_in_front_of_every_algorithm_or_is_refused_by_name(algorithm, weight):
    estimator, loss = algorithm.estimator, algorithm.loss
    name, config = estimator.name, recipe(algorithm.name, hpo=weight)
    if estimator.advantage is None or (estimator.weights_by_sign and not estimator.weight):
        reason = "weights by sign itself" if estimator.weights_by_sign else "ignores it"
        with pytest.raises(ConfigError, match=f"'{name}' {reason}; use a_hpo or hpo"):
            check_algorithm(config)
        if name != "grpo":
            return
        # GRPO's advantages with the weight are HPO's.
        of_weight = "hpo" if "alpha" in weight else "a_hpo"
        config = recipe(algorithm.name, adv_estimator=of_weight, hpo=weight)
    elif estimator.weight:
        config = recipe(algorithm.name)
    if loss.selects:
        with pytest.raises(ConfigError, match=f"loss_mode = '{loss.name}': the weight would"):
            check_algorithm(config)
    elif not loss.proportional:
        (warning,) = check_algorithm(config)
        assert loss.caveat in warning
    else:
        assert check_algorithm(config) == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"alpha": 2.0}, "algorithm.hpo.alpha = 2.0: must be a number in [0, 1]"),
        ({"alpha": 0.5, "ema": 0.5}, "algorithm.hpo.alpha = 0.5: unknown setting, known are"),
        ({"length": "rollout"}, "algorithm.hpo.length = 'rollout': unknown setting"),
    ],
)  # fmt: skip
def test_settings_of_a_weight_in_front_are_checked(section, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(recipe("d3s", hpo=section))


def test_what_a_weight_in_front_needs_is_needed_too():
    d3s, hapo = ESTIMATORS["d3s"], ESTIMATORS["hapo"]
    assert needs(d3s, {"hpo": {"ema": 0.5}}) == ("entropy", "progress", "memory")
    assert needs(hapo, {"hpo": {"alpha": 0.5}}) == ()
    assert needs(hapo, {"hpo": {"alpha_end": 0.5}}) == ("progress",)
    assert needs(hapo, {"hpo": {}}) == needs(ESTIMATORS["grpo"], {}) == ()


def test_a_loss_that_chooses_by_the_advantages_is_refused_with_a_weight_in_front():
    config = recipe("hapo", hpo={"alpha": 0.5})
    config["actor_rollout_ref"]["actor"]["policy_loss"] = {"loss_mode": "clip_cov"}
    with pytest.raises(ConfigError, match=r"adv_estimator = 'hapo' with .*'clip_cov'"):
        check_algorithm(config)
