"""What an estimator remembers from step to step, alone and with a weight in front of it."""

import pytest
from algorithm_steps import config


def test_alpha_is_averaged_over_steps_and_remembered_at_the_end_of_one(step):
    averaged = config("a_hpo", hpo={"ema": 0.75})
    trainer, metrics, _ = step(averaged)
    assert metrics["hpo/alpha"] == trainer.memory["alpha"] == pytest.approx(1 / 3)
    # Another step, of which 1 would be counted: in two parts, of which the last is remembered.
    rewards = (1.0, 1.0, 0, 0, 1.0, 1.0, 0)
    first, metrics, _ = step(averaged, rewards, parts=(0, 2, ()), memory=trainer.memory)
    assert metrics["hpo/alpha"] == pytest.approx(0.5)
    assert first.memory == trainer.memory
    last, metrics, _ = step(averaged, rewards, parts=(1, 2, first._earlier), memory=first.memory)
    assert metrics["hpo/alpha"] == last.memory["alpha"] == pytest.approx(0.5)


@pytest.mark.parametrize("estimator", ["hypervolume", "constrained_grpo", "epo", "ares"])
def test_a_weight_in_front_and_the_estimator_remember_side_by_side(step, estimator):
    """Neither forgets what the other one wrote, nor what a validation left."""
    section = {"hypervolume": {"rewards": ["format"], "weights": [1.0]}}
    left = {
        "hypervolume_reference": [0.5],
        "hypervolume_front": [[0.75]],
        "hypervolume_factor": 2.0,
    }
    row = {"reward_extra_info": {"format": 1.0}}
    loss = estimator if estimator in ("epo", "ares") else "hpo"
    configuration = config(estimator, loss, hpo={"ema": 0.75}, **section)
    trainer, metrics, _ = step(configuration, memory=left, extra_fields=[row] * 7)
    assert trainer.memory["alpha"] == metrics["hpo/alpha"]
    assert {name: trainer.memory[name] for name in left} == left
    if estimator == "hypervolume":
        assert metrics["hpo/hypervolume_factor"] == 2.0
    else:
        own = {"constrained_grpo": "constrained_dual/format", "epo": "epo_steps"}
        assert own.get(estimator, "ares_threshold") in trainer.memory
