"""verl's own loop, saving and loading, around a model of one number: killed anywhere, it goes on.

Only what needs Ray or a model is replaced. A kill is an exception that nothing catches.
"""

import json
import os

import pytest
import torch
from number_trainer import MODEL, STEPS, Trainer, Worker, settings
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tracking

from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.launch import resume
from hpo_verl.runs import checkpoints, files
from hpo_verl.runs.checkpoints import SEAL, TRACKER
from hpo_verl.verl_plugin.trainer import life_cycle


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(trainer_base.tq, "kv_clear", lambda **options: None)
    # Nothing here depends on what a power failure would leave, and it takes most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def train(folder, monkeypatch, **trainer):
    """One start of the run: from nothing, or from the newest whole checkpoint."""
    folder.mkdir(exist_ok=True)
    config = settings(folder, **trainer)
    if checkpoints.holds_checkpoints(folder / "checkpoints"):
        start = checkpoints.choose(folder / "checkpoints")
        config.trainer.update({"resume_mode": "resume_path", "resume_from_path": str(start.path)})
        resume.cut_metrics(folder / "metrics.jsonl", start.step)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(folder / "metrics.jsonl"))
    run = Trainer(config)
    run._load_checkpoint()
    run.fit(None)
    return run


def state(folder, step):
    """Everything that a checkpoint holds."""
    path = folder / "checkpoints" / f"global_step_{step}"
    assert checkpoints.fault(path) is None
    order = torch.load(path / "data.pt", weights_only=False)
    weight = torch.load(path / "actor" / MODEL, weights_only=False)
    kept = (life_cycle.KL_NAME, life_cycle.KEPT["memory"])
    return weight, repr(order), *((path / name).read_text() for name in kept)


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    """Metrics and last state of a run that nobody kills."""
    folder = tmp_path / "undisturbed"
    train(folder, monkeypatch)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    epochs = [[row["data"]["rows"] for row in rows[first : first + 3]] for first in (1, 4)]
    for epoch in epochs:
        seen = [row for rows_of_step in epoch for row in rows_of_step]
        assert len(set(seen)) == len(seen) == 12
    assert epochs[0] != epochs[1]
    return (folder / "metrics.jsonl").read_bytes(), state(folder, STEPS)


def at_step(number, name, after=False):
    """Patch a method of the trainer so that the run is killed in a step."""

    def patch(monkeypatch):
        plain = getattr(Trainer, name)

        def killing(self, *arguments, **options):
            if self.global_steps == number and not after:
                raise Killed
            result = plain(self, *arguments, **options)
            if self.global_steps == number:
                raise Killed
            return result

        monkeypatch.setattr(Trainer, name, killing)

    return patch


def in_write(module, name, number, torn=True):
    """Patch a function that writes below `global_step_N`, so that the run is killed in it."""

    def patch(monkeypatch):
        plain = getattr(module, name)

        def killing(*arguments, **options):
            path = next((a for a in arguments if f"global_step_{number}/" in str(a)), None)
            if path is None:
                return plain(*arguments, **options)
            if torn:
                with open(path, "wb") as stream:
                    stream.write(b"PK half")
            raise Killed

        monkeypatch.setattr(module, name, killing)

    return patch


def in_tracker(number):
    def patch(monkeypatch):
        def opened(path, *arguments, **options):
            stream = open(path, *arguments, **options)  # noqa: SIM115
            if os.path.exists(path.replace(TRACKER, f"global_step_{number}")):
                raise Killed
            return stream

        monkeypatch.setattr(trainer_base, "open", opened, raising=False)

    return patch


def in_metrics(number):
    def patch(monkeypatch):
        plain = tracking.FileLogger.log

        def torn(self, data, step):
            if step == number:
                self.fp.write(b'{"step":')
                raise Killed
            plain(self, data, step)

        monkeypatch.setattr(tracking.FileLogger, "log", torn)

    return patch


KILLS = {
    "rollout of step 4, at an epoch's end": (at_step(4, "step"), 3),
    "update of step 3": (at_step(3, "step", after=True), 2),
    "first shard of step 4": (in_write(torch, "save", 4), 3),
    "before the tracker of step 5": (in_write(life_cycle, "write_atomically", 5, False), 4),
    "tracker of step 7, at an epoch's end": (in_tracker(7), 6),
    "validation of step 6": (at_step(6, "_validate"), 5),
    "metrics of step 4": (in_metrics(4), 3),
    "seal of step 5": (at_step(6, "seal_checkpoint"), 4),
    "after the seal of step 5": (at_step(6, "seal_checkpoint", after=True), 5),
    "last seal": (at_step(STEPS + 1, "seal_checkpoint"), STEPS - 1),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, undisturbed, kill):
    patch, last_whole = KILLS[kill]
    folder = tmp_path / "killed"
    with monkeypatch.context() as patched:
        patch(patched)
        with pytest.raises(Killed):
            train(folder, monkeypatch)
    assert checkpoints.choose(folder / "checkpoints").step == last_whole
    train(folder, monkeypatch)
    assert ((folder / "metrics.jsonl").read_bytes(), state(folder, STEPS)) == undisturbed


