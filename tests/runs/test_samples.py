"""Sampled responses as a text that no response can break."""

import io
import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hpo_verl.launch.progress import TrainingProgress
from hpo_verl.runs.metrics import MetricsFile
from hpo_verl.runs.samples import samples_file, samples_text
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07 \r\x08\u202e\u2028\x85 \ud800 :bomb: [red]x[/red]\n\n"
    "sample 2: reward 1"
)


def test_prompts_responses_and_rewards():
    text = samples_text(10, [("3 11", "so\n 11", 1.0), ("7 2", "", 0.25)], [1.0, 0.25, 0.0, 0.0])
    assert text.splitlines() == [
        *("step 10: 2 of 4 responses, whose mean reward is 0.3125", "", "sample 1: reward 1"),
        *("  prompt:", "    | 3 11", "  response (6 letters):", "    | so", "    |  11", ""),
        *("sample 2: reward 0.25", "  prompt:", "    | 7 2", "  response (0 letters):", "    | "),
    ]


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "\n" * 10**6, "x" * 10**6, "x y " * 10**5, " " * 10**5]
)
def test_hostile_text_is_escaped_and_bounded(hostile):
    text = samples_text(0, [(hostile, hostile, float("nan"))] * 8, [0.0])
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    lines = text.splitlines()
    assert len(lines) < 8 * 60
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("sample ") for line in lines) == 8
    text.encode()


def test_the_middle_of_a_long_response_is_left_out():
    text = samples_text(0, [("?", f"first {'x' * 5000} last", 0.0)], [0.0])
    assert "| first x" in text
    assert text.endswith("x last\n")
    assert "    | [... 3411 letters ...]" in text


@pytest.fixture
def trainer(tmp_path):
    logged = []

    class Verl:
        def _maybe_log_val_generations(self, inputs, outputs, scores):
            logged.append(len(inputs))

    class Trainer(LifeCycle, Verl):
        def __init__(self):
            self._folder, self.global_steps = tmp_path, 10
            self.config = OmegaConf.create({"trainer": {"log_val_generations": 0}})

    made = Trainer()
    made.logged = logged
    return made


def test_every_validation_leaves_samples_of_the_same_prompts(trainer, tmp_path):
    prompts = [f"question {i}" for i in range(20)]
    for step, order in ((0, prompts), (10, prompts[::-1])):
        trainer.global_steps = step
        trainer._maybe_log_val_generations(order, ["a"] * 20, [0.5] * 20)
    assert trainer.logged == [20, 20]
    first, second = (samples_file(tmp_path, step).read_text() for step in (0, 10))
    assert first.replace("step 0", "step 10") == second
    assert second.startswith("step 10: 8 of 20 responses, whose mean reward is 0.5\n")
    trainer.config.trainer.log_val_generations = 12
    trainer._maybe_log_val_generations(prompts, ["a"] * 20, [0.5] * 20)
    assert "12 of 20" in samples_file(tmp_path, 10).read_text()
    trainer.global_steps = 20
    trainer._maybe_log_val_generations([], [], [])
    assert not samples_file(tmp_path, 20).exists()


@pytest.mark.parametrize("wanted", [True, False])
def test_they_are_shown_on_request_and_as_they_are(wanted, trainer, tmp_path):
    trainer._maybe_log_val_generations(["größer?"], [HOSTILE], [1.0])
    row = {"step": 10, "data": {"val-core/x/acc/mean@1": 0.5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    output = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    shown = TrainingProgress(Console(file=output, width=60), samples=wanted)
    config = OmegaConf.create({"trainer": {"total_training_steps": 30}})
    shown.show(config, MetricsFile(tmp_path / "metrics.jsonl"), "step 10: validating")
    output.flush()
    text = output.buffer.getvalue().decode("latin-1")
    assert "step 10/30" in text
    assert ("\n    | größer?\n" in text) is wanted
    assert (r"\x1b[2J\x1b]0;title\x07 \r\x08\u202e\u2028\x85 \ud800 :bomb: [red]" in text) is wanted
