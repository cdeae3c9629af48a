"""Under stock verl, too, a run goes on from whole checkpoints only."""

import pytest
from omegaconf import OmegaConf

from hpo_verl.config.recipes import compose_recipe
from hpo_verl.errors import EXIT_BAD_INPUT, EXIT_FAILED
from hpo_verl.launch import preflight, resume
from hpo_verl.runs import checkpoints
from hpo_verl.runs.process import MARKER


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A configuration whose checks pass, with checkpoints of steps 2 and 4."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
        (folder / f"global_step_{step}" / "actor" / "weights").write_text(str(step))
        (folder / f"global_step_{step}" / "data.pt").write_text(str(step))
        checkpoints.seal(folder / f"global_step_{step}")
    (folder / checkpoints.TRACKER).write_text("")
    config = OmegaConf.create(
        {
            "hydra": {"run": {"dir": str(tmp_path / "run")}},
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {}}}},
            "trainer": {
                "device": "cpu",
                "default_local_dir": None,
                "resume_mode": "auto",
                "resume_from_path": None,
            },
        }
    )
    OmegaConf.set_struct(config, True)
    monkeypatch.delenv(MARKER, raising=False)
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setattr(preflight, "check", lambda config: None)
    monkeypatch.setattr(preflight.cluster, "forward_environment", lambda config: None)
    monkeypatch.setattr(resume, "checked_manifest", lambda config, command: ("{}\n", {}))
    return config, folder


def test_the_newest_whole_checkpoint_is_what_verl_is_told(started, capsys):
    config, folder = started
    (folder / "global_step_4" / "data.pt").write_text("5")
    preflight.Preflight().on_run_start(config)
    assert config.trainer.resume_mode == "resume_path"
    assert config.trainer.resume_from_path == str(folder / "global_step_2")
    assert "not used: global_step_4 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "cache"), [("", "/home/me/.cache/hpo_verl"), ("~/x", "/home/me/x"), ("x", "{here}/x")]
)
def test_the_folders_of_the_environment_under_stock_verl(monkeypatch, tmp_path, given, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("HPO_VERL_CACHE", given)
    monkeypatch.setenv(MARKER, "recorded already")
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.setenv(name, "elsewhere")
    config = compose_recipe("countdown-tiny", [f"hydra.run.dir={tmp_path / 'run'}", "seed=3"])
    preflight.Preflight().on_run_start(config)
    folder = cache.format(here=tmp_path)
    assert config.data.train_files == f"{folder}/countdown-tiny-3/train.parquet"
    # verl resolves the configuration in one of Ray's processes.
    forwarded = config.ray_kwargs.ray_init.runtime_env.env_vars.get("HPO_VERL_CACHE")
    assert forwarded == (folder if given else None)


def test_stock_verl_with_several_runs_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        preflight.Preflight().on_multirun_start(compose_recipe("countdown-tiny", []))
    assert ended.value.code == EXIT_BAD_INPUT
    assert "error: settings: hydra.mode=MULTIRUN: must be RUN; " in capsys.readouterr().err


def test_no_whole_checkpoint_ends_the_start(started, capsys):
    config, folder = started
    for step in (2, 4):
        (folder / f"global_step_{step}" / checkpoints.SEAL).unlink()
    with pytest.raises(SystemExit) as ended:
        preflight.Preflight().on_run_start(config)
    assert ended.value.code == EXIT_BAD_INPUT
    assert f"{folder} holds no complete checkpoint" in capsys.readouterr().err


def test_a_defect_of_a_check_ends_the_start_too(started, monkeypatch, capsys):
    """Hydra would warn, and verl would train unchecked."""
    config, _ = started

    def break_down(config):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(preflight, "check", break_down)
    with pytest.raises(SystemExit) as ended:
        preflight.Preflight().on_run_start(config)
    assert ended.value.code == EXIT_FAILED
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err


def test_what_the_launcher_has_checked_is_not_checked_again(tmp_path, monkeypatch):
    """On a cluster, with Hydra's own part, of which much is not set yet."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv(MARKER, "recorded already")
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.setenv(name, "elsewhere")

    def check(config):
        raise AssertionError("`hpo-verl train` has made every check already")

    monkeypatch.setattr(preflight, "check", check)
    config = compose_recipe("countdown-tiny", [f"hydra.run.dir={tmp_path / 'run'}"])
    preflight.Preflight().on_run_start(config)
    assert config.trainer.default_local_dir == str(tmp_path / "run" / "checkpoints")


def test_stock_verl_on_a_cluster_refuses_a_relative_folder(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.delenv(MARKER, raising=False)
    relative = compose_recipe("countdown-tiny", ["hydra.run.dir=run"])
    with pytest.raises(SystemExit) as ended:
        preflight.Preflight().on_run_start(relative)
    assert ended.value.code == EXIT_BAD_INPUT
    assert "error: paths: hydra.run.dir=run: must be absolute" in capsys.readouterr().err
