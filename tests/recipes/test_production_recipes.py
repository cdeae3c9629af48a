"""Recipes, algorithms and hardware, each with each of the others, are ones that verl accepts.

Composing, resolving and instantiating costs more than a second, and there are
some thousand pairs. So Hydra composes each recipe on each hardware without its
algorithm; the algorithm's file is merged in here, and verl's dataclasses are
built once per distinct content. That this changes nothing is tested on
combinations composed by Hydra and checked by the preflight itself.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from composed_recipes import algorithm_file, composed, plain, with_algorithm
from hydra.utils import get_class
from omegaconf import OmegaConf

from hpo_verl.algorithms.registry import LOSSES, OUR_ESTIMATORS
from hpo_verl.checks.data import check_files
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import preparations
from hpo_verl.checks.values import check_settings
from hpo_verl.config.recipes import (
    compose_recipe,
    group_options,
    recipe_names,
    recipes_directory,
    without_hydra,
)
from hpo_verl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PRODUCTION = [
    f"{t}-{s}" for t in ("countdown3", "countdown4", "telelogs") for s in ("1.5b", "3b", "7b")
]
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


def leaves(node, prefix=""):
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name


@pytest.mark.parametrize("kind", ["production", "tiny"])
def test_no_value_has_two_homes(kind):
    """A setting belongs to one group; only `placement` may go over another's."""
    owners = {}
    for path in recipes_directory().glob("*/*.yaml"):
        group = {"backend": "hardware"}.get(path.parent.name, path.parent.name)
        # Task, model and run are of one kind of run each; algorithm and hardware of both.
        other_kind = group in ("task", "model", "run") and ("tiny" in path.stem) != (kind == "tiny")
        if group == "placement" or (other_kind and path.stem != "default"):
            continue
        content = OmegaConf.to_container(OmegaConf.load(path))
        content.pop("defaults", None)
        for leaf in leaves(content):
            owners.setdefault(leaf, set()).add(group)
    shared = {leaf for leaf, groups in owners.items() if len(groups) > 1}
    # The hardware says it for GPUs; a tiny model fills a budget of tokens on the CPU too.
    token_budget = {"actor_rollout_ref.actor.use_dynamic_bsz"} if kind == "tiny" else set()
    # The size of a group is the task's; SPO has none, whatever the task, and batches of
    # as many responses, which no micro-batches of a fixed size divide, whatever the hardware.
    actor = "actor_rollout_ref.actor"
    sizes = {"data.train_batch_size", f"{actor}.ppo_mini_batch_size", f"{actor}.use_dynamic_bsz"}
    spo = {"actor_rollout_ref.rollout.n", *sizes}
    # The CPU has it for repeatability, an algorithm that samples at several temperatures for them.
    seeded = {"actor_rollout_ref.rollout.agent.default_agent_loop"}
    assert shared == token_budget | spo | seeded


@pytest.mark.parametrize("name", PRODUCTION)
def test_a_primary_config_only_combines_groups(name):
    primary = OmegaConf.to_container(OmegaConf.load(recipes_directory() / f"{name}.yaml"))
    assert list(primary) == ["defaults"]


def test_the_nine_recipes_exist_and_a_placement_fits_its_card():
    assert set(PRODUCTION) <= set(recipe_names())
    placements = {path.stem for path in (recipes_directory() / "placement").glob("*.yaml")}
    names = {f"{m}_{h}" for m in group_options("model") for h in HARDWARE}
    assert placements <= names
    small = composed("countdown3-1.5b", (), "1gpu").actor_rollout_ref.actor
    assert not small.fsdp_config.offload_policy
    assert not small.fsdp_config.param_offload
    middle = composed("countdown3-3b", ("model=llama3.2-3b",), "1gpu").actor_rollout_ref.actor
    assert middle.fsdp_config.param_offload
    assert middle.fsdp_config.optimizer_offload
    large = composed("countdown4-7b", (), "1gpu").actor_rollout_ref.actor
    assert large.fsdp_config.offload_policy
    assert not composed(
        "countdown4-7b", (), "8gpu"
    ).actor_rollout_ref.actor.fsdp_config.offload_policy


