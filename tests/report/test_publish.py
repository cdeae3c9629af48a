"""Results that are kept, and the page that speaks of them."""

import json
import shutil

import pytest
from lab_results import made_up_results

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.publish import fill, publish, results_directory
from hpo_verl.report.studies import write_results

PAGE = "Before.\n<!-- results: sparse -->\nold\n<!-- end -->\nAfter.\n"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_kept_and_the_page_follows_from_them_alone(tmp_path):
    gains = {"a_hpo": 0.05, "grpo": 0.03}
    results = made_up_results("sparse", gains, lambda cell: gains[cell["variant"]], seeds=3)
    write_results(tmp_path / "run" / "1.parquet", results)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "README.md").write_text(PAGE)
    publish([tmp_path / "run"], kept)
    text = (kept / "README.md").read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| `a_hpo`"))
    # Success 0.1 + 0.01 seed + 0.05 per step of four: 0.31 at the end, 0.21 on average.
    assert "| 3 | 0 | 512 | 0.130 [0.120, 0.140] | 0.160 [0.150, 0.170] | 0.310 [" in row
    # grpo gains 0.03 per step.
    assert "| 0.040 [0.040, 0.040] | 1.00 [1.00, 1.00] |" in row
    manifest = json.loads((kept / "manifest.json").read_text())["sparse"]
    assert (manifest["runs"], manifest["seeds"]) == (6, [0, 1, 2])
    assert manifest["environments"][0]["commit"] == "abc"
    files = files_of(kept)
    assert any(path.name.endswith("-curves.svg") for path in files)
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
    for name in ("README.md", "manifest.json"):
        assert (kept / name).read_text() == (results_directory() / name).read_text()
