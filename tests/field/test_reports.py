"""Names of runs and folders in reports, by the row of README.md that tells of each."""

import json
import os

import pytest
from omegaconf import OmegaConf

from hpo_verl.launch.resume import latest_run
from hpo_verl.report.runs import group_runs, read_runs, runs_table

SUCCESS = "val-core/countdown/acc/mean@1"


def write_run(folder, name="tiny", seed=1):
    """A run of three steps with one validation before and one after."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "trainer": {"experiment_name": name}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    steps = [{SUCCESS: 0.1}, {"timing_s/step": 2.0}, {"timing_s/step": 2.0, SUCCESS: 0.3}]
    lines = [json.dumps({"step": i, "data": data}) + "\n" for i, data in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    numbers = {"success_before": 0.1, "success_after": 0.3, "steps": 2, "seed": seed}
    (folder / "summary.json").write_text(json.dumps({"algorithm": "a_hpo", **numbers}))
    return folder


@pytest.mark.parametrize("name", ["x[/b]", "ablation[lr]", ":smile: ü 漢"])
def test_names_with_markup_are_shown_as_they_are(tmp_path, name):
    """Row 20."""
    table = runs_table(group_runs(read_runs([write_run(tmp_path / "a", name)])))
    assert name in table


def test_folders_that_look_like_a_glob(tmp_path):
    """Row 42."""
    run = write_run(tmp_path / "x[1]*")
    assert [found.seed for found in read_runs([run])] == [1]


def test_the_latest_run_is_the_one_that_wrote_last(tmp_path):
    """Row 38."""
    for name, when in (("mine", 1000), ("2026-11-28", 3000), ("2026-11-29", 2000)):
        os.utime(write_run(tmp_path / name) / "metrics.jsonl", (when, when))
    assert latest_run(tmp_path).name == "2026-11-28"
