"""What `hpo-verl train` gives to verl's processes, and says of a run that was stopped."""

import shlex
from importlib.util import find_spec
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


def test_loggers_write_into_the_run_folder_unless_the_user_says_where(monkeypatch):
    config = OmegaConf.create({"trainer": {"device": "cpu"}})
    places = {
        "TENSORBOARD_DIR": "/runs/a&b/tensorboard",
        "WANDB_DIR": "/runs/a&b",
        "SWANLAB_LOG_DIR": "/runs/a&b/swanlog",
        "TRACKIO_DIR": "/runs/a&b/trackio",
        "MLFLOW_TRACKING_URI": "sqlite:////runs/a&b/mlflow.db",
    }
    # The launcher reads the metrics, so they stay where it looks.
    fixed = {"VERL_FILE_LOGGER_PATH": "/runs/a&b/metrics.jsonl"}
    reads = (Path(find_spec("verl").origin).parent / "utils" / "tracking.py").read_text()
    assert all(
        f'"{name}"' in reads for name in (fixed | places).keys() - {"WANDB_DIR", "TRACKIO_DIR"}
    )
    for given, taken in ((None, places), ("", places), ("/x", dict.fromkeys(places, "/x"))):
        for name in fixed | places:
            monkeypatch.delenv(name, raising=False)
            if given is not None:
                monkeypatch.setenv(name, given)
        variables = environment(config, Path("/runs/a&b"), Path("/private/hpo-1"))
        assert variables.items() >= (fixed | taken).items()


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
