"""Recipes, algorithms and hardware, each with each of the others, are ones that verl accepts.

Composing, resolving and instantiating costs more than a second, and there are
some thousand pairs. So Hydra composes each recipe on each hardware without its
algorithm; the algorithm's file is merged in here, and verl's dataclasses are
built once per distinct content. That this changes nothing is tested on
combinations composed by Hydra and checked by the preflight itself.
"""

import copy
import json
from pathlib import Path

import pytest
from composed_recipes import PRODUCTION, with_algorithm
from hydra.utils import get_class
from omegaconf import OmegaConf

from hpo_verl.algorithms.registry import LOSSES, OUR_ESTIMATORS
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.values import check_settings
from hpo_verl.config.recipes import (
    compose_recipe,
    group_options,
    recipe_names,
    without_hydra,
)
from hpo_verl.errors import ConfigError

VARIANTS = [
    *((name, ()) for name in recipe_names()),
    ("countdown3-3b", ("model=llama3.2-3b",)),
]
HARDWARE = group_options("hardware")
ALGORITHMS = group_options("algo")


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        yield


_built = {}


def build(node):
    """What Hydra's `instantiate` makes of a section, each distinct content once."""
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    key = json.dumps(node, sort_keys=True)
    if key not in _built:
        values = {name: build(value) for name, value in node.items() if name != "_target_"}
        _built[key] = get_class(node["_target_"])(**values) if "_target_" in node else values
    return _built[key]


def combinations(every):
    """Each recipe with each algorithm, on every hardware or on one, which rotates."""
    for i, (recipe, extra) in enumerate(VARIANTS):
        for j, algorithm in enumerate(ALGORITHMS):
            for hardware in HARDWARE if every else [HARDWARE[(i + j) % len(HARDWARE)]]:
                yield recipe, extra, hardware, algorithm


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_verl_accepts_recipes_algorithms_and_hardware_each_with_each_other(monkeypatch, every):
    import verl.utils.config as verl_config
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    from hpo_verl.verl_plugin.validation import check_algorithm

    monkeypatch.setattr(verl_config, "omega_conf_to_dataclass", build)
    pairs, seen = set(), 0
    for combination in combinations(every):
        config = with_algorithm(*combination)
        where = " ".join(map(str, combination))
        recipe, extra, hardware, algorithm = combination
        seen += 1
        pairs |= {(recipe, extra, hardware), (recipe, extra, algorithm), (hardware, algorithm)}
        if hides_the_head(config):
            with pytest.raises(ConfigError, match="Adam's averages for the model's head"):
                check_algorithm(config)
            continue
        try:
            # validate_config builds the actor itself.
            ours = [estimator.section for estimator in OUR_ESTIMATORS.values()]
            build({k: v for k, v in config["algorithm"].items() if k not in ours})
            build(config["actor_rollout_ref"]["rollout"])
            check_algorithm(config)
            verl_config.validate_config(config, need_reference_policy(config), need_critic(config))
        except Exception as error:
            raise AssertionError(f"{where}: {error}") from error
        check_values(config, combination[2], where)
    recipes, machines, algorithms = map(len, (VARIANTS, HARDWARE, ALGORITHMS))
    assert len(pairs) == recipes * machines + recipes * algorithms + machines * algorithms
    assert seen == recipes * algorithms * (machines if every else 1)
    assert set(PRODUCTION) <= {recipe for recipe, _ in VARIANTS}


def hides_the_head(config):
    """Whether the loss reads the optimizer of a head that is frozen, or waits on the host."""
    policy = config.actor_rollout_ref
    loss = LOSSES.get(policy.actor.policy_loss.loss_mode)
    if loss is None or loss.head_fields is None:
        return False
    return policy.model.lora_rank > 0 or policy.actor.fsdp_config.offload_policy


def check_values(config, hardware, where):
    """What must hold for any combination, beyond what verl looks at."""
    data, trainer = config.data, config.trainer
    policy = config.actor_rollout_ref
    actor, rollout, model = policy.actor, policy.rollout, policy.model
    gpus = trainer.nnodes * trainer.n_gpus_per_node
    assert actor.strategy == "fsdp2", where
    assert rollout.mode == "async", where
    assert not model.trust_remote_code, where
    assert not data.trust_remote_code, where
    # A group-relative advantage needs a group; SPO's is no such.
    assert (rollout.n == 1) == (config.algorithm["adv_estimator"] == "spo"), where
    # Whatever the algorithm, a step and an update have as many responses; OPO has one update.
    sizes = {"step": data.train_batch_size, "update": actor.ppo_mini_batch_size}
    expected = dict(config.responses)
    if config.algorithm["adv_estimator"] == "opo":
        expected["update"] = expected["step"]
    assert {key: size * rollout.n for key, size in sizes.items()} == expected, where
    assert data.train_batch_size % actor.ppo_mini_batch_size == 0, where
    # Ranks get equal shares of the step and of each mini-batch.
    assert actor.ppo_mini_batch_size * rollout.n % gpus == 0, where
    longest = data.max_prompt_length + data.max_response_length
    assert actor.ppo_max_token_len_per_gpu >= longest, where
    assert config.reward.custom_reward_function.path.startswith("pkg://hpo_verl.rewards."), where
    assert trainer.resume_mode == "auto", where
    assert list(trainer.logger) == ["console", "file", "tensorboard"], where
    if hardware == "cpu":
        assert rollout.name == "hf", where
    else:
        assert rollout.name == "vllm", where
        assert model.use_remove_padding, where
        assert actor.use_dynamic_bsz, where
        assert trainer.device == "cuda", where
        assert gpus == {"1gpu24": 1, "1gpu": 1, "8gpu": 8, "2x8gpu": 16}[hardware], where


def rotation():
    """As many combinations as it takes to meet every variant, hardware and algorithm."""
    for i in range(max(len(VARIANTS), len(HARDWARE), len(ALGORITHMS))):
        yield (
            *VARIANTS[i % len(VARIANTS)],
            HARDWARE[i % len(HARDWARE)],
            ALGORITHMS[i % len(ALGORITHMS)],
        )


def without_names(config):
    """A resolved configuration without what follows from the algorithm elsewhere."""
    del config["critic"]
    for section, key in (
        (config["trainer"], "experiment_name"),
        (config["trainer"], "default_local_dir"),
        (config["actor_rollout_ref"]["rollout"]["trace"], "experiment_name"),
    ):
        section.pop(key)
    return config


def test_merging_and_building_here_equals_hydra_and_the_preflight():
    from verl.utils.config import omega_conf_to_dataclass

    from hpo_verl.verl_plugin.run_validation import check_with_verl

    for i, (recipe, extra, hardware, algorithm) in enumerate(rotation()):
        overrides = [*extra, f"hardware={hardware}", f"algo={algorithm}"]
        real = without_hydra(compose_recipe(recipe, overrides))
        assert check_settings(PlannedRun(recipe, (), Path(), composed=real)).status == "ok"
        check_with_verl(real)
        resolved = OmegaConf.to_container(real, resolve=True)
        if i % 4 == 0:
            section = resolved["actor_rollout_ref"]["rollout"]
            assert omega_conf_to_dataclass(OmegaConf.create(section)) == build(section)
        ours = copy.deepcopy(dict(with_algorithm(recipe, extra, hardware, algorithm)))
        assert without_names(ours) == without_names(resolved)
