"""A misspelt key in a file of the user's own recipe is named, and nothing else is."""

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner
from verl.workers.config import RolloutConfig

from hpo_verl.checks import keys
from hpo_verl.checks.keys import check_keys
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.cli import app
from hpo_verl.config.recipes import recipe_names, recipes_directory
from hpo_verl.launch.new_task import make_task

HEAD = "defaults:\n  - countdown-tiny\n  - _self_\n"


@pytest.fixture
def look(tmp_path):
    """A function: the text of a recipe that builds on countdown-tiny, overrides -> the finding."""

    def run(text, *overrides, head=HEAD):
        (tmp_path / "mine.yaml").write_text(head + text)
        return check_keys(PlannedRun(str(tmp_path / "mine.yaml"), overrides))

    return run


@pytest.mark.parametrize(
    ("text", "name", "closest"),
    [
        (
            "trainer: {total_training_step: 3}",
            "trainer.total_training_step",
            "total_training_steps",
        ),
        ("trianer: {test_freq: 3}", "trianer", "trainer"),
        ("data: {max_prompt_lenght: 3}", "data.max_prompt_lenght", "max_prompt_length"),
        ("trainer: {lr: 3}", "trainer.lr", "actor_rollout_ref.actor.optim.lr"),
        ("algorithm: {hpo: {alpa_min: 1}}", "algorithm.hpo.alpa_min", "alpha_min"),
        ("reward: {guard: {time_limits: 1}}", "reward.guard.time_limits", "time_limit"),
        ("seeds: 3", "seeds", "seed"),
        (
            "actor_rollout_ref: {actor: {policy_loss: {loss_mod: hpo}}}",
            "actor_rollout_ref.actor.policy_loss.loss_mod",
            "loss_mode",
        ),
        (
            "actor_rollout_ref: {rollout: {val_kwargs: {temprature: 1}}}",
            "actor_rollout_ref.rollout.val_kwargs.temprature",
            "temperature",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_its_file_and_the_nearest(look, tmp_path, text, name, closest):
    finding = look(text)
    assert finding.status == "error"
    assert finding.detail.startswith(f"{tmp_path}/mine.yaml: unknown setting {name}: did you mean ")
    assert re.search(rf" {re.escape(closest)}(\?| or )", finding.detail)


@pytest.mark.parametrize(
    "text",
    [
        "actor_rollout_ref: {model: {override_config: {rope_theta: 1}}}",
        "actor_rollout_ref: {rollout: {engine_kwargs: {vllm: {anything: 1}, sglang: {x: 1}}}}",
        "actor_rollout_ref: {rollout: {custom: {mine: 1}}}",
        "reward: {custom_reward_function: {reward_kwargs: {strict: true}}}",
        "reward: {reward_kwargs: {max_resp_len: 3, overlong_buffer_cfg: {enable: true}}}",
        "data: {apply_chat_template_kwargs: {enable_thinking: false}, cache_dir: /x}",
        "names: {task: mine, other: x}",
        "prepare: {mine: {module: data_prep.rows, output: /x, arguments: {val_size: 2}}}",
        "ray_kwargs: {ray_init: {log_to_driver: false, runtime_env: {env_vars: {MINE: '1'}}}}",
        "folder: /x\nmine: {steps: 3}\ntrainer: {experiment_name: '${folder}-${mine.steps}'}",
        "transfer_queue: {backend: {Yuanrong: {port: 1}}}",
        # A field of the class that verl makes of the section, without a default in its files.
        "algorithm: {gdpo_reward_keys: [a]}",
        "trainer: {v1: {sampler: {poll_interval: 1}}}",
    ],
)
def test_what_is_open_or_read_is_not_refused(look, text):
    assert look(text).status == "ok"


def test_fields_of_verls_classes_are_read(look):
    rollout = keys._known()["actor_rollout_ref"]["rollout"]
    others = [
        field.name for field in dataclasses.fields(RolloutConfig) if field.name not in rollout
    ]
    assert others
    content = {"actor_rollout_ref": {"rollout": dict.fromkeys(others, 1)}}
    assert look(OmegaConf.to_yaml(OmegaConf.create(content))).status == "ok"


def test_an_override_with_a_plus_is_the_users_word(look):
    assert look("", "+trainer.mine=3").status == "ok"


def test_files_that_a_recipe_builds_on_and_its_groups(look, tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "base.yaml").write_text(HEAD + "trainer: {test_frq: 1}\n")
    finding = look("", head="defaults: [base, _self_]\n")
    assert finding.detail.startswith(f"{tmp_path}/base.yaml: unknown setting trainer.test_frq: ")
    (tmp_path / "base.yaml").write_text(HEAD)
    head = "defaults:\n  - countdown-tiny\n  - override task: own\n  - _self_\n"
    group = (recipes_directory() / "task" / "countdown_tiny.yaml").read_text()
    (tmp_path / "task" / "own.yaml").write_text(group)
    assert look("", head=head).status == "ok"
    (tmp_path / "task" / "own.yaml").write_text(group.replace("max_prompt_length", "max_prompts"))
    finding = look("", head=head)
    assert finding.detail.startswith(
        f"{tmp_path}/task/own.yaml: unknown setting data.max_prompts: "
    )
    (tmp_path / "task" / "own.yaml").write_text(group.replace("# @package _global_\n", ""))
    assert "begins with the line `# @package _global_`" in look("", head=head).detail


def test_no_recipe_of_ours_is_refused_where_a_file_of_the_users_holds_it(tmp_path):
    """Each recipe and group, copied into a folder of the user's."""
    known = keys._known()
    for file in [*recipes_directory().glob("*.yaml"), *recipes_directory().glob("*/*.yaml")]:
        if file.parent.name != "lab":
            content = OmegaConf.to_container(OmegaConf.load(file))
            content.pop("defaults", None)
            assert list(keys._unknown(content, known)) == [], file
    for recipe in recipe_names():
        (tmp_path / "copy.yaml").write_text((recipes_directory() / f"{recipe}.yaml").read_text())
        assert check_keys(PlannedRun(str(tmp_path / "copy.yaml"), ())).status == "ok"
        assert (
            check_keys(PlannedRun(recipe, ())).detail == "no file of the recipe is the user's own"
        )


def test_the_recipe_of_init_with_other_groups(tmp_path):
    make_task(tmp_path / "mine")
    for choice in ("model=smollm2-135m", "model=qwen3-0.6b", "hardware=1gpu", "algo=gspo"):
        assert check_keys(PlannedRun(f"{tmp_path}/mine/recipe.yaml", (choice,))).status == "ok"


def test_train_says_it_in_one_line_and_starts_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text(HEAD + "trainer: {total_training_step: 3}\n")
    result = CliRunner().invoke(app, ["train", f"{tmp_path}/mine.yaml"])
    assert f"keys: {tmp_path}/mine.yaml: unknown setting trainer.total_training_step: " in str(
        result.exception
    )


def test_what_verl_reads_without_a_default_is_known():
    """`config.SECTION.get("KEY")` anywhere in verl, and in its dataset."""
    package = Path(find_spec("verl").origin).parent
    known = keys._known()
    pattern = re.compile(r'config\.((?:data|trainer|reward|algorithm)(?:\.\w+)*)\.get\("(\w+)"')
    found = set()
    for folder in ("trainer", "workers", "utils", "experimental/agent_loop"):
        for file in (package / folder).rglob("*.py"):
            found |= set(pattern.findall(file.read_text()))
    dataset = (package / "utils" / "dataset" / "rl_dataset.py").read_text()
    found |= {("data", key) for key in re.findall(r'config\.get\("(\w+)"', dataset)}
    assert len(found) > 30
    for section, key in found:
        node = known
        for part in section.split("."):
            node = node[part]
        assert node is None or key in node, (section, key)
