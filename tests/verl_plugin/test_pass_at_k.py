"""pass@k: the unbiased estimate, by data source, with responses that failed or are missing."""

from itertools import combinations

import pytest

from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle
from hpo_verl.verl_plugin.trainer.pass_at_k import pass_at_k, pass_at_k_metrics


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("right", [0, 1, 2, 4, 5])
def test_it_is_the_share_of_choices_with_a_right_one(right, k):
    samples = [1] * right + [0] * (5 - right)
    chosen = list(combinations(samples, k))
    expected = sum(any(choice) for choice in chosen) / len(chosen)
    assert pass_at_k(5, right, k) == pytest.approx(expected, abs=1e-12)


def metrics(rewards, **infos):
    """Metrics of prompts with so many rewards each, of one source."""
    prompts = [f"p{row}" for row, own in enumerate(rewards) for _ in own]
    flat = [reward for own in rewards for reward in own]
    return pass_at_k_metrics(["s"] * len(flat), prompts, {"reward": flat, **infos})


def test_the_mean_over_prompts_is_taken_for_each_k_that_has_responses():
    found = metrics([[1, 0, 0, 0, 0], [0] * 5])
    assert found == pytest.approx(
        {"val-core/s/reward/pass@1": 0.1, "val-core/s/reward/pass@4": 0.4}
    )
    assert set(metrics([[0] * 8])) == {f"val-core/s/reward/pass@{k}" for k in (1, 4, 8)}
    # A k that a prompt has too few responses for would be of other prompts.
    assert set(metrics([[0] * 8, [1] * 7])) == {f"val-core/s/reward/pass@{k}" for k in (1, 4)}


def test_one_response_a_prompt_has_none():
    assert metrics([[1], [0]]) == {}


def test_right_is_what_is_above_zero():
    assert metrics([[-1.0, 0.0, 0.1, 1.0]])["val-core/s/reward/pass@1"] == 0.5


def test_an_accuracy_counts_where_the_reward_function_returns_one():
    found = pass_at_k_metrics(
        ["a", "a", "b", "b"],
        ["1", "1", "2", "2"],
        {"reward": [0.5, 0.5, 1.0, 0.0], "acc": [True, None, None, None]},
    )
    assert found == {"val-core/a/acc/pass@1": 0.5, "val-core/b/reward/pass@1": 0.5}


def test_a_response_that_failed_is_wrong():
    arguments = ["a", "a"], ["1", "1"], {"reward": [1.0, 1.0], "acc": [1, 1]}
    found = pass_at_k_metrics(*arguments, {("a", "1"): 4, ("a", "2"): 4})
    assert found["val-core/a/acc/pass@1"] == 0.25
    assert found["val-core/a/acc/pass@4"] == 0.5


def test_a_validation_has_them_beside_what_verl_gives():
    class Verl:
        def _val_metrics_update(self, sources, prompts, infos, turns, expected):
            assert (turns, expected) == ([2], {("s", "1"): 2})
            return {"val-core/s/acc/mean@2": 0.5}

    class Trainer(LifeCycle, Verl):
        def __init__(self):
            pass

    found = Trainer()._val_metrics_update(
        ["s", "s"], ["1", "1"], {"reward": [0, 1]}, [2], expected_acc_counts={("s", "1"): 2}
    )
    assert found == {"val-core/s/acc/mean@2": 0.5, "val-core/s/reward/pass@1": 0.5}
