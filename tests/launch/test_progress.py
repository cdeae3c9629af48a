"""What a user sees of a run, and how long it may show no progress."""

import io
import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hpo_verl.launch import progress
from hpo_verl.launch.progress import NoProgress, ProgressBound, TrainingProgress
from hpo_verl.runs.metrics import MetricsFile

CONFIG = OmegaConf.create({"trainer": {"total_training_steps": 30}})
VALIDATION = {"val-core/countdown/acc/mean@1": 0.25}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def screen(tmp_path, clock):
    """Lines shown after each look at a run without a terminal."""
    output = io.StringIO()
    shown = TrainingProgress(Console(file=output, width=200, force_terminal=False))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")

    def look(stage, *rows):
        with metrics.path.open("a") as file:
            for step, data in rows:
                file.write(json.dumps({"step": step, "data": data}) + "\n")
        output.truncate(0)
        output.seek(0)
        shown.show(CONFIG, metrics, stage)
        return [" ".join(line.split()) for line in output.getvalue().splitlines()]

    return look


def test_stages_are_shown_until_training_begins(screen, clock):
    clock.now = 12.0
    assert screen("starting Ray") == ["starting Ray 12 s"]
    assert screen("starting Ray") == []
    clock.now = 40.0
    assert screen("loading the policy") == ["loading the policy 40 s"]
    assert screen("step 0: validating") == ["step 0: validating 40 s"]
    assert screen("step 1: sampling", (0, VALIDATION)) == ["step 0/30 held-out success 25.0% 40 s"]
    assert screen("step 1: updating") == []


def test_a_mean_over_sources_is_named(screen):
    (line,) = screen("s", (0, {**VALIDATION, "val-core/b/reward/mean@1": 0.75}))
    assert line == "step 0/30 held-out success, mean of countdown, reward of b 50.0% 0 s"


def test_validations_and_the_last_step_are_shown_and_other_steps_once_a_minute(screen, clock):
    screen("step 1: sampling", (0, VALIDATION))
    assert screen("s", (1, {"timing_s/step": 2.0}))[0].startswith("step 1/30")
    assert screen("s", (2, {}), (3, {})) == []
    assert screen("s", (4, VALIDATION))[0].startswith("step 4/30")
    clock.now = 61.0
    assert screen("s", (5, {}), (6, {})) == ["step 5/30 held-out success 25.0% 61 s"]
    assert screen("s", (30, {}))[0].startswith("step 30/30")


def test_a_long_step_says_what_it_does_once_a_minute(screen, clock):
    screen("step 1: sampling", (0, VALIDATION))
    clock.now = 60.5
    assert screen("step 1: [b]updating") == ["step 1: [b]updating 60 s"]
    clock.now = 120.0
    assert screen("step 1: [b]updating") == []
    clock.now = 121.0
    assert screen("step 1: [b]updating") == ["step 1: [b]updating 121 s"]


def test_a_run_without_progress_is_ended(clock):
    bound = ProgressBound(20, "a.key")
    for now in range(0, 21, 4):
        clock.now = float(now)
        bound.check("step 3: sampling", 2)
    clock.now = 24.0
    message = "no progress for 20 s while it was 'step 3: sampling'; a.key=20 permits no more"
    with pytest.raises(NoProgress, match=message):
        bound.check("step 3: sampling", 2)


@pytest.mark.parametrize("change", [("step 3: updating", 2), ("step 3: sampling", 3)])
def test_a_new_stage_or_a_new_row_is_progress(clock, change):
    bound = ProgressBound(20, "a.key")
    for _ in range(3):
        bound.check("step 3: sampling", 2)
        clock.now += 4.0
        bound.check(*change)
        for _ in range(4):
            clock.now += 4.0
            bound.check(*change)


def test_time_in_which_the_launcher_was_suspended_does_not_count(clock):
    bound = ProgressBound(20, "a.key")
    bound.check("x")
    clock.now = 10_000.0
    bound.check("x")


def test_without_a_bound_a_run_may_take_any_time(clock):
    bound = ProgressBound(None, "a.key")
    for now in range(0, 10_000, 4):
        clock.now = float(now)
        bound.check("x")


def test_a_terminal_shows_the_stage_as_it_is(clock, tmp_path):
    output = io.StringIO()
    shown = TrainingProgress(Console(file=output, width=200, force_terminal=True))
    with shown:
        shown.show(CONFIG, MetricsFile(tmp_path / "none"), "step 1: [b]updating")
    assert "step 1: [b]updating" in output.getvalue()
