"""Recipes compose with verl's own tree, and what they set reaches the function that uses it."""

import re

import policy_batches
import pytest
import torch
from composed_groups import composed
from hydra.errors import InstantiationException
from omegaconf import open_dict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass

from hpo_verl.algorithms.registry import ALGORITHMS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin import losses as plugin
from hpo_verl.verl_plugin.config import SECTIONS
from hpo_verl.verl_plugin.validation import check_algorithm


def evaluate(config):
    """Call the loss that a configuration selects; return loss per advantage sign and slopes.

    Four responses of one token: ratios 1.5, 0.5 with A = 1, then with A = -1.
    """
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=4,
        global_batch_size=4,
        loss_scale_factor=actor.loss_scale_factor,
    )
    batch = {
        "old_log_prob": torch.zeros(4, 1),
        "log_prob": torch.tensor([[1.5], [0.5], [1.5], [0.5]]).log(),
        "advantages": torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]),
        "response_mask": torch.ones(4, 1, dtype=torch.bool),
    }
    name, mode = actor.policy_loss.loss_mode, actor.loss_agg_mode
    loss, gradient, _ = policy_batches.evaluate(name, batch, mode, actor)
    return loss.item(), gradient.squeeze(-1).tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_recipe_composes_and_passes_the_checks(algorithm):
    config = composed(algorithm)
    assert check_algorithm(config) == []
    assert config.algorithm.adv_estimator == ALGORITHMS[algorithm].estimator.name
    assert torch.isfinite(torch.tensor(evaluate(config)[0]))


# Ratios 1.5, 0.5 with A = 1, then with A = -1; the mean of four tokens.
CLIPPED = ((-1.2 - 0.5 + 1.5 + 0.8) / 4, [0.0, -0.125, 0.375, 0.0])


@pytest.mark.parametrize(
    "algorithm", ["a_hpo", "hpo", "hysteretic_grpo", "grpo", "grpo_token_mean"]
)
def test_clip_of_the_token_ratio(algorithm):
    loss, slopes = evaluate(composed(algorithm))
    assert loss == pytest.approx(CLIPPED[0], rel=1e-5)
    assert slopes == pytest.approx(CLIPPED[1], rel=1e-5)


def test_aepo_keeps_a_gradient_above_the_clip():
    loss, slopes = evaluate(composed("aepo_advantage"))
    assert loss == pytest.approx(CLIPPED[0], rel=1e-5)
    assert slopes == pytest.approx([-0.3, -0.125, 0.375, 0.0], rel=1e-5)


@pytest.mark.parametrize("algorithm", ["a_hpo", "hpo", "grpo", "grpo_token_mean", "dapo"])
def test_the_clip_settings_reach_the_loss(algorithm):
    low, high = "actor_rollout_ref.actor.clip_ratio_low", "actor_rollout_ref.actor.clip_ratio_high"
    loss, _ = evaluate(composed(algorithm, f"{low}=0.4", f"{high}=0.1"))
    assert loss == pytest.approx((-1.1 - 0.5 + 1.5 + 0.6) / 4, rel=1e-5)


def test_dapo_clips_higher_and_filters_groups():
    config = composed("dapo")
    assert evaluate(config)[0] == pytest.approx((-1.28 - 0.5 + 1.5 + 0.8) / 4, rel=1e-5)
    assert config.algorithm.filter_groups.enable
    assert config.algorithm.filter_groups.metric == "reward"


def test_dr_grpo_divides_by_the_constant_length_and_not_by_the_deviation():
    config = composed("dr_grpo")
    assert evaluate(config)[0] == pytest.approx(CLIPPED[0] / 64, rel=1e-5)
    assert config.algorithm.norm_adv_by_std_in_grpo is False


@pytest.mark.parametrize(
    "algorithm", ["hysteretic_grpo", "grpo", "grpo_token_mean", "dr_grpo", "dapo"]
)
def test_the_second_clip_is_out_of_reach(algorithm):
    actor = omega_conf_to_dataclass(composed(algorithm).actor_rollout_ref.actor)
    log_prob = torch.full((1, 1), 30.0)
    _, metrics = core_algos.compute_policy_loss_vanilla(
        old_log_prob=torch.zeros(1, 1), log_prob=log_prob, advantages=-torch.ones(1, 1),
        response_mask=torch.ones(1, 1).bool(), loss_agg_mode="token-mean", config=actor,
    )  # fmt: skip
    assert metrics["actor/pg_clipfrac_lower"] == 0


def test_gspo_clips_as_narrowly_as_its_paper():
    loss, slopes = evaluate(composed("gspo"))
    assert loss == pytest.approx((-1.0004 - 0.5 + 1.5 + 0.9997) / 4, rel=1e-5)
    assert slopes == pytest.approx(CLIPPED[1], rel=1e-5)


def test_sapo_reads_its_temperatures_at_actor_level():
    loss, _ = evaluate(composed("sapo"))

    def gate(ratio, tau):
        return torch.sigmoid(torch.tensor(tau * (ratio - 1))).item() * 4 / tau

    expected = -gate(1.5, 1.0) - gate(0.5, 1.0) + gate(1.5, 1.05) + gate(0.5, 1.05)
    assert loss == pytest.approx(expected / 4, rel=1e-5)
    changed, _ = evaluate(composed("sapo", "actor_rollout_ref.actor.tau_neg=2.0"))
    assert changed != loss


