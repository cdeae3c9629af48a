"""Prompts in stages, responses by value, and hints, in the real trainer; on from a checkpoint."""

import json
from collections import Counter

import pytest
from real_runs import STEPS, repeatable, rollouts, train

HINTS = "actor_rollout_ref.rollout.custom.hints"
# Few prompts, so that they come back within three steps.
OURS = [
    *("data.train_max_samples=24", "data.curriculum.by=difficulty", "data.curriculum.stages=3"),
    *("data.curriculum.descending=true", "data.curriculum.cumulative=true"),
    "actor_rollout_ref.rollout.custom.knapsack.enable=true",
]

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def train_and_record(cache, folder, *overrides):
    """Metrics of every step of a short run, which writes its responses beside it."""
    return train(cache, folder, *overrides, f"trainer.rollout_data_dir={rollouts(folder)}")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "prompts"
    return folder, train_and_record(cache, folder, *OURS, "trainer.save_freq=2")


def test_stages_and_responses_by_value(run):
    folder, metrics = run
    steps = [metrics[step] for step in range(1, STEPS + 1)]
    assert [data["hpo/curriculum_stage"] for data in steps] == [1, 2, 3]
    known = [data["hpo/knapsack_known_fraction"] for data in steps]
    # 8 rows of the first stage, then 16, then 24.
    assert known[0] == 0
    assert known[1] > 0
    seen = []
    for step, data in enumerate(steps, start=1):
        lines = (rollouts(folder) / f"{step}.jsonl").read_text().splitlines()
        responses = [json.loads(line) for line in lines]
        # The whole budget, whatever a prompt gets.
        assert len(responses) == 16 * 8
        groups = Counter(one["uid"].split("_")[0] for one in responses)
        assert len(groups) == 16
        assert min(groups.values()) >= 2
        assert max(groups.values()) == data["hpo/knapsack_most"]
        seen.append({one["input"] for one in responses})
        assert data["actor/grad_norm"] > 0
    assert [len(seen[0]), len(seen[0] | seen[1])] == [8, 16]
    assert steps[0]["hpo/knapsack_most"] == 8
    assert max(data["hpo/knapsack_most"] for data in steps) > 8
    rates = json.loads((folder / "checkpoints/global_step_2/success_rates.json").read_text())
    assert len(rates) == 16
    assert all(0 <= rate <= 1 for rate in rates.values())


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(run, cache, tmp_path):
    folder, metrics = run
    again = train_and_record(
        cache, tmp_path / "again", *OURS, "trainer.save_freq=-1", "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder}/checkpoints/global_step_2",
    )  # fmt: skip
    assert set(again) == {STEPS}
    assert repeatable(again)[STEPS] == repeatable(metrics)[STEPS]


def test_groups_that_fail_are_asked_again(cache, tmp_path):
    hints = [f"{HINTS}.enable=true", f"{HINTS}.text=' '", "data.max_prompt_length=40"]
    metrics = train_and_record(cache, tmp_path / "hints", *hints, "trainer.save_freq=-1")
    for step in range(1, STEPS + 1):
        lines = (rollouts(tmp_path / "hints") / f"{step}.jsonl").read_text().splitlines()
        responses = [json.loads(line) for line in lines]
        assert len(responses) == 16 * 8
        groups = Counter((one["uid"].split("_")[0], one["input"]) for one in responses)
        assert len(groups) == 16
        # A plain prompt ends with its target: `3 7 2 = 13`.
        asked = [text.splitlines()[1] for _, text in groups]
        with_hint = sum(len(text.split(" = ")[1].split(" ")) > 1 for text in asked)
        data = metrics[step]
        assert data["hpo/hinted_group_fraction"] == with_hint / 16
        assert data["hpo/failed_group_fraction"] == with_hint / 16 > 0
        assert data["hpo/hint_too_long_fraction"] == 0
        assert 0 <= data["hpo/hint_success_fraction"] <= 1
        assert data["actor/grad_norm"] > 0
    assert max(data["hpo/hint_success_fraction"] for data in metrics.values()) > 0
