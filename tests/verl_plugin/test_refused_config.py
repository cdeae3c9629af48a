"""Settings of algorithms that are refused or warned about, alone and together."""

import re

import pytest
from composed_groups import composed

from hpo_verl.algorithms.registry import LOSSES
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode


@pytest.mark.parametrize(
    ("algorithm", "override", "message"),
    [
        ("a_hpo", "algorithm.hpo.alpha_min=2", "algorithm.hpo.alpha_min = 2: must be a number"),
        ("hpo", "algorithm.hpo.alpah=0.4", "algorithm.hpo.alpah = 0.4: unknown setting"),
        ("hpo", "algorithm.hpo.zero_advantage=all", "must be one of ignore, negative"),
        ("a_hpo", "algorithm.norm_adv_by_std_in_grpo=2", "must be true or false"),
        ("a_hpo", "actor_rollout_ref.actor.clip_ratio_low=2", "clip_ratio_low = 2: must be"),
        (
            "a_hpo",
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
            "policy_loss.loss_mode = 'hpo' permits token-mean and seq-mean-token-sum-norm only",
        ),
        (
            "hysteretic_grpo",
            "algorithm.hpo.length=rollout",
            "algorithm.hpo.length = 'rollout': the advantages carry 1 / L, so "
            "actor_rollout_ref.actor.loss_agg_mode must be seq-mean-token-sum-norm",
        ),
        ("hysteretic_grpo", "algorithm.hpo.alpha=0.4", "algorithm.hpo.alpha = 0.4: unknown"),
        ("hysteretic_grpo", "algorithm.hpo.alpha_min=-1", "alpha_min = -1: must be a number"),
        (
            "hysteretic_grpo",
            "actor_rollout_ref.actor.policy_loss.loss_mode=hpo",
            "policy_loss.loss_mode = 'hpo' permits token-mean and seq-mean-token-sum-norm only",
        ),
        ("grpo", "algorithm.hpo.alpha=0.4", "algorithm.adv_estimator = 'grpo' ignores it"),
        ("aepo_advantage", "algorithm.aepo_advantage.entropy_scale=-1", "entropy_scale = -1: must"),
        ("aepo_advantage", "algorithm.aepo_advantage.scale=1", "scale = 1: unknown setting"),
        (
            "a_hpo",
            "algorithm.aepo_advantage.entropy_scale=1",
            "algorithm.adv_estimator = 'a_hpo' ignores it; use aepo_advantage",
        ),
        ("hapo", "algorithm.hapo.advantage_limit=0", "advantage_limit = 0: must be a number"),
        ("hapo", "actor_rollout_ref.actor.clip_ratio_high=-1", "clip_ratio_high = -1: must"),
        ("aepo_advantage", "actor_rollout_ref.actor.clip_ratio_low=2", "clip_ratio_low = 2: must"),
    ],
)
def test_what_cannot_be_meant_is_refused(algorithm, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(composed(algorithm, override))


LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
SELECTING = [name for name, loss in LOSSES.items() if loss.selects]
PENALISED = [name for name, loss in LOSSES.items() if not loss.proportional and not loss.selects]


def test_every_class_of_composition_has_a_loss():
    assert set(SELECTING) == {"clip_cov", "kl_cov", "bapo", "capo"}
    assert PENALISED == ["dro"]


@pytest.mark.parametrize("algorithm", ["hpo", "a_hpo"])
def test_the_weight_composes_with_every_loss_that_is_proportional_to_the_advantage(algorithm):
    config = composed(algorithm)
    for name, loss in LOSSES.items():
        # Some read fields of an estimator of their own.
        if not loss.proportional or loss.always or None in loss.token_fields.values():
            continue
        actor = config.actor_rollout_ref.actor
        actor.policy_loss.loss_mode = name
        actor.loss_agg_mode = (*loss.aggregations, "token-mean")[0]
        assert check_algorithm(config) == []


def test_sapo_says_that_it_ignores_the_aggregation():
    (warning,) = check_algorithm(composed("a_hpo", f"{LOSS}=sapo"))
    assert "ignores loss_agg_mode = 'token-mean'" in warning


@pytest.mark.parametrize("loss", SELECTING)
def test_losses_that_choose_tokens_by_the_advantage_are_refused(loss):
    with pytest.raises(ConfigError, match=f"adv_estimator = 'a_hpo' with .*'{loss}'"):
        check_algorithm(composed("a_hpo", f"{LOSS}={loss}"))
    if loss not in ("bapo", "capo"):  # They need an engine.
        assert check_algorithm(composed("grpo", f"{LOSS}={loss}")) == []


@pytest.mark.parametrize("loss", [*PENALISED, "someone_elses"])
def test_other_losses_are_warned_about(loss):
    (warning,) = check_algorithm(composed("a_hpo", f"{LOSS}={loss}"))
    assert f"policy_loss.loss_mode = '{loss}'" in warning
    assert check_algorithm(composed("grpo", f"{LOSS}={loss}")) == []


def test_a_kl_penalty_in_the_reward_needs_a_mode_that_hands_over_the_scores():
    penalty = "algorithm.use_kl_in_reward=true"
    ours = composed("hpo", penalty, "trainer.v1.trainer_mode=hpo_sync")
    assert check_algorithm(ours) == []
    check_trainer_mode(ours)
    with pytest.raises(ConfigError, match="adv_estimator = 'hpo' needs hpo_sync or hpo_coloc"):
        check_trainer_mode(composed("hpo", penalty, "trainer.v1.trainer_mode=sync"))
    check_trainer_mode(composed("grpo", penalty, "trainer.v1.trainer_mode=sync"))


def test_an_estimator_that_follows_validations_needs_some():
    mode = "trainer.v1.trainer_mode=hpo_sync"
    check_trainer_mode(composed("hypervolume", mode, "trainer.test_freq=1"))
    message = r"^trainer\.test_freq = -1: adv_estimator = 'hypervolume' follows the validations"
    with pytest.raises(ConfigError, match=message):
        check_trainer_mode(composed("hypervolume", mode, "trainer.test_freq=-1"))
