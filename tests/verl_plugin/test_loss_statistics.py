from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric, reduce_metrics
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.padding import no_padding_2_padding as padded

from hpo_verl.core.statistics import token_means
from hpo_verl.verl_plugin.engine import loss_statistics, step_guard
from hpo_verl.verl_plugin.engine.loss_statistics import (
    PREFIX,
    loss_with_statistics,
    policy_loss_sums,
    pop_token_means,
)
from hpo_verl.verl_plugin.trainer import algorithm_step as trainers


def micro_batch(seed=0, rows=4):
    """A nested micro-batch as the engine hands it to a loss, and the model's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.zeros(2, dtype=torch.long)] * rows
    lengths = [3 + row % 3 for row in range(rows)]

    def nested(make):
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    log_probs = torch.nested.as_nested_tensor(
        [-torch.rand(2 + n, generator=generator) for n in lengths], layout=torch.jagged
    )
    signs = iter([1.0, -1.0] * rows)
    data = tu.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
            "responses": nested(lambda n: torch.zeros(n, dtype=torch.long)),
            "response_mask": nested(lambda n: torch.ones(n, dtype=torch.long)),
            "old_log_probs": nested(lambda n: -torch.rand(n, generator=generator)),
            "advantages": nested(lambda n: torch.full((n,), next(signs))),
        },
        non_tensor_dict={"dp_size": 1, "batch_num_tokens": sum(lengths), "global_batch_size": rows},
    )
    return {"log_probs": log_probs.requires_grad_()}, data


def actor_config(loss_mode="vanilla", **changes):
    return ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, clip_cov_lb=-9.0, clip_cov_ratio=0.5),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("loss_mode", ["vanilla", "hpo", "mhpo", "gspo", "sapo", "cispo"])
def test_the_gradient_is_that_of_the_training_loss_whatever_the_loss(loss_mode):
    output, data = micro_batch()
    loss, metrics = loss_with_statistics(actor_config(loss_mode), output, data)
    (gradient,) = torch.autograd.grad(loss, output["log_probs"])
    mask = data["response_mask"].to_padded_tensor(0).bool()
    gradient = padded(gradient, data)
    advantages = data["advantages"].to_padded_tensor(0.0)
    for sign, live in (("positive", advantages > 0), ("negative", advantages < 0)):
        selected = gradient[mask & live]
        assert metrics[f"{PREFIX}tokens_{sign}"].values == [selected.numel()]
        assert metrics[f"{PREFIX}clipped_{sign}"].values == [int((selected == 0).sum())]
        assert metrics[f"{PREFIX}gradient_{sign}"].values == [
            pytest.approx(selected.abs().sum().item(), rel=1e-6)
        ]
    assert "actor/pg_loss" in metrics


def test_the_ratio_by_sign_by_hand():
    output, data = micro_batch(rows=2)
    sums = policy_loss_sums(actor_config(), output, data)
    log_ratio = padded(output["log_probs"], data).detach() - data["old_log_probs"].to_padded_tensor(
        0
    )
    assert sums["ratio_positive"] == pytest.approx(log_ratio[0, :3].exp().sum().item(), rel=1e-6)
    assert sums["ratio_negative"] == pytest.approx(log_ratio[1, :4].exp().sum().item(), rel=1e-6)


def test_rollout_weights_reach_the_gradient():
    output, data = micro_batch()
    plain = policy_loss_sums(actor_config(), output, data)
    data["rollout_is_weights"] = data["advantages"] * 0 + 2.0
    weighted = policy_loss_sums(actor_config(), output, data)
    assert weighted["gradient_positive"] == pytest.approx(2 * plain["gradient_positive"])


def test_the_random_stream_of_the_training_is_left_alone():
    output, data = micro_batch()
    torch.manual_seed(0)
    policy_loss_sums(actor_config("clip_cov"), output, data)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_statistics_work_without_grad_and_leave_the_graph_alone():
    output, data = micro_batch()
    with torch.no_grad():
        assert policy_loss_sums(actor_config(), output, data)["gradient_positive"] > 0
    assert output["log_probs"].grad is None


def summed(values):
    metric = Metric("sum")
    metric.extend(list(values))
    return metric


def test_sums_of_unequal_parts_give_the_means_of_the_step():
    """Two mini-batches of two micro-batches on two ranks, reduced as verl reduces them."""
    sizes = (((0, 1), (1, 4)), ((2, 3), (3, 2)), ((4, 4), (5, 1)), ((6, 2), (7, 2)))
    parts = [
        [policy_loss_sums(actor_config(), *micro_batch(seed, rows)) for seed, rows in rank]
        for rank in sizes
    ]
    flat = [part for rank in parts for part in rank]
    expected = token_means({key: sum(part[key] for part in flat) for key in flat[0]})
    metrics = {}
    for key in flat[0]:
        per_mini_batch = [
            Metric.aggregate_dp([summed(part[key] for part in parts[rank]) for rank in ranks])
            for ranks in ((0, 1), (2, 3))
        ]
        metrics[PREFIX + key] = per_mini_batch
    metrics = reduce_metrics(metrics) | {"actor/pg_loss": 1.0}
    means = pop_token_means(metrics)
    assert metrics == {"actor/pg_loss": 1.0}
    for name in ("ratio", "clipped_fraction"):
        for sign in ("positive", "negative"):
            assert means[f"{name}_{sign}"] == pytest.approx(expected[f"{name}_{sign}"])
    # A weight is of one mini-batch: the mean over the two, each averaged over its ranks.
    assert means["gradient_weight_positive"] == pytest.approx(
        expected["gradient_weight_positive"] / 4
    )


def test_an_update_without_sums_adds_nothing():
    assert pop_token_means({"actor/pg_loss": 1.0}) == {}


def test_the_trainer_replaces_the_sums_of_the_update_by_their_means():
    class Parent:
        def _update_actor(self, batch, metrics):
            output, data = micro_batch()
            sums = policy_loss_sums(actor_config(), output, data)
            metrics.update({PREFIX + key: value for key, value in sums.items()})
            # Means over eight updates.
            metrics[step_guard.NOT_FINITE] = 3 / 8
            metrics[step_guard.NO_ADVANTAGE] = 1 / 8
            return batch

    mode = type("Mode", (trainers.AlgorithmStep, Parent), {"parent_mode": "sync"})
    trainer, metrics = mode.__new__(mode), {}
    trainer.parameter_sync_step, trainer.local_trigger_step, trainer._counts = 1, 0, Counter()
    actor = {"ppo_mini_batch_size": 2, "ppo_epochs": 2}
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"actor": actor, "rollout": {"n": 3}}})
    batch = SimpleNamespace(keys=["key"] * 24)
    assert trainer._update_actor(batch, metrics) is batch
    assert metrics.pop("hpo/updates_not_finite") == 3
    assert metrics.pop("hpo/updates_without_advantage") == 1
    assert set(metrics) == {
        f"hpo/{name}_{sign}"
        for name in ("ratio", "clipped_fraction", "gradient_weight")
        for sign in ("positive", "negative")
    }


@pytest.mark.parametrize("distillation", [False, True])
def test_the_loss_with_statistics_is_handed_to_the_workers(monkeypatch, distillation):
    handed = []

    class Parent:
        def _setup(self):
            self.actor_rollout_wg = SimpleNamespace(set_loss_fn=handed.append)

    mode = type("Mode", (trainers.AlgorithmStep, Parent), {"parent_mode": "sync"})
    trainer = mode.__new__(mode)
    trainer.config = OmegaConf.create(
        {
            "distillation": {"enabled": distillation},
            "actor_rollout_ref": {
                "actor": {
                    "_target_": "verl.workers.config.ActorConfig",
                    "strategy": "fsdp2",
                    "rollout_n": 1,
                    "ppo_micro_batch_size_per_gpu": 1,
                }
            },
            "trainer": {
                "default_local_dir": "runs/one/checkpoints",
                "guard": {"max_not_finite_in_a_row": 5},
            },
        }
    )
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "runs/one/metrics.jsonl")
    trainer._setup()
    if distillation:
        assert handed == []
    else:
        (loss,) = handed
        assert isinstance(loss, step_guard.GuardedLoss)
        assert isinstance(loss.function, partial)
        assert loss.function.func is loss_statistics.loss_with_statistics
        assert loss.settings.max_not_finite_in_a_row == 5
        assert loss.folder == Path("runs/one")
        output, data = micro_batch()
        assert loss(model_output=output, data=data)[1]["actor/pg_loss"].values
