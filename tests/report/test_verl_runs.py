"""Runs through verl: what is kept, which two are a pair, and what the table says."""

import json

import pytest
from omegaconf import OmegaConf
from verl_folders import write_verl_run

from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.errors import DataError
from hpo_verl.report.verl_pairs import obstacle, paired, verl_text
from hpo_verl.report.verl_runs import (
    described_algorithm,
    is_verl_run,
    merged_runs,
    read_verl_run,
    read_verl_runs,
    write_verl_runs,
)


def runs_of(folder, *given):
    return [
        read_verl_run(write_verl_run(folder / str(number), **arguments))
        for number, arguments in enumerate(given)
    ]


def test_a_run_is_read(tmp_path):
    folder = write_verl_run(tmp_path / "a", "a_hpo", seed=3)
    assert is_verl_run(folder)
    assert not is_verl_run(tmp_path)
    run = read_verl_run(folder)
    facts = {key: run.facts[key] for key in run.facts if key != "settings"}
    assert facts == {
        "recipe": "tiny", "algorithm": "a_hpo", "seed": 3, "steps": 20, "seconds": 3600.0,
        "versions": {"verl": "0.9.1"}, "commit": "0123456789ab+", "policy": "p0", "data": ["d3"],
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    assert run.curve.to_dict() == {0: 0.1, 10: 0.3, 20: 0.5}
    assert run.rows.loc[run.rows["step"] == 1, "alpha"].item() == 0.25
    # Where files lie says nothing, and is nobody's concern.
    assert not [value for value in run.facts["settings"].values() if "/cache" in value]


@pytest.mark.parametrize(
    ("name", "algorithm", "changes"),
    [
        ("gspo", "gspo", {}),
        ("grpo_token_mean", "grpo_token_mean", {}),
        ("grpo adv_estimator=a_hpo", "grpo", {"algorithm.adv_estimator": "a_hpo"}),
        ("a_hpo alpha_min=0.2", "a_hpo", {"algorithm.hpo.alpha_min": 0.2}),
    ],
)
def test_an_algorithm_is_named_as_one_would_ask_for_it(tmp_path, name, algorithm, changes):
    run = read_verl_run(write_verl_run(tmp_path / "a", algorithm, **changes))
    assert run.facts["algorithm"] == described_algorithm(run.facts["settings"]) == name


def test_runs_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "kept" / "runs.parquet"
    assert read_verl_runs(path) == []
    runs = runs_of(tmp_path, {"algorithm": "a_hpo"}, {"algorithm": "grpo", "seed": 1})
    write_verl_runs(path, runs)
    for run, other in zip(runs, read_verl_runs(path), strict=True):
        assert run.facts == other.facts
        assert run.rows.equals(other.rows)
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"runs\.parquet: holds no runs of hpo-verl train"):
        read_verl_runs(path)


def test_the_same_run_is_kept_once(tmp_path):
    first, again, other = runs_of(
        tmp_path,
        {"algorithm": "grpo"},
        {"algorithm": "grpo", "curve": (0.4, 0.4)},
        {"algorithm": "a_hpo"},
    )
    assert [run.curve.iloc[-1] for run in merged_runs([first, other], [again])] == [0.5, 0.4]


def test_a_run_without_its_manifest_is_refused(tmp_path):
    folder = write_verl_run(tmp_path / "a", "grpo")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=rf"{folder}: cannot be kept: FileNotFoundError"):
        read_verl_run(folder)
    (folder / "manifest.json").write_text(json.dumps({"git": None}))
    with pytest.raises(DataError, match=rf"{folder}: cannot be kept: KeyError: 'created'"):
        read_verl_run(folder)


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        ({}, ""),
        ({"policy": "p1"}, "another first policy"),
        ({"steps": 30}, "20 steps against 30"),
        ({"data.train_batch_size": 32}, "data.train_batch_size: 16 against 32"),
        ({"seed": 1}, "no run of `grpo` with this recipe and seed"),
        ({"trainer.experiment_name": "b"}, "no run of `grpo` with this recipe and seed"),
    ],
)
def test_which_two_runs_are_a_pair(tmp_path, baseline, reason):
    runs = runs_of(tmp_path, {"algorithm": "a_hpo"}, {"algorithm": "grpo", **baseline})
    pair, own = paired(runs)
    assert pair.reason == reason
    assert pair.baseline == (None if reason else runs[1])
    assert (own.baseline, own.reason) == (None, "")
    text = verl_text(runs)
    assert ("Not paired:" in text) == bool(reason)
    assert reason in text


def test_two_runs_of_one_recipe_are_a_pair_wherever_their_files_lie(tmp_path, monkeypatch):
    runs = []
    for algorithm in ("a_hpo", "grpo"):
        monkeypatch.setenv("HPO_VERL_CACHE", f"/cache/of/{algorithm}")
        overrides = [f"algo={algorithm}", "seed=2", f"hydra.run.dir={tmp_path}/runs/{algorithm}"]
        config = without_hydra(compose_recipe("countdown-tiny", overrides))
        resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        folder = write_verl_run(tmp_path / algorithm, algorithm, 2, config=resolved)
        runs.append(read_verl_run(folder))
    ours, theirs = runs
    assert [run.facts["algorithm"] for run in runs] == ["a_hpo", "grpo"]
    assert ours.facts["recipe"] == theirs.facts["recipe"] == "countdown-tiny"
    assert obstacle(ours, theirs) == ""
    changed = {**theirs.facts["settings"], "data.train_batch_size": "7"}
    other = theirs._replace(facts={**theirs.facts, "settings": changed})
    assert obstacle(ours, other).startswith("data.train_batch_size: ")


def test_few_pairs_have_no_interval_and_three_have(tmp_path):
    runs = runs_of(
        tmp_path,
        *({"algorithm": name, "seed": seed} for seed in (0, 1) for name in ("a_hpo", "grpo")),
    )
    # Areas (0.1 + 0.3) / 4 + (0.3 + 0.5) / 4 = 0.3 and (0.1 + 0.2 + 0.2 + 0.3) / 4 = 0.2.
    assert "| tiny | `a_hpo` | 2 | +0.100 (2 pairs: no interval) |" in verl_text(runs)
    more = runs_of(
        tmp_path / "more",
        {"algorithm": "a_hpo", "seed": 2, "curve": (0.3, 0.5)},
        {"algorithm": "grpo", "seed": 2},
    )
    text = verl_text([*runs, *more])
    assert "| tiny | `a_hpo` | 3 | +0.100 [+0.100, +0.100] |" in text
    row = next(line for line in text.splitlines() if "`a_hpo` | 20 |" in line)
    assert row.startswith(
        "| tiny | 0 | `a_hpo` | 20 | 10.0% | 50.0% | 0.300 | +0.100 | 12.5 | 20.0"
    )
    assert verl_text([]) == "not run"