def test_a_run_that_is_killed_in_every_step_gets_there_too(tmp_path, monkeypatch, undisturbed):
    folder = tmp_path / "killed"
    for step in range(2, STEPS + 1):
        with monkeypatch.context() as patched:
            at_step(step, "step", after=True)(patched)
            with pytest.raises(Killed):
                train(folder, monkeypatch)
    train(folder, monkeypatch)
    assert ((folder / "metrics.jsonl").read_bytes(), state(folder, STEPS)) == undisturbed


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch, undisturbed):
    folder = tmp_path / "undisturbed"
    train(folder, monkeypatch)
    assert ((folder / "metrics.jsonl").read_bytes(), state(folder, STEPS)) == undisturbed


def steps_kept(folder):
    return [step for step, _ in checkpoints.step_folders(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("kept", "expected"), [(1, [8]), (2, [8, 7]), (None, list(range(8, 0, -1)))]
)
@pytest.mark.parametrize("start_again", [True, False])
def test_as_many_checkpoints_as_asked_for_are_kept_over_several_starts(
    tmp_path, monkeypatch, kept, expected, start_again
):
    folder = tmp_path / "run"
    if start_again:
        with monkeypatch.context() as patched:
            at_step(5, "step")(patched)
            with pytest.raises(Killed):
                train(folder, monkeypatch, max_actor_ckpt_to_keep=kept)
        assert len(steps_kept(folder)) == (kept or 4)
    train(folder, monkeypatch, max_actor_ckpt_to_keep=kept)
    assert steps_kept(folder) == expected


@pytest.mark.parametrize(("kept", "expected"), [(1, [5, 4]), (2, [5, 4, 3])])
def test_as_many_whole_checkpoints_are_there_until_the_next_is_sealed(
    tmp_path, monkeypatch, kept, expected
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(6, "seal_checkpoint")(patched)
        with pytest.raises(Killed):
            train(folder, monkeypatch, max_actor_ckpt_to_keep=kept)
    assert checkpoints.choose(folder / "checkpoints").step == 4
    assert steps_kept(folder) == expected


@pytest.mark.parametrize("writer", ["save", "seal"])
def test_a_full_disk_ends_the_run_and_leaves_what_is_whole(tmp_path, monkeypatch, writer):
    folder = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    save = Worker.save_checkpoint

    def save_until(self, path, remote, step, max_ckpt_to_keep):
        save(self, path, remote, step, max_ckpt_to_keep)
        if step == 3:
            full()

    def replace_until(source, target, replace=os.replace):
        full() if "global_step_3" in str(target) and SEAL in str(target) else None
        replace(source, target)

    with monkeypatch.context() as patched:
        if writer == "save":
            patched.setattr(Worker, "save_checkpoint", save_until)
        else:
            patched.setattr(files.os, "replace", replace_until)
        with pytest.raises(EnvironmentCheckError) as ended:
            train(folder, monkeypatch)
    assert str(ended.value) == (
        f"{folder}/checkpoints: the disk is full, so global_step_3 was not saved; complete "
        "checkpoints are as they were: make room, then go on with --resume"
    )
    assert steps_kept(folder) == [2, 1]
    chosen = checkpoints.choose(folder / "checkpoints")
    assert (chosen.step, chosen.left_out) == (2, ())


def test_an_error_of_another_kind_stays_what_it_is(tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        raise ValueError("a shape")

    monkeypatch.setattr(Worker, "save_checkpoint", wrong)
    with pytest.raises(ValueError, match="a shape"):
        train(tmp_path / "run", monkeypatch)
    assert steps_kept(tmp_path / "run") == []


def test_what_an_earlier_start_left_of_a_step_is_no_part_of_its_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(4, "step")(patched)
        with pytest.raises(Killed):
            train(folder, monkeypatch)
    stale = folder / "checkpoints" / "global_step_4" / "actor" / "model_world_size_2_rank_1.pt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of two ranks")
    train(folder, monkeypatch)
    assert not stale.exists()
    assert checkpoints.choose(folder / "checkpoints").step == STEPS


def test_checkpoints_that_are_written_later_are_refused(tmp_path):
    config = settings(tmp_path)
    config.actor_rollout_ref.actor.checkpoint = {"async_save": True}
    with pytest.raises(ConfigError, match=r"checkpoint\.async_save=true: must be false"):
        Trainer(config)
