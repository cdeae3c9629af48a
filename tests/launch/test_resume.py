"""Where a run starts, what it may change, and what becomes of its metrics and log."""

import json
import os
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from run_files import make_run_files

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.launch import resume
from hpo_verl.runs import checkpoints
from hpo_verl.runs.checkpoints import SEAL, TRACKER


def make_checkpoint(folder, step):
    path = folder / f"global_step_{step}"
    (path / "actor").mkdir(parents=True)
    (path / "actor" / "model_world_size_1_rank_0.pt").write_text(f"weights {step}")
    (path / "data.pt").write_text(f"order {step}")
    checkpoints.seal(path)
    (folder / TRACKER).write_text(str(step))
    return path


def row(step):
    return json.dumps({"step": step, "data": {"loss": step / 7}}) + "\n"


@pytest.fixture
def run(tmp_path):
    """Configuration and folder of a run whose checkpoints lie in its folder."""
    policy, folder = make_run_files(tmp_path)
    config = OmegaConf.create(
        {
            "seed": 3,
            "algorithm": {"adv_estimator": "a_hpo"},
            "data": {
                "train_batch_size": 16,
                "train_files": str(tmp_path / "train.parquet"),
                "val_files": str(tmp_path / "val.parquet"),
            },
            "actor_rollout_ref": {
                "model": {"path": str(policy)},
                "actor": {"policy_loss": {"loss_mode": "hpo"}, "loss_agg_mode": "token-mean"},
            },
            "trainer": {
                "nnodes": 1,
                "n_gpus_per_node": 1,
                "default_local_dir": str(folder / "checkpoints"),
                "resume_mode": "auto",
                "resume_from_path": None,
            },
        }
    )
    return config, folder


def begin(config, folder, go_on=False):
    told = []
    return resume.begin(config, folder, ["hpo-verl"], go_on, told.append), told


def test_verl_is_told_where_a_home_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = OmegaConf.create({"trainer": {"default_local_dir": "~/kept"}})
    resume.place_checkpoints(config, tmp_path / "run")
    assert config.trainer.default_local_dir == str(tmp_path / "kept")


@pytest.fixture
def killed(run):
    """A run of which steps 2 and 4 are whole, and which was killed in step 6."""
    config, folder = run
    assert begin(config, folder) == (None, [])
    for step in (2, 4, 6):
        make_checkpoint(folder / "checkpoints", step)
    (folder / "checkpoints" / "global_step_6" / SEAL).unlink()
    (folder / "checkpoints" / TRACKER).write_text("")
    (folder / "metrics.jsonl").write_text("".join(map(row, range(6))) + row(6)[:9])
    return config, folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_after_its_last_whole_checkpoint(killed):
    config, folder = killed
    chosen, told = begin(config, folder, go_on=True)
    path = folder / "checkpoints" / "global_step_4"
    assert (chosen.path, chosen.step) == (path, 4)
    assert told == [
        f"not used: global_step_6 is incomplete: it has no {SEAL}, so the run ended while it was "
        "saved",
        f"going on after step 4, from {path}",
    ]
    assert config.trainer.resume_mode == "resume_path"
    assert config.trainer.resume_from_path == str(path)
    assert (folder / "metrics.jsonl").read_text() == "".join(map(row, range(5)))
    assert (folder / "checkpoints" / TRACKER).read_text() == "4"


def test_what_has_changed_is_told(killed):
    config, folder = killed
    config.data.train_batch_size = 64
    config.trainer.balance = [1, 2]
    _, told = begin(config, folder, go_on=True)
    assert told[1:4] == [
        "changed since the last start: data.train_batch_size: 16 -> 64",
        "changed since the last start: trainer.balance.0: absent -> 1",
        "changed since the last start: trainer.balance.1: absent -> 2",
    ]
    assert not any("resume_" in text for text in told)


def other_policy(config):
    """A policy of the same tokenizer and other weights."""
    policy = Path(config.actor_rollout_ref.model.path)
    other = Path(shutil.copytree(policy, policy.with_name("other")))
    (other / "model.safetensors").write_bytes(b"other weights")
    return str(other)


