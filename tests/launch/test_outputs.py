"""Metrics are read as they grow; summary and picture follow from them."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hpo_verl.launch.outputs import (
    algorithm_name,
    draw_curve,
    shown_results,
    write_summary,
)
from hpo_verl.runs.metrics import MetricsFile, measured

SUCCESS = "val-core/countdown/acc/mean@1"
LINES = [
    {"step": 0, "data": {SUCCESS: 0.05}},
    {"step": 1, "data": {"hpo/alpha": 0.2, "hpo/positive_fraction": 0.1}},
    {"step": 2, "data": {"hpo/alpha": 0.4, SUCCESS: 0.25, "val-aux/countdown/acc/best@1": 1.0}},
]


def settings(estimator="a_hpo", loss="hpo", loss_agg_mode="token-mean"):
    actor = {"policy_loss": {"loss_mode": loss}, "loss_agg_mode": loss_agg_mode}
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator},
            "actor_rollout_ref": {"actor": actor},
            "seed": 3,
        }
    )


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    file = MetricsFile(path)
    file.read_new()
    return file


def test_only_complete_lines_are_read(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read_new() == []
    line = json.dumps(LINES[0]) + "\n"
    file.path.write_text(line + line[:10])
    assert file.read_new() == [(0, LINES[0]["data"])]
    file.path.write_text(line + line)
    assert file.read_new() == [(0, LINES[0]["data"])]
    assert len(file.rows) == 2


def test_series_and_success(metrics):
    assert metrics.series("hpo/alpha") == ([1, 2], [0.2, 0.4])
    assert metrics.success() == ([0, 2], [0.05, 0.25])
    assert MetricsFile(metrics.path).success() == ([], [])


@pytest.mark.parametrize(
    ("rows", "success", "sources"),
    [
        # A reward that returns no `acc`: verl validates by its score.
        ([{"val-core/own/reward/mean@1": 0.5}], [0.5], ["reward of own"]),
        # Failed responses change the number in the key.
        ([{"val-core/a/acc/mean@4": 0.5}, {"val-core/a/acc/mean@3": 0.7}], [0.5, 0.7], ["a"]),
        ([{"val-core/a/acc/mean@2/acc/mean@1": 0.5}], [0.5], ["a/acc/mean@2"]),
        ([{"val-core/a/acc/mean@2": 0.9, "val-core/b/c/acc/mean@2": 0.1}], [0.5], ["a", "b/c"]),
        ([{"val-core/a/acc/mean@1": 0.2}, {"val-core/b/acc/mean@1": 0.4}], [0.2, 0.4], ["a", "b"]),
        ([{"val-aux/a/reward/mean@1": 0.2, "val-core/a/acc/best@4": 1.0}], [], []),
    ],
)
def test_success_is_the_mean_over_all_sources(rows, success, sources):
    file = MetricsFile(Path("none"), list(enumerate(rows)))
    assert file.success()[1] == success
    assert file.sources() == sources


def test_pass_at_k_is_the_mean_over_sources():
    rows = [
        (0, {"val-core/a/acc/pass@8": 0.2, "val-core/b/c/reward/pass@8": 0.4}),
        (1, {"val-core/a/acc/pass@80": 1.0, "val-aux/a/acc/pass@8": 1.0, "pass@8": 1.0}),
        (2, {"val-core/a/acc/pass@1": 0.1, "val-core/a/acc/pass@8": 0.5}),
    ]
    found = MetricsFile(Path("none"), rows).pass_at_k()
    assert found == {1: ([2], [0.1]), 8: ([0, 2], [pytest.approx(0.3), 0.5]), 80: ([1], [1.0])}
    assert list(found) == [1, 8, 80]


def test_one_validation_at_the_end_counts(tmp_path):
    rows = [(2, {"val-core/a/acc/mean@1": 0.25, "val-core/b/acc/mean@1": 0.75})]
    metrics = MetricsFile(tmp_path / "none", rows)
    summary = write_summary(tmp_path, settings(), metrics, seconds=1)
    assert (summary["success_before"], summary["success_after"]) == (None, 0.5)
    told = next(shown_results(tmp_path, "countdown-tiny", []))
    assert told == "success on held-out prompts, mean of a, b: 50.0% after"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["a"], ""),
        (["reward of a"], ", reward of a"),
        (["a", "reward of b"], ", mean of a, reward of b"),
    ],
)
def test_what_success_is(sources, words):
    assert measured(sources) == words


def test_a_dollar_in_a_title_or_a_source_is_no_mathematics(tmp_path):
    rows = [(0, {"val-core/a $^$/acc/mean@1": 0.5, "val-core/b/acc/mean@1": 0.5})]
    assert draw_curve(tmp_path, MetricsFile(tmp_path, rows), "costs $^$ or $5").is_file()


def test_summary(tmp_path, metrics):
    summary = write_summary(tmp_path, settings(), metrics, seconds=12.34)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    versions = summary.pop("versions")
    assert versions["verl"] == "0.9.1"
    assert summary == {
        "algorithm": "a_hpo",
        "steps": 2,
        "seconds": 12.3,
        "success_before": 0.05,
        "success_after": 0.25,
        "pass_at_k": {},
        "validated_on": ["countdown"],
        "seed": 3,
    }


def test_summary_without_validation_has_no_success(tmp_path):
    summary = write_summary(tmp_path, settings(), MetricsFile(tmp_path / "none"), seconds=1)
    assert (summary["steps"], summary["success_before"], summary["success_after"]) == (
        0,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("estimator", "loss", "loss_agg_mode", "name"),
    [
        ("a_hpo", "hpo", "token-mean", "a_hpo"),
        ("a_hpo", "hpo", "seq-mean-token-sum-norm", "a_hpo"),
        ("a_hpo", "vanilla", "token-mean", "a_hpo"),
        ("a_hpo", "vanilla", "seq-mean-token-mean", "hysteretic_grpo"),
        ("hpo", "hpo", "token-mean", "hpo"),
        ("hpo", "vanilla", "seq-mean-token-mean", "hpo"),
        ("grpo", "vanilla", "seq-mean-token-mean", "grpo"),
        ("grpo", "vanilla", "token-mean", "grpo"),
        ("grpo", "mhpo", "seq-mean-token-mean", "grpo+mhpo"),
        ("hapo", "hapo", "token-mean", "hapo"),
        ("eapo", "gspo", "seq-mean-token-mean", "eapo"),
        ("a_hpo", "gspo", "seq-mean-token-mean", "a_hpo+gspo"),
    ],
)
def test_algorithm_names(estimator, loss, loss_agg_mode, name):
    assert algorithm_name(settings(estimator, loss, loss_agg_mode)) == name


def test_curve_is_a_picture(tmp_path, metrics):
    picture = draw_curve(tmp_path, metrics, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_curve_has_a_panel_for_all_that_was_measured(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    measures = ("hpo/response_length_positive", "actor/entropy", "val-core/a/acc/pass@4")
    for rows in ([(0, {SUCCESS: 0.5})], [(1, dict.fromkeys(measures, 0.5))]):
        draw_curve(tmp_path, MetricsFile(tmp_path, rows), "title")
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure in drawn]
    assert labels == [["success rate"], ["success rate", "tokens", "entropy"]]
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[1].axes[0].lines}
    assert lines["pass@4"] == [0.5]


def test_what_the_user_is_told(tmp_path, metrics):
    write_summary(tmp_path, settings(), metrics, seconds=1)
    overrides = ["seed=3", "hydra.run.dir=old", "tasks=[a, b]", "trainer.total_training_steps=2"]
    told = list(shown_results(tmp_path, "countdown-tiny", overrides))
    assert told == [
        "success on held-out prompts: 5.0% before, 25.0% after",
        f"picture: {tmp_path}/curve.png",
        "a longer run: hpo-verl train countdown-tiny seed=3 'tasks=[a, b]' "
        "trainer.total_training_steps=10",
    ]
    (tmp_path / "policy").mkdir()
    passes = [(2, {"val-core/a/acc/pass@1": 0.25, "val-core/a/acc/pass@8": 0.5})]
    write_summary(tmp_path, settings(), MetricsFile(tmp_path / "none", passes), seconds=1)
    told = list(shown_results(tmp_path, "countdown-tiny", []))
    assert told[0] == "by the last validation: pass@1 25.0%, pass@8 50.0%"
    write_summary(tmp_path, settings(), MetricsFile(tmp_path / "none"), seconds=1)
    told = list(shown_results(tmp_path, "countdown-tiny", []))
    assert told[:2] == [f"picture: {tmp_path}/curve.png", f"policy:  {tmp_path}/policy"]
