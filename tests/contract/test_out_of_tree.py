"""An algorithm of another package, installed beside hpo_verl: no file of this project names it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "helpers" / "example_algorithm"


def run(command, *folders):
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd="/",
    )  # fmt: skip


def worker(*overrides):
    script = ROOT / "tests" / "contract" / "out_of_tree_worker.py"
    return run([script, EXAMPLE / "recipes", *overrides], EXAMPLE)


def test_it_is_registered_composed_from_its_own_folder_and_has_its_gradient():
    result = worker()
    assert result.returncode == 0, result.stderr
    line = next(text for text in result.stdout.splitlines() if text.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    assert found["absent"] == []
    assert found["warnings"] == []
    assert found["section"] == "ExamplePolicyLossConfig"
    # -3 tanh(r / 3) A, averaged over two tokens: r = e^.3 with A = 1, e^-.2 with A = -2.
    ratios, advantages = (math.exp(0.3), math.exp(-0.2)), (1.0, -2.0)
    tanh = [math.tanh(ratio / 3) for ratio in ratios]
    parts = zip(tanh, advantages, strict=True)
    assert found["loss"] == pytest.approx(sum(-3 * t * a for t, a in parts) / 2, rel=1e-5)
    assert found["gradient"] == pytest.approx(
        [-r * (1 - t * t) * a / 2 for r, t, a in zip(ratios, tanh, advantages, strict=True)],
        rel=1e-5,
    )


def test_its_settings_and_aggregations_are_checked_like_ours():
    result = worker("actor_rollout_ref.actor.policy_loss.scale=0")
    assert "policy_loss.scale = 0: must be a number in (0, inf)" in result.stderr
    result = worker("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean")
    assert "policy_loss.loss_mode = 'example_loss' permits token-mean only" in result.stderr


def test_the_command_lists_it():
    result = run(["-m", "hpo_verl", "list"], EXAMPLE)
    assert result.returncode == 0, result.stderr
    (line,) = [text for text in result.stdout.splitlines() if text.split()[:1] == ["example"]]
    assert line.endswith("-s tanh(r / s) A")


def test_an_entry_point_that_cannot_be_loaded_is_named_in_one_line(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hpo_verl.algorithms]\nmine = nowhere:RECORD\n")
    result = run(["-m", "hpo_verl", "list"], tmp_path)
    assert result.returncode == 2
    expected = "entry point 'mine' = 'nowhere:RECORD' of hpo_verl.algorithms"
    (line,) = [text for text in result.stderr.splitlines() if expected in text]
    assert line.endswith("No module named 'nowhere'")
