"""Overrides that people wrote, by the row of README.md that tells of each."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.recipes import compose_recipe
from hpo_verl.errors import ConfigError

NAME = "trainer.experiment_name"
FOLDERS = [
    (1, "hydra.run.dir=/tmp/r%1"),
    (2, "hydra.run.dir=/tmp/r*1"),
    (3, "hydra.run.dir=/tmp/a@b"),
    (4, "hydra.run.dir=/tmp/r#1"),
    (79, "hydra.run.dir=/tmp/a&b"),
    (85, "hydra.run.dir=/tmp/a b"),
]


@pytest.mark.parametrize(("row", "override"), FOLDERS)
def test_folders_with_odd_letters(row, override):
    config = compose_recipe("countdown-tiny", [override])
    assert config.hydra.run.dir == override.partition("=")[2]


def test_a_list_with_blanks():
    """Row 7."""
    config = compose_recipe("countdown-tiny", ["trainer.logger=[console, file]"])
    assert list(config.trainer.logger) == ["console", "file"]


WRONG = [
    (5, f"{NAME}=李明", f"as a text: \"{NAME}='李明'\""),
    (8, "seed=0,1", "one command for each value"),
    (8, "algo=grpo,gspo", "one"),
]


@pytest.mark.parametrize(("row", "override", "words"), WRONG)
def test_arguments_that_are_explained(row, override, words):
    with pytest.raises(ConfigError) as error:
        compose_recipe("countdown-tiny", [override])
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_a_checkpoint_with_an_equals_sign():
    """Row 6."""
    path = "/x/epoch=1/global_step_2"
    config = compose_recipe("countdown-tiny", [f"trainer.resume_from_path={path}"])
    assert config.trainer.resume_from_path == path


def rows_of(path, count):
    """A file in verl's schema."""
    row = {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": "1 2 = 3"}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
    }
    pq.write_table(pa.Table.from_pylist([row] * count), path)
    return path


@pytest.fixture
def found(tmp_path, monkeypatch):
    """A function: overrides and names of checks -> errors and warnings, with 80 rows of data."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    files = [
        f"data.train_files={rows_of(tmp_path / 'train.parquet', 80)}",
        f"data.val_files={rows_of(tmp_path / 'val.parquet', 8)}",
    ]

    def run(overrides, names):
        planned = PlannedRun("countdown-tiny", (*files, *overrides), tmp_path / "run")
        checks = [check for check in CHECKS if check.name in names]
        findings = run_checks(planned, checks)
        return [f"{f.status}: {f.detail}" for f in findings if f.status in ("error", "warning")]

    return run


REFUSED = [
    (34, ["data.val_files=null"], "data files"),
    (36, ["data.train_batch_size=128"], "data files"),
    (45, ["ray_kwargs.ray_init.num_cpus=2"], "cards"),
]


@pytest.mark.parametrize(("row", "overrides", "name"), REFUSED)
def test_settings_that_cannot_work(found, row, overrides, name):
    findings = found(overrides, {"settings", "steps", "data files", name})
    assert any(finding.startswith("error") for finding in findings), findings


def test_the_same_settings_as_they_should_be(found):
    steps = ["trainer.total_epochs=30", "trainer.total_training_steps=30"]
    assert found(steps, {"settings", "steps", "data files", "schema"}) == []
