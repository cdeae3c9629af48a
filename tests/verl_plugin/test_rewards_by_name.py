"""Numbers of the reward function by name: to estimators, and from validations."""

import math

import pytest
import torch
from estimator_calls import call
from omegaconf import OmegaConf

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.trainer.batches import named_rewards

# ---------------------------------------------------------------- to estimators


def test_numbers_are_found_where_verl_leaves_them():
    rows = [{"reward_extra_info": {"acc": 1, "reason": "correct", "sure": True}}, {}, None]
    found = named_rewards(rows, ["acc", "sure"])
    assert [*found] == ["reward/acc", "reward/sure"]
    for values in found.values():
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx([1.0, math.nan, math.nan], nan_ok=True)
    assert named_rewards(rows, []) == {}
    assert named_rewards([], ["acc"])["reward/acc"].shape == (0,)


@pytest.mark.parametrize(
    ("rows", "there"),
    [
        ([{"reward_extra_info": {"acc": 1.0, "reason": "a"}}], "acc, reason"),
        ([{"reward_extra_info": {"acc": 1.0, "format": "yes"}}], "acc, format"),
        ([{}], "the reward alone"),
    ],
)
def test_a_name_without_a_number_is_refused_with_those_there(rows, there):
    message = f"^the reward function returns no number 'format', .*; it returns {there}$"
    with pytest.raises(DataError, match=message):
        named_rewards(rows, ["format"])


def constrained(values):
    provided = {"memory": {}} | ({} if values is None else {"reward/format": values})
    return call("constrained_grpo", [1.0, 0.0], ["a", "a"], provided=provided)


def test_an_estimator_checks_what_it_gets():
    assert constrained(torch.tensor([0.0, 1.0])).shape == (2, 4)
    with pytest.raises(DataError, match=r"^reward/format: 1 of 2 .* are not finite"):
        constrained(torch.tensor([0.0, math.nan]))
    with pytest.raises(DataError, match=r"^reward/format \(3,\): must be \(2,\)$"):
        constrained(torch.zeros(3))
    message = r"'constrained_grpo' needs reward/format from the trainer: .* must be hpo_sync or"
    with pytest.raises(ConfigError, match=message):
        constrained(None)


# ---------------------------------------------------------------- from validations


class Validating:
    """verl's trainer as far as it makes metrics of a validation."""

    def _val_metrics_update(self, sources, uids, infos, turns, expected=None):
        return {"val": len(infos["reward"])}


def validating(estimator, memory):
    trainer = object.__new__(type("Mode", (AlgorithmStep, Validating), {}))
    trainer.memory = memory
    trainer.config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator},
            "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "vanilla"}}},
        }
    )
    return trainer


def test_an_estimator_learns_from_the_means_of_a_validation():
    trainer = validating("hypervolume", {})
    for shift in (0.0, 0.5):
        infos = {"reward": [1.0, 0.0], "acc": [shift, 0.0], "format": [0.5, shift]}
        metrics = trainer._val_metrics_update(["s"] * 2, ["a", "b"], infos, [1, 1], None)
        assert metrics == {"val": 2}
    # From (0, 1/4) to (1/4, 1/2).
    assert trainer.memory["hypervolume_reference"] == [0.0, 0.25]
    assert trainer.memory["hypervolume_factor"] == pytest.approx(0.5 + 1.5 * math.tanh(1 / 16))
    for values in ([0.5, None], ["a", "b"], None):
        infos = {"reward": [1.0, 0.0], "acc": [0.0, 1.0], "format": values}
        with pytest.raises(DataError, match=r"no number 'format' of every response of the valid"):
            trainer._val_metrics_update(["s"] * 2, ["a", "b"], infos, [1, 1], None)
    other = validating("a_hpo", {"alpha": 0.5})
    assert other._val_metrics_update([], [], {"reward": []}, []) == {"val": 0}
    assert other.memory == {"alpha": 0.5}