def test_bapo_finds_its_bounds_and_selects_its_engine():
    config = composed("bapo")
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.policy_loss == SECTIONS["bapo"]()
    # P = 0.5 + 1.2, N = 1.5 + 0.6: 0.447 of the whole, so the first bounds stay.
    assert evaluate(config)[0] == pytest.approx((-1.7 + 2.1) / 4, rel=1e-5)
    # For 0.48: c_high = 1.45 gives 1.95 / 4.05.
    path = "actor_rollout_ref.actor.policy_loss"
    assert evaluate(composed("bapo", f"{path}.positive_share=0.48"))[0] == pytest.approx(
        (-1.95 + 2.1) / 4, rel=1e-5
    )
    for override, message in (
        ("positive_share=2", "positive_share = 2: must be a number in [0, 1]"),
        ("clip_low_end=0.1", "clip_low_end = 0.1: must be a number in [0.6, 1]"),
    ):
        wrong = composed("bapo", f"{path}.{override}")
        with pytest.raises(ConfigError, match=re.escape(f"{path}.{message}")):
            check_algorithm(wrong)
        with pytest.raises(InstantiationException, match=re.escape(message)):
            omega_conf_to_dataclass(wrong.actor_rollout_ref.actor)


def test_bapo_without_its_engine_is_refused(monkeypatch):
    config = composed("bapo")
    config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR = "nvidia"
    with pytest.raises(ConfigError, match=r"VERL_ENGINE_VENDOR = 'nvidia': .*needs 'hpo'"):
        check_algorithm(config)
    with open_dict(config):
        del config.ray_kwargs.ray_init["runtime_env"]
    with pytest.raises(ConfigError, match=r"VERL_ENGINE_VENDOR = None: .*needs 'hpo'"):
        check_algorithm(config)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "hpo")
    assert check_algorithm(config) == []
    config.actor_rollout_ref.actor.strategy = "megatron"
    with pytest.raises(ConfigError, match=r"strategy = 'megatron': .*fsdp and fsdp2 only"):
        check_algorithm(config)


def test_hapos_settings_are_typed_and_reach_the_loss():
    actor = omega_conf_to_dataclass(composed("hapo").actor_rollout_ref.actor)
    assert actor.policy_loss == SECTIONS["hapo"]()
    # h = sin 0 = 0 here: the clip is the plain one of 0.2 / 0.28.
    assert evaluate(composed("hapo"))[0] == pytest.approx((-1.28 - 0.5 + 1.5 + 0.8) / 4)
    path = "actor_rollout_ref.actor.policy_loss"
    for override, message in (
        ("entropy_pivot=2", "entropy_pivot = 2: must be a number in [0, 1]"),
        ("repo_compatible=1", "repo_compatible = 1: must be true or false"),
    ):
        config = composed("hapo", f"{path}.{override}")
        with pytest.raises(ConfigError, match=re.escape(f"{path}.{message}")):
            check_algorithm(config)
        with pytest.raises(InstantiationException, match=re.escape(message)):
            omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    for unknown in ("adv_betta=1", "batch_info=1"):
        actor = composed("hapo", f"{path}.{unknown}").actor_rollout_ref.actor
        with pytest.raises(InstantiationException, match=unknown.partition("=")[0]):
            omega_conf_to_dataclass(actor)


def test_mhpos_settings_are_typed_and_reach_the_loss():
    plain = evaluate(composed("mhpo"))[0]
    path = "actor_rollout_ref.actor.policy_loss"
    for name in ("c", "k_pos", "lambda_pos", "k_neg", "lambda_neg"):
        assert evaluate(composed("mhpo", f"{path}.{name}=0.7"))[0] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("override", ["c=0", "c=21", "k_pos=-1", "lambda_neg=.nan", "k_neg=two"])
def test_a_bad_setting_of_mhpo_is_refused_before_any_worker_starts(override):
    name = override.partition("=")[0]
    config = composed("mhpo", f"actor_rollout_ref.actor.policy_loss.{override}")
    with pytest.raises(ConfigError, match=rf"^actor_rollout_ref\.actor\.policy_loss\.{name} = "):
        check_algorithm(config)
    with pytest.raises(InstantiationException, match=rf"policy_loss\.{name} = "):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_an_unknown_setting_of_mhpo_is_refused_by_name():
    config = composed("mhpo", "actor_rollout_ref.actor.policy_loss.lamda_neg=1")
    with pytest.raises(InstantiationException, match="lamda_neg"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_the_hysteretic_settings_reach_the_estimator():
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    for algorithm, override, weight in (
        ("hpo", "algorithm.hpo.alpha=0.25", 0.25),
        ("a_hpo", "algorithm.hpo.alpha_min=0.5", 0.5),
        ("hysteretic_grpo", "algorithm.hpo.alpha_min=0.5", 0.5),
    ):
        config = composed(algorithm, override).algorithm
        advantages, _ = core_algos.get_adv_estimator_fn(config.adv_estimator)(
            token_level_rewards=rewards, response_mask=torch.ones(4, 1), config=config,
            index=["a"] * 4,
        )  # fmt: skip
        assert advantages.squeeze(-1).tolist() == pytest.approx(
            [1.5] + [-0.5 * weight] * 3, rel=1e-5
        )


def test_the_loss_of_the_recipes_is_ours():
    assert get_policy_loss_fn(ALGORITHMS["a_hpo"].loss.name) is plugin.LOSSES["hpo"]
    assert get_policy_loss_fn(ALGORITHMS["mhpo"].loss.name) is plugin.LOSSES["mhpo"]
