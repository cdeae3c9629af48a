"""Conversations with a calculator in the real trainer: whole, round by round, and branching."""

import json

import pytest
from real_runs import STEPS, read_metrics, repeatable, rollouts, run_to_end

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]

TOOLS = {
    "calculator": ("a_hpo", "data.max_response_length=96"),
    "calculator_rounds": ("eapo", "data.max_response_length=24"),
    "calculator_branching": ("aepo_advantage", "data.max_response_length=96"),
}
# The tiny policy is surer after a reply than before, by more than the recipe's threshold permits.
OFTEN = ["actor_rollout_ref.rollout.custom.branching.threshold=0.0"]


def train(cache, folder, tool):
    """Metrics of every step of a short run."""
    algorithm, length = TOOLS[tool]
    run_to_end(
        cache,
        folder,
        *("task=countdown_tool_tiny", f"+tool={tool}", f"algo={algorithm}", length),
        *("trainer.val_before_train=true", "trainer.save_freq=-1"),
        f"trainer.rollout_data_dir={rollouts(folder)}",
        *(OFTEN if tool == "calculator_branching" else ()),
    )
    return read_metrics(folder)


@pytest.mark.parametrize("tool", TOOLS)
def test_three_steps(tool, cache, tmp_path):
    metrics = train(cache, tmp_path / tool, tool)
    steps = [metrics[step] for step in range(1, STEPS + 1)]
    assert all(0 < data["actor/grad_norm"] < 100 for data in steps)
    lines = (rollouts(tmp_path / tool) / "1.jsonl").read_text().splitlines()
    texts = [one["input"] + one["output"] for one in map(json.loads, lines)]
    # The tool was asked, and its reply read.
    assert any("tool\n" in text for text in texts)
    if tool == "calculator_rounds":
        assert all(1 < data["hpo/eapo_rounds"] <= 4 for data in steps)
    if tool == "calculator_branching":
        assert all(0 < data["hpo/branched_session_fraction"] < 1 for data in steps)
        assert all(abs(data["hpo/tool_entropy_change"]) < 5 for data in steps)
    again = train(cache, tmp_path / "again", tool)
    assert repeatable(again) == repeatable(metrics)
