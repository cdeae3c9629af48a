"""`countdown-smol` warm-starts its model first, from puzzles that are not held out."""

import pytest
from composed_recipes import composed

from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import preparations
from hpo_verl.config.recipes import compose_recipe, without_hydra


def entries(*overrides):
    config = without_hydra(compose_recipe("countdown-smol", list(overrides)))
    return {made.name: made for made in preparations(config)}


def test_data_then_model_then_its_warm_start(monkeypatch, tmp_path):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    made = entries("seed=3")
    assert list(made) == ["data", "policy", "warm_start"]
    assert made["warm_start"].arguments == {
        "--base": str(made["policy"].output),
        "--held-out": str(made["data"].output / "val.parquet"),
        "--seed": "3",
    }
    run = PlannedRun("countdown-smol", ("seed=3",))
    assert run.policy_folder == made["warm_start"].output == tmp_path / "smollm2-135m-countdown-3"


def test_a_policy_of_ones_own_needs_neither_model_nor_warm_start(tmp_path):
    assert list(entries(f"actor_rollout_ref.model.path={tmp_path}")) == ["data"]


@pytest.mark.parametrize("model", ["smollm2-135m-hub", "qwen2.5-1.5b"])
def test_another_model_is_warm_started_in_the_same_way(model):
    made = entries(f"model={model}", "hardware=1gpu")
    assert made["policy"].module == "data_prep.policies.hub"
    assert made["warm_start"].arguments["--base"] == str(made["policy"].output)
    assert model in made["warm_start"].output.name


def test_threads_of_the_update_are_those_of_the_machine_and_do_not_spin():
    variables = composed("countdown-smol", (), "cpu").ray_kwargs.ray_init.runtime_env.env_vars
    assert variables.OMP_NUM_THREADS == "auto"
    assert variables.OMP_WAIT_POLICY == "passive"
    on_a_card = composed("countdown-smol", (), "1gpu").ray_kwargs.ray_init.runtime_env.env_vars
    assert "OMP_WAIT_POLICY" not in on_a_card
