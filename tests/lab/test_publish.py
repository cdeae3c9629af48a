"""Results that are kept, and the pages that speak of them."""

import dataclasses
import json

import pytest
from lab_policies import made_up_result

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab.publish import draw_kept, fill, keep, results_directory, write_pages
from hpo_verl.lab.results import write_result
from hpo_verl.lab.settings import read_study
from hpo_verl.lab.trainer import Outcome

STEPS = 4
PAGE = "Before.\n<!-- results: sparse/countdown3-0.05 -->\nold\n<!-- end -->\nAfter.\n"


@pytest.fixture
def folder(tmp_path):
    study = read_study(
        "sparse", ["seeds=3", f"training.steps={STEPS}", "tasks=[countdown3]", "warm_starts=[0.05]"]
    )
    gains = {"a_hpo": 0.05, "grpo": 0.03}
    for cell in study.cells():
        if cell.variant in gains:
            curve = [0.1 + gains[cell.variant] * step for step in range(STEPS + 1)]
            result = made_up_result(dataclasses.asdict(cell), curve)
            names = list(result.columns)
            rows = [
                dict(zip(names, values, strict=True))
                for values in zip(*result.columns.values(), strict=True)
            ]
            facts = {k: result.facts[k] for k in ("status", "seconds", "warm_start_success")}
            write_result(tmp_path / "run", cell, Outcome(rows, facts), "the command")
    return tmp_path / "run"


def test_results_are_kept_and_pages_follow_from_them_alone(folder, tmp_path):
    kept, page = tmp_path / "kept", tmp_path / "PAGE.md"
    page.write_text(PAGE)
    keep([folder], kept)
    write_pages(kept, [page])
    draw_kept(kept)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| `a_hpo`"))
    # Success 0.1 + 0.05 per step: 0.3 at the end, 0.2 on average; grpo 0.1 + 0.03.
    assert "| 3 | 0 | 0.120 [0.120, 0.120] | 0.150 [0.150, 0.150] | 0.300 [0.300, 0.300] |" in row
    assert "| 0.040 [0.040, 0.040] | 1.00 [1.00, 1.00] |" in row
    manifest = json.loads((kept / "manifest.json").read_text())["sparse"]
    assert (manifest["runs"], manifest["seeds"]) == (6, [0, 1, 2])
    assert manifest["environments"][0]["command"] == "the command"
    files = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert any(path.name.endswith("-curves-dark.svg") for path in files)
    write_pages(kept, [page])
    draw_kept(kept)
    assert page.read_text() == text
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == files


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


def test_an_empty_folder_is_refused_and_changes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        keep([tmp_path / "nothing"], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_pages_of_this_repository_say_what_its_results_say(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in results_directory().glob("*.parquet"):
        (kept / path.name).write_bytes(path.read_bytes())
    originals = [results_directory() / "README.md"]
    copies = [tmp_path / f"{i}.md" for i in range(len(originals))]
    for original, copy in zip(originals, copies, strict=True):
        copy.write_text(original.read_text())
    write_pages(kept, copies)
    for original, copy in zip(originals, copies, strict=True):
        assert copy.read_text() == original.read_text()
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest == json.loads((results_directory() / "manifest.json").read_text())