CHANGES = {
    "algorithm": lambda config: config.algorithm.update(adv_estimator="grpo"),
    "model": lambda config: config.actor_rollout_ref.model.update(path=other_policy(config)),
    "data.train_files": lambda config: config.data.update(train_files=config.data.val_files),
    "world size": lambda config: config.trainer.update(n_gpus_per_node=2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_the_difference_and_nothing_is_written(killed, name):
    config, folder = killed
    before = contents(folder)
    CHANGES[name](config)
    with pytest.raises(DataError, match=f"checkpoints of a run with another {name}: "):
        begin(config, folder, go_on=True)
    assert contents(folder) == before


def test_damaged_checkpoints_are_an_error_and_nothing_is_written(killed):
    config, folder = killed
    for step in (2, 4):
        (folder / "checkpoints" / f"global_step_{step}" / "data.pt").write_text("other one")
    before = contents(folder)
    for go_on in (True, False):
        with pytest.raises(DataError, match=r"global_step_2 is damaged: data\.pt has 9 bytes"):
            begin(config, folder, go_on)
        assert contents(folder) == before


def test_there_must_be_a_checkpoint_to_resume(run):
    config, folder = run
    with pytest.raises(DataError, match=f"{folder}/checkpoints holds no checkpoint"):
        begin(config, folder, go_on=True)
    assert contents(folder) == {}


@pytest.mark.parametrize("mode", ["disable", "resume_path"])
def test_resume_and_another_mode_contradict_each_other(run, mode):
    config, folder = run
    config.trainer.update(
        {"resume_mode": mode, "resume_from_path": f"{folder}/checkpoints/global_step_4"}
    )
    with pytest.raises(ConfigError, match=f"leave out trainer.resume_mode={mode}"):
        begin(config, folder, go_on=True)


def test_the_mode_auto_takes_whole_checkpoints_only_and_disable_none(killed):
    config, folder = killed
    chosen, _ = begin(config, folder)
    assert chosen.step == 4
    config.trainer.resume_mode = "disable"
    assert begin(config, folder)[0] is None


def test_a_named_checkpoint_must_be_whole_and_its_folder_stays_as_it_is(killed, tmp_path):
    config, folder = killed
    other = tmp_path / "other"
    other.mkdir()
    named = folder / "checkpoints" / "global_step_2"
    config.trainer.update({"resume_mode": "resume_path", "resume_from_path": str(named)})
    config.trainer.default_local_dir = str(other / "checkpoints")
    assert begin(config, other)[0].path == named
    assert (folder / "checkpoints" / TRACKER).read_text() == ""
    (named / "data.pt").write_text("other")
    with pytest.raises(DataError, match=r"global_step_2: the checkpoint is damaged: data\.pt"):
        begin(config, other)
    for wrong in (named.parent / "global_step_3", folder, "global_step_x"):
        config.trainer.resume_from_path = str(wrong)
        with pytest.raises(DataError, match="not a folder global_step_N"):
            resume._starting_point(config, resume=False)


@pytest.mark.parametrize("name", ["metrics.jsonl", f"checkpoints/{TRACKER}", "checkpoints/x"])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path, name):
    resume.refuse_used_folder(tmp_path)
    resume.refuse_used_folder(tmp_path / "none")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith("x"):
        path.with_name("global_step_3").mkdir()
    else:
        path.touch()
        path.write_text("1")
    with pytest.raises(ConfigError, match="holds a run: --resume goes on with it"):
        resume.refuse_used_folder(tmp_path)


def test_the_last_run_is_the_one_that_wrote_last_whatever_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"--resume: no run in .*hydra\.run\.dir="):
        resume.latest_run(tmp_path / "none")
    for name, time in (("2026-01-03_09-00-00", 300), ("2026-01-02_10-00-00", 200), ("mine", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(row(0))
        os.utime(tmp_path / name / "metrics.jsonl", (time, time))
    (tmp_path / "zz").mkdir()
    assert resume.latest_run(tmp_path).name == "2026-01-03_09-00-00"
    tracker = tmp_path / "mine" / "checkpoints" / TRACKER
    tracker.parent.mkdir()
    tracker.write_text("1")
    os.utime(tracker, (400, 400))
    assert resume.latest_run(tmp_path).name == "mine"


@pytest.mark.parametrize(
    ("lines", "step", "expected"),
    [
        ([row(0), row(1), row(2)], 2, 3),
        ([row(0), row(1), row(2)], 1, 2),
        ([row(0), row(1), row(2)[:-1]], 2, 2),
        ([row(0), row(1), '{"st'], 2, 2),
        ([row(0), "\0\0\0\0\n"], 2, 1),
        ([row(1)], 0, 0),
        ([], 3, 0),
    ],
)
def test_metrics_after_the_step_and_torn_lines_are_cut(tmp_path, lines, step, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    resume.cut_metrics(path, step)
    assert path.read_text() == "".join(lines[:expected])


@pytest.mark.parametrize("line", ["{\n", "[]\n", '{"step": null}\n', "3\n"])
def test_a_damaged_line_before_the_last_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(0) + line + row(2))
    with pytest.raises(DataError, match="line 2 is no row of metrics"):
        resume.cut_metrics(path, 1)
    assert path.read_text() == row(0) + line + row(2)


def test_metrics_that_are_not_there_are_not_made(tmp_path):
    resume.cut_metrics(tmp_path / "metrics.jsonl", 1)
    assert os.listdir(tmp_path) == []