def checkpoints(recipe, extra=(), hardware="8gpu", algorithm="a_hpo"):
    """Where a run keeps its checkpoints, resolved with its algorithm's own values."""
    config = OmegaConf.masked_copy(
        composed(recipe, extra, hardware), ["names", "seed", "algorithm", "trainer"]
    )
    actor = plain(recipe, extra, hardware)["actor_rollout_ref"]["actor"]
    config = OmegaConf.merge(
        {"data": {"max_response_length": 1}, "actor_rollout_ref": {"actor": actor}},
        config,
        algorithm_file(algorithm),
    )
    return config.trainer.default_local_dir


def test_checkpoints_have_one_absolute_place_per_policy_algorithm_and_seed(monkeypatch, tmp_path):
    chosen = [(r, e) for r, e in VARIANTS if r in ("countdown3-3b", "countdown4-3b")]
    places = {checkpoints(r, e, algorithm=a) for r, e in chosen for a in ALGORITHMS}
    assert len(places) == 3 * len(ALGORITHMS)
    assert all(Path(name).is_absolute() for name in places)
    # The same run, started again on other machines, finds them.
    assert checkpoints("countdown3-3b") == checkpoints("countdown3-3b", hardware="2x8gpu")
    monkeypatch.setenv("HPO_VERL_CHECKPOINTS", str(tmp_path))
    real = compose_recipe("countdown3-3b", ["seed=7"]).trainer
    assert Path(real.default_local_dir) == tmp_path / real.experiment_name
    # verl's loggers use the name as that of one file.
    assert "/" not in real.experiment_name
    assert real.experiment_name.startswith("countdown3-qwen2.5-3b-a_hpo-hpo-token-mean")
    assert real.experiment_name.endswith("seed7")


def test_one_seed_reaches_data_order_and_sampling():
    config = compose_recipe("telelogs-7b", ["seed=7"])
    assert [
        config.data.seed,
        config.actor_rollout_ref.rollout.seed,
        config.actor_rollout_ref.actor.data_loader_seed,
        config.actor_rollout_ref.actor.fsdp_config.seed,
        config.prepare.data.arguments.seed,
    ] == [7] * 5


@pytest.mark.parametrize("backend", ["wandb", "mlflow", "trackio"])
def test_one_override_changes_the_logger(backend):
    from verl.utils.tracking import Tracking

    config = compose_recipe("countdown3-7b", [f"trainer.logger=[console,file,{backend}]"])
    assert list(config.trainer.logger) == ["console", "file", backend]
    assert set(config.trainer.logger) <= set(Tracking.supported_backend)


def test_one_override_selects_the_gated_rows_and_keeps_them_out_of_the_repository():
    synthetic, real = (
        without_hydra(compose_recipe("telelogs-1.5b", [f"prepare.data.arguments.source={source}"]))
        for source in ("synthetic", "hub")
    )
    made = next(iter(preparations(real)))
    assert "--source hub" in made.shown
    assert made.output != next(iter(preparations(synthetic))).output
    assert ROOT not in made.output.parents
    assert Path(real.data.train_files).parent == made.output


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("countdown3-1.5b", ["prepare.data.arguments.train_size=256"]),
        ("countdown4-1.5b", ["prepare.data.arguments.train_size=256"]),
        ("telelogs-1.5b", ["+prepare.data.arguments.train_size=64"]),
    ],
)
def test_the_listed_command_makes_the_data_that_the_recipe_reads(recipe, sizes, tmp_path):
    config = without_hydra(
        compose_recipe(
            recipe,
            [
                *sizes,
                "++prepare.data.arguments.val_size=16",
                f"prepare.data.output={tmp_path / 'data'}",
            ],
        )
    )
    made = next(iter(preparations(config)))
    subprocess.run(made.command(), check=True, cwd=ROOT, capture_output=True)
    assert check_files(PlannedRun(recipe, (), tmp_path, composed=config)).status == "ok"


def test_stock_verl_composes_the_same(tmp_path):
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir"),
            *(str(recipes_directory()), "--config-name", "telelogs-3b"),
            *("algo=dapo", "hardware=1gpu", "--cfg", "job"),
        ],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    text = printed[printed.index("model_engine:") :]
    ours = without_hydra(compose_recipe("telelogs-3b", ["algo=dapo", "hardware=1gpu"]))
    assert OmegaConf.create(text) == ours
