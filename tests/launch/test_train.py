"""What `hpo-verl train` gives to verl's processes, and says of a run that was stopped."""

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hpo_verl.launch.train import environment, stopped_message


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_temporary_files_go_to_the_runs_own_folder(device):
    config = OmegaConf.create({"trainer": {"device": device}})
    variables = environment(config, Path("/runs/a"), Path("/private/hpo-1"))
    assert variables["TMPDIR"] == "/private/hpo-1"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_joins_a_cluster_must_find_it(device, monkeypatch):
    # Ray looks for this machine's cluster where temporary files go.
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    config = OmegaConf.create({"trainer": {"device": device}})
    assert "TMPDIR" not in environment(config, Path("/runs/a"), Path("/private/hpo-1"))


@pytest.mark.parametrize(("timeline", "kept"), [(None, False), ("timeline.json", True)])
def test_events_of_tasks_are_kept_for_a_timeline_only(timeline, kept):
    config = OmegaConf.create(
        {"trainer": {"device": "cpu"}, "ray_kwargs": {"timeline_json_file": timeline}}
    )
    variables = environment(config, Path("/runs/a"), Path("/private/hpo-1"))
    assert ("RAY_task_events_report_interval_ms" not in variables) == kept


def test_a_stopped_run_names_its_checkpoint_and_the_command_that_goes_on(tmp_path):
    checkpoints = tmp_path / "elsewhere"
    checkpoints.mkdir()
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("17")
    config = OmegaConf.create({"trainer": {"default_local_dir": str(checkpoints)}})
    overrides = ["algo=grpo", "hydra.run.dir=old", "tasks=[a, b]"]
    stopped, command = stopped_message("countdown-tiny", overrides, config, tmp_path).splitlines()
    assert stopped == f"stopped after step 17; checkpoint: {checkpoints}/global_step_17"
    assert shlex.split(command.removeprefix("go on with: ")) == [
        *("hpo-verl", "train", "countdown-tiny", "--resume", "algo=grpo", "tasks=[a, b]"),
        f"hydra.run.dir={tmp_path}",
    ]
