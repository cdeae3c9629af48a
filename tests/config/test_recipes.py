"""Recipes compose, and what does not compose is explained."""

import pytest

from hpo_verl.config.recipes import compose_recipe, group_options, recipe_names
from hpo_verl.errors import ConfigError


def test_the_tiny_recipe_composes_with_every_algorithm():
    for algorithm in group_options("algo"):
        config = compose_recipe("countdown-tiny", [f"algo={algorithm}"])
        assert config.trainer.device == "cpu"
        assert config.actor_rollout_ref.rollout.name == "hf"


def test_one_word_changes_the_algorithm_and_one_more_its_setting():
    assert compose_recipe("countdown-tiny", []).algorithm.adv_estimator == "a_hpo"
    assert compose_recipe("countdown-tiny", ["algo=grpo"]).algorithm.adv_estimator == "grpo"
    config = compose_recipe("countdown-tiny", ["algo=hpo", "algorithm.hpo.alpha=0.4"])
    assert (config.algorithm.adv_estimator, config.algorithm.hpo.alpha) == ("hpo", 0.4)


def test_one_seed_reaches_everything_that_is_drawn():
    config = compose_recipe("countdown-tiny", ["seed=7"])
    seeds = [
        config.data.seed,
        config.actor_rollout_ref.rollout.seed,
        config.actor_rollout_ref.actor.data_loader_seed,
        config.actor_rollout_ref.actor.fsdp_config.seed,
        config.prepare.data.arguments.seed,
        config.prepare.policy.arguments.seed,
    ]
    assert seeds == [7] * 6


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("countdown-tny", [], "unknown recipe 'countdown-tny': did you mean countdown-tiny"),
        ("zzz", [], "available: .*countdown-tiny"),
        ("countdown-tiny", ["algo=a_hpoo"], "algo=a_hpoo: no such algo; did you mean a_hpo"),
        ("countdown-tiny", ["hardware=cpuu"], "no such hardware; did you mean cpu"),
        (
            "countdown-tiny",
            ["algorithm.hpo.alpha_mim=0.2"],
            "unknown setting 'algorithm.hpo.alpha_mim' .*did you mean algorithm.hpo.alpha_min",
        ),
        (
            "countdown-tiny",
            ["algo=grpo", "algorithm.hpo.alpha=0.2"],
            "unknown setting 'algorithm.hpo.alpha'",
        ),
        ("countdown-tiny", ["trainer.total_steps=3"], "unknown setting 'trainer.total_steps'"),
        ("countdown-tiny", ["trainer.n=["], "override 'trainer.n=\\['"),
    ],
)
def test_wrong_names_are_explained_with_the_nearest_right_ones(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_recipe(recipe, overrides)


def test_new_keys_need_a_plus_as_in_hydra():
    assert compose_recipe("countdown-tiny", ["+trainer.note=1"]).trainer.note == 1


def test_recipe_names_are_the_files():
    assert "countdown-tiny" in recipe_names()
