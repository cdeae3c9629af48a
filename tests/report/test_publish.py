"""Results that are kept, the page that speaks of them, and a user's own report."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from lab_results import made_up_results
from verl_folders import write_verl_run

from hpo_verl import cli
from hpo_verl.config.recipes import study_names
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.publish import fill, publish, results_directory, write_report
from hpo_verl.report.studies import read_results, write_results

NUMBERS = ["none", "one", "two", "three", "four", "five", "six"]
NUMBERS += ["seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS += [str(number) for number in range(13, 100)]
GAINS = {"grpo": 0.03, "a_hpo": 0.05}
BLOCKS = ("terms", "map", "recommendations", "effects", "rates", "why", "verl", "hours")
PAGE = "Before.\n" + "".join(f"<!-- results: {name} -->\nold\n<!-- end -->\n" for name in BLOCKS)


def gain(cell):
    return GAINS[cell["variant"]]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "README.md").write_text(PAGE + "After.\n")
    (folder / "comparisons.yaml").write_text("- {question: Both, ours: a_hpo, theirs: grpo}")
    return folder


def lag_runs(folder, seeds, lag, gain=gain):
    results = made_up_results("lag", gain, list(GAINS), seeds, **{"training.lag": [lag]})
    write_results(folder / "all.parquet", results)
    return folder


def test_the_page_follows_from_what_is_kept_alone(tmp_path, kept):
    publish([lag_runs(tmp_path / "run", range(3), 4)], kept)
    text = (kept / "README.md").read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("<!-- end -->\nAfter.\n")
    assert "old\n" not in text
    assert "### sparsity\n\nnot run" in text
    assert "| sampled by a policy 4 steps old | `a_hpo` | 3 | 0 |" in text
    assert "| +0.040 [+0.040, +0.040] | +0.020 [+0.020, +0.020] | 3 |" in text
    manifest = json.loads((kept / "manifest.json").read_text())
    assert list(manifest) == ["lag"]
    assert (manifest["lag"]["runs"], manifest["lag"]["seeds"]) == (6, [0, 1, 2])
    # Each of them took 36 seconds.
    assert manifest["lag"]["hours"] == 0.06
    assert manifest["lag"]["environments"] == [
        {"commit": "abc", "versions": {"torch": "2"}, "machine": "test"}
    ]
    assert "| **all** | 6 | 0 | 0.1 | test | abc | torch 2 |" in text
    files = files_of(kept)
    assert {path.name for path in files} == {
        "README.md", "comparisons.yaml", "manifest.json", "map.svg", "lag.parquet"
    }  # fmt: skip
    publish([], kept)
    assert files_of(kept) == files


def test_later_runs_are_added_and_replace_their_like(tmp_path, kept):
    publish([lag_runs(tmp_path / "1", range(3), 4)], kept)
    worse = lag_runs(tmp_path / "3", range(2, 3), 4, lambda cell: 0.0)
    publish([lag_runs(tmp_path / "2", range(2), 16), worse], kept)
    results = read_results(kept / "lag.parquet")
    assert len(results) == 6 + 4
    ends = {
        (result.cell["training"]["lag"], result.cell["seed"]): result.rows["success"].iloc[-1]
        for result in results
        if result.cell["variant"] == "a_hpo"
    }
    # What ended at 0.1 + 0.01 seed + 4 * 0.05 ends at 0.12 now.
    expected = {(4, 0): 0.3, (4, 1): 0.31, (4, 2): 0.12, (16, 0): 0.3, (16, 1): 0.31}
    assert ends == pytest.approx(expected)


def test_a_kept_study_without_a_file_is_refused_and_nothing_is_written(tmp_path, kept):
    results = made_up_results("lag", gain, list(GAINS))
    for result in results:
        result.cell["study"] = "old"
    write_results(kept / "old.parquet", results)
    before = files_of(kept)
    with pytest.raises(ConfigError, match=r"old\.parquet: 'old' is no study of recipes/lab: "):
        publish([lag_runs(tmp_path / "1", range(3), 4)], kept)
    assert files_of(kept) == before


def test_runs_through_verl_are_kept_beside(tmp_path, kept):
    publish([write_verl_run(tmp_path / "a", "a_hpo"), write_verl_run(tmp_path / "g", "grpo")], kept)
    publish([lag_runs(tmp_path / "1", range(3), 4)], kept)
    publish([write_verl_run(tmp_path / "b", "a_hpo", seed=1)], kept)
    text = (kept / "README.md").read_text()
    row = next(line for line in text.splitlines() if "`a_hpo` | 20 | 10.0% | 50.0%" in line)
    assert "| 0.300 | +0.100 |" in row
    assert "- `a_hpo`, tiny, seed 1: no run of `grpo` with this recipe and seed" in text
    manifest = json.loads((kept / "manifest.json").read_text())
    assert (manifest["through verl"]["runs"], manifest["through verl"]["hours"]) == (3, 3.0)
    files = files_of(kept)
    publish([], kept)
    assert files_of(kept) == files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: b -->", "is not closed"),
        ("<!-- results: b", "is not closed"),
        ("<!-- results: b --><!-- end -->", "no results for the block 'b': a"),
    ],
)
def test_a_block_that_cannot_be_filled_is_an_error(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        fill(text, {"a": "1"}, tmp_path)


def test_a_missing_folder_is_refused_and_changes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such folder or file"):
        publish([tmp_path / "nothing"], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_page_of_this_repository_says_what_its_results_say(tmp_path):
    kept = shutil.copytree(results_directory(), tmp_path / "kept")
    publish([], kept)
    for name in ("README.md", "manifest.json", "map.svg"):
        assert (kept / name).read_text() == (results_directory() / name).read_text()
    # Every study stands on the page, run or not.
    text = (kept / "README.md").read_text()
    assert all(f"### {study}\n" in text for study in study_names())


def test_the_readme_counts_regimes_as_the_recommendations_do():
    """Regimes, and how many are better, worse and undecided, of the two methods that it names."""
    page = (results_directory() / "README.md").read_text()
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    counts = {
        row[1]: [NUMBERS[int(cell)] for cell in row[3:7]]
        for row in rows
        if len(row) == 10 and row[2] == "the same"
    }
    regimes, better, worse, _ = counts["`hysteretic_grpo` - `grpo`"]
    assert f"with ten paired seeds in {regimes} regimes:" in readme
    assert f"faster than GRPO in {better} of them, and slower in {worse}." in readme
    regimes_too, ahead, behind, undecided = counts["`a_hpo` - `grpo`"]
    assert regimes_too == regimes
    told = f"cannot be told from GRPO in {undecided}, is behind it in {behind}, and ahead in"
    assert f"{told} {ahead}:" in readme


def test_the_report_says_what_was_measured(tmp_path, monkeypatch, capsys):
    lag_runs(tmp_path / "runs", range(3), 4)
    out = tmp_path / "report"
    arguments = ["hpo-verl", "lab", "report", str(tmp_path / "runs"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert str(out / "report.md") in capsys.readouterr().out
    page = (out / "report.md").read_text()
    for text in ("+0.040 [+0.040, +0.040]", '"commit": "abc"', "](pictures/lag-1.svg)"):
        assert text in page
    # What the study's file plans is no matter of a user's own runs.
    assert "not run" not in page
    assert (out / "pictures" / "lag-1.svg").read_bytes().startswith(b"<?xml")


def test_a_report_of_a_tuned_study_names_the_rates(tmp_path):
    write_results(
        tmp_path / "run" / "1.parquet", made_up_results("tuned", gain, list(GAINS), range(4))
    )
    page = write_report([tmp_path / "run"], tmp_path / "report").read_text()
    assert "| best rate |" in page
    assert "| countdown3 | `a_hpo` | 0.215 |" in page


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no finished run"):
        write_report([tmp_path / "empty"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
