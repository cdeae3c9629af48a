"""Runs are read, grouped by their seed alone, averaged and drawn; what is no run is named."""

import json
import math
import warnings

import pandas as pd
import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from hpo_verl.cli import app
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.figures import draw_curves
from hpo_verl.report.runs import (
    comparable_settings,
    curves_of,
    group_runs,
    read_run,
    read_runs,
    runs_table,
)

SUCCESS = "val-core/countdown/acc/mean@1"


def write_run(folder, seed=0, alpha_min=0.1, after=0.3, **summary):
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "data": {"seed": seed, "train_files": f"/cache/data-{seed}/train.parquet"},
        "algorithm": {"hpo": {"alpha_min": alpha_min}},
        "trainer": {"experiment_name": "tiny", "default_local_dir": str(folder)},
        "ray_kwargs": {"ray_init": {"num_cpus": seed}},
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    lines = [
        {"step": 0, "data": {SUCCESS: 0.1}},
        {"step": 1, "data": {"timing_s/step": 9.0}},
        {"step": 2, "data": {"timing_s/step": 2.0}},
        {"step": 3, "data": {"timing_s/step": 4.0, SUCCESS: after}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "algorithm": "a_hpo",
        "steps": 3,
        "seed": seed,
        "success_before": 0.1,
        "success_after": after,
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", seed=7))
    assert (run.name, run.seed) == ("tiny a_hpo", 7)
    # Of the seconds the median: the first step of a run is slower than the others.
    passes = {name: run.numbers.pop(name) for name in ("pass@4", "pass@8")}
    assert all(map(math.isnan, passes.values()))
    assert run.numbers == {"steps": 3, "before": 0.1, "after": 0.3, "s/step": 4.0}
    assert run.curve.to_dict() == {0: 0.1, 3: 0.3}


def test_a_mean_over_sources_is_named(tmp_path):
    folder = write_run(tmp_path / "a")
    row = {"step": 3, "data": {"val-core/other/acc/mean@1": 0.5, SUCCESS: 0.3}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(folder)
    assert (run.name, run.curve.to_dict()) == ("tiny a_hpo, mean of countdown, other", {3: 0.4})


def test_only_the_seed_may_differ_within_a_group(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (11, 12)]
    folders.append(write_run(tmp_path / "other", seed=11, alpha_min=0.5))
    groups = group_runs(read_runs(folders))
    assert {label: [run.seed for run in group] for label, group in groups.items()} == {
        "tiny a_hpo alpha_min=0.1": [11, 12],
        "tiny a_hpo alpha_min=0.5": [11],
    }


def test_a_seed_that_is_part_of_another_number_is_no_seed(tmp_path):
    first = write_run(tmp_path / "a", seed=1)
    second = write_run(tmp_path / "b", seed=2)
    text = (second / "config.yaml").read_text().replace("data-2", "data-12")
    (second / "config.yaml").write_text(text)
    assert len(group_runs(read_runs([first, second]))) == 2


def test_table_has_runs_means_and_intervals(tmp_path):
    folders = [
        write_run(tmp_path / str(seed), seed=seed, after=after)
        for seed, after in enumerate((0.2, 0.3, 0.4))
    ]
    lines = runs_table(group_runs(read_runs(folders))).splitlines()
    assert "tiny a_hpo" in lines
    run = next(line for line in lines if "20.0%" in line)
    assert run.split() == ["seed", "0", "3", "10.0%", "20.0%", "4.0"]
    mean = next(line for line in lines if line.startswith("3 seeds"))
    assert "10.0% [10.0%, 10.0%]" in mean
    assert "30.0% [20.0%, 40.0%]" in mean


def test_pass_at_k_is_shown_where_it_was_measured(tmp_path):
    folder = write_run(tmp_path / "a")
    row = {"step": 3, "data": {SUCCESS: 0.3, "val-core/countdown/acc/pass@4": 0.75}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    lines = runs_table(group_runs(read_runs([folder]))).splitlines()
    assert lines[-2].split() == ["steps", "before", "after", "pass@4", "s/step"]
    assert lines[-1].split() == ["seed", "0", "3", "10.0%", "30.0%", "75.0%", "-"]


def test_two_seeds_have_a_mean_and_no_interval(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, after=seed / 10) for seed in (1, 2)]
    mean = next(
        line
        for line in runs_table(group_runs(read_runs(folders))).splitlines()
        if line.startswith("2 seeds")
    )
    assert "15.0%" in mean
    assert "[" not in mean


def test_a_run_without_validation_leaves_no_mean(tmp_path):
    folders = [write_run(tmp_path / "1", seed=1), write_run(tmp_path / "2", seed=2, after=None)]
    (folders[1] / "metrics.jsonl").write_text("")
    text = runs_table(group_runs(read_runs(folders)))
    mean = next(line for line in text.splitlines() if line.startswith("2 seeds"))
    assert mean.split()[-2:] == ["-", "-"]


def test_a_table_goes_on_below_where_the_terminal_is_narrow(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / str(seed), seed=seed, after=seed / 10) for seed in (1, 2, 3)]
    arguments = ["report", *map(str, folders), "--picture", str(tmp_path / "x.png")]
    monkeypatch.setenv("COLUMNS", "60")
    narrow = CliRunner().invoke(app, arguments).stdout
    # The name of the picture is one word.
    assert all(len(line) <= 60 for line in narrow.splitlines()[:-1])
    monkeypatch.setenv("COLUMNS", "200")
    wide = CliRunner().invoke(app, arguments).stdout
    assert max(map(len, wide.splitlines()[:-1])) > 60
    assert set(wide.split()) <= set(narrow.split())


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture(tmp_path, suffix):
    folders = [write_run(tmp_path / str(s), seed=s, after=s / 10) for s in (1, 2, 3)]
    folders.append(write_run(tmp_path / "other", seed=1, alpha_min=0.5))
    picture = tmp_path / f"picture.{suffix}"
    arguments = ["report", *map(str, folders), "--picture", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"picture: {picture}" in result.output
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)
    assert not list(tmp_path.glob(".picture*"))


def test_a_curve_has_the_steps_that_all_seeds_have(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, after=seed / 10) for seed in (1, 2)]
    line = json.dumps({"step": 2, "data": {SUCCESS: 0.9}})
    (folders[0] / "metrics.jsonl").open("a").write(line + "\n")
    (curves,) = curves_of(group_runs(read_runs(folders))).values()
    assert curves.index.tolist() == [0, 3]
    assert curves.to_numpy().tolist() == [[0.1, 0.1], [0.1, 0.2]]


def test_nothing_validated_is_no_picture(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text("")
    picture = tmp_path / "picture.png"
    result = CliRunner().invoke(app, ["report", str(folder), "--picture", str(picture)])
    assert "no picture: no run was validated" in result.output
    assert not picture.exists()


def test_without_a_run_all_folders_are_named(tmp_path):
    run = write_run(tmp_path / "runs" / "good")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        read_runs([tmp_path / "none", tmp_path / "unfinished", tmp_path / "runs"])
    message = str(caught.value)
    assert f"{tmp_path}/none is not a folder" in message
    assert f"{tmp_path}/unfinished is no finished run: it has no summary.json" in message
    assert f"it contains runs, such as {run}" in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1, "da\n', "is no readable run"),
        ("metrics.jsonl", None, "has no metrics.jsonl"),
        ("config.yaml", "a: [\n", "is no readable run"),
    ],
)
def test_a_damaged_run_is_left_out_and_the_others_are_shown(tmp_path, file, content, words):
    good, bad, stray = write_run(tmp_path / "good"), write_run(tmp_path / "bad"), tmp_path / "a.txt"
    stray.write_text("")
    (bad / file).unlink()
    if content is not None:
        (bad / file).write_text(content)
    said = []
    assert [run.folder for run in read_runs([bad, good, stray, good], said.append)] == [good]
    assert len(said) == 3
    assert words in said[0]
    assert said[1].endswith("a.txt is not a folder; it is left out")
    assert said[2].endswith("good is given twice; it is left out")


