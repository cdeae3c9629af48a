"""The comparison of the gradients of several objectives, and what the trainer makes of it."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from algorithm_steps import config
from tensordict import TensorDict
from torch import nn

from hpo_verl.config.recipes import compose_recipe
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.engine.objectives import chosen_parameters, column, objectives_engine
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.validation import check_algorithm

LAYERS = (10, 25)


class Policy(nn.Module):
    """Logits of two actions, in layer 10 and once more in layer 26."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(n): nn.ParameterList([torch.zeros(2, dtype=torch.float64)]) for n in (10, 26)}
        )

    def forward(self):
        return (self.layers["10"][0] + self.layers["26"][0]).log_softmax(dim=-1)


class Parent:
    """verl's engine as far as needed: -mean A log pi over two responses, one of each action."""

    def __init__(self):
        self.module = Policy()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.125)
        self.calls = []

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        self.calls.append(data["advantages"].tolist())
        if not forward_only:
            (-(data["advantages"] * self.module()).mean()).backward()
        return {"metrics": {"loss": [0.0]}}


def batch(**objectives):
    columns = {column(name, LAYERS): torch.tensor(a).double() for name, a in objectives.items()}
    advantages = torch.tensor([3.0, 1.0], dtype=torch.float64)
    return TensorDict({"advantages": advantages, **columns}, batch_size=2)


def test_scores_by_hand_and_the_update_is_that_of_the_mixed_advantages():
    engine = objectives_engine(Parent)()
    data = batch(acc=[0.5, -0.5], format=[1.0, -1.0])
    metrics = engine.forward_backward_batch(data, None)["metrics"]
    # d log pi(0) = (1/2, -1/2): g = (-1/4, 1/4) and (-1/2, 1/2), products 1/8, 1/4 and 1/2.
    assert metrics == {
        "loss": [0.0],
        "actor/objective_score/acc": [pytest.approx(0.375, rel=1e-15)],
        "actor/objective_score/format": [pytest.approx(0.75, rel=1e-15)],
        "actor/objective_lr": [0.125],
    }
    assert engine.calls == [[0.5, -0.5], [1.0, -1.0], [3.0, 1.0]]
    assert engine.module.layers["10"][0].grad.tolist() == [-0.5, 0.5]
    assert data["advantages"].tolist() == [3.0, 1.0]


def test_opposed_objectives_have_no_score_and_nothing_is_measured_without_any():
    engine = objectives_engine(Parent)()
    data = batch(acc=[0.5, -0.5], format=[-0.5, 0.5])
    metrics = engine.forward_backward_batch(data, None)["metrics"]
    assert metrics["actor/objective_score/acc"] == metrics["actor/objective_score/format"] == [0.0]
    for other, forward_only in ((data, True), (batch(), False)):
        engine.calls.clear()
        metrics = engine.forward_backward_batch(other, None, forward_only)["metrics"]
        assert (metrics, len(engine.calls)) == ({"loss": [0.0]}, 1)


def test_layers_are_those_that_the_model_has_or_all():
    module = Policy()
    assert [*chosen_parameters(module, (10, 25))] == ["layers.10.0"]
    assert [*chosen_parameters(module, (0, 99))] == ["layers.10.0", "layers.26.0"]
    assert [*chosen_parameters(module, (11, 25))] == ["layers.10.0", "layers.26.0"]
    module.layers["26"][0].requires_grad_(False)
    assert [*chosen_parameters(module, (0, 9))] == ["layers.10.0"]


def test_the_trainer_sends_a_column_of_each_reward(step):
    section = {"rewards": ["acc", "format"], "weights": [3.0, 1.0]}
    rows = [{"reward_extra_info": {"acc": float(row < 1), "format": 1.0}} for row in range(7)]
    configuration = config("reward_gradients", "vanilla", reward_gradients=section)
    trainer, metrics, _ = step(configuration, extra_fields=rows)
    assert metrics["hpo/reward_weight/acc"] == pytest.approx(0.75)
    mixed = trainer.store["advantages"]
    acc, same = (trainer.store[column(name, LAYERS)] for name in section["rewards"])
    torch.testing.assert_close(mixed.values(), 0.75 * acc.values() + 0.25 * same.values())
    assert torch.equal(acc.offsets(), mixed.offsets())
    assert bool((same.values() == 0).all())
    assert acc.values()[0] > 0


def test_weights_move_after_the_update():
    class Updating:
        def _update_actor(self, batch, metrics):
            metrics.update(found)
            return batch

    trainer = object.__new__(type("Mode", (AlgorithmStep, Updating), {}))
    trainer.config = config("reward_gradients", "vanilla")
    actor = trainer.config.actor_rollout_ref.actor
    actor.ppo_mini_batch_size, actor.ppo_epochs = 2, 1
    trainer.config.actor_rollout_ref.rollout = {"n": 1}
    trainer.memory, trainer._counts = {"other": 1}, Counter()
    trainer.local_trigger_step, trainer.parameter_sync_step = 0, 1
    scores = {"acc": math.log(3.0), "format": 0.0}
    found = {f"actor/objective_score/{name}": score for name, score in scores.items()}
    found["actor/objective_lr"] = 1e-5
    metrics = {}
    trainer._update_actor(SimpleNamespace(keys=["a", "b"]), metrics)
    weights = [math.exp(trainer.memory[f"reward_log_weight/{name}"]) for name in scores]
    assert weights == pytest.approx([0.75, 0.25])
    assert trainer.memory["other"] == 1
    assert metrics == {k: v for k, v in found.items() if k != "actor/objective_lr"}
    # No update of the step was finite: nothing was measured.
    kept, found = trainer.memory, {}
    trainer._update_actor(SimpleNamespace(keys=["a", "b"]), {})
    assert trainer.memory == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "actor_rollout_ref.actor.strategy=fsdp",
            r"strategy = 'fsdp': adv_estimator = 'reward_gradients' permits fsdp2 only",
        ),
        (
            "ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=nvidia",
            r"VERL_ENGINE_VENDOR = 'nvidia': adv_estimator = 'reward_gradients' needs 'hpo'",
        ),
        ("algorithm.use_kl_in_reward=true", r"use_kl_in_reward = True: .*; must be false"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    recipe = ["algo=reward_gradients"]
    assert check_algorithm(compose_recipe("countdown-tiny", recipe)) == []
    with pytest.raises(ConfigError, match=message):
        check_algorithm(compose_recipe("countdown-tiny", [*recipe, change]))
