"""What the production recipes hold, and that a value has one home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from composed_recipes import PRODUCTION, algorithm_file, composed, plain
from omegaconf import OmegaConf

from hpo_verl.checks.data import check_files
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import preparations
from hpo_verl.config.recipes import (
    compose_recipe,
    group_options,
    recipe_names,
    recipes_directory,
    without_hydra,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        yield


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
    names = {f"{m}_{h}" for m in group_options("model") for h in group_options("hardware")}
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
    chosen = [
        ("countdown3-3b", ()),
        ("countdown3-3b", ("model=llama3.2-3b",)),
        ("countdown4-3b", ()),
    ]
    algorithms = group_options("algo")
    places = {checkpoints(r, e, algorithm=a) for r, e in chosen for a in algorithms}
    assert len(places) == 3 * len(algorithms)
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