def test_a_dollar_in_a_name_is_no_mathematics(tmp_path):
    frame = pd.DataFrame({0: [0.1, 0.2]}, index=[0, 1])
    draw_curves({"costs $^$ or $5": frame}, "", tmp_path / "a.svg")
    assert "costs $^$ or $5 (1)" in (tmp_path / "a.svg").read_text()


def test_a_run_that_has_not_finished_is_left_out_and_the_others_are_shown(tmp_path):
    good, unfinished = write_run(tmp_path / "good"), write_run(tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    picture = tmp_path / "picture.png"
    arguments = ["report", str(unfinished), str(good), "--picture", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    first, *rest = result.output.splitlines()
    assert first == (
        f"warning: {unfinished} is no finished run: it has no summary.json; it is left out"
    )
    assert any(line.startswith("seed ") for line in rest)
    with pytest.raises(DataError, match="is no finished run"):
        read_runs([unfinished])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"algorithm": "a", "steps": "many", "seed": 0}'),
        (
            "summary.json",
            '{"algorithm": "a", "steps": 1, "seed": "(a+)+", "success_before": 0, '
            '"success_after": 0}',
        ),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", "not json\n"),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("config.yaml", "- a list\n"),
        ("config.yaml", "a: [\n"),
    ],
)
def test_damaged_files_name_the_run(tmp_path, file, content):
    folder = write_run(tmp_path / "a")
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=f"{folder} is no readable run: .") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_the_same_settings_and_seed_do_not_count_twice(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    with pytest.raises(DataError, match="same settings and seed"):
        group_runs(runs)


@pytest.mark.parametrize("place", ["/proc/p.png", "/none/p.png", "{here}", f"{'a' * 300}.png"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, place):
    here = tmp_path / "a.png"
    here.mkdir()
    arguments = ["report", str(write_run(tmp_path / "a")), "--picture", place.format(here=here)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "must be a file in a folder where files can be made (" in str(result.exception)
    assert result.output == ""


def test_a_name_moves_no_cursor_and_a_missing_letter_is_no_warning(tmp_path):
    folder = write_run(tmp_path / "a\x1b[31m")
    config = (
        (folder / "config.yaml").read_text().replace("tiny", '"red \\e[31m\\n \u6f22 \\U0001F600"')
    )
    (folder / "config.yaml").write_text(config)
    torn = write_run(tmp_path / "torn\x1b[31m")
    (torn / "config.yaml").write_text("a: [\n")
    said = []
    groups = group_runs(read_runs([folder, torn], said.append))
    assert [
        line for line in said if "\\x1b[31m" in line and "\x1b" not in line and "\n" not in line
    ]
    (label,) = groups
    assert label.startswith("red \\x1b[31m \u6f22 \U0001f600 a_hpo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(curves_of(groups), "", tmp_path / "a.png")


def test_a_picture_of_another_format_is_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    result = CliRunner().invoke(app, ["report", str(folder), "--picture", str(tmp_path / "p.gif")])
    assert isinstance(result.exception, ConfigError)
    assert ".png, .svg, .pdf" in str(result.exception)


def test_only_the_seed_is_blotted_out_not_a_digit_of_a_word():
    values = {
        "strategy": "fsdp2", "layers": "linear_fc1, level0", "name": "run_seed2",
        "path": "/cache/tiny-2/train.parquet", "hour": "12", "seed": 2,
    }  # fmt: skip
    assert comparable_settings(OmegaConf.create(values), 2) == {
        "strategy": "fsdp2", "layers": "linear_fc1, level0", "name": "run_seed<seed>",
        "path": "/cache/tiny-<seed>/train.parquet", "hour": "12",
    }  # fmt: skip
