"""The engine that sums over a whole mini-batch; with verl's own engine: tests/contract."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from policy_batches import actor_config, make_batch
from verl.utils import tensordict_utils as tu
from verl.workers import engine as engines
from verl.workers.config import PolicyLossConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from hpo_verl.algorithms.bapo import BAPOSettings, ClipBounds, contributions, find_clip_bounds
from hpo_verl.algorithms.base import TokenBatch
from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin import extras, losses
from hpo_verl.verl_plugin.config import SECTIONS
from hpo_verl.verl_plugin.engine import mini_batch as plugin
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
from hpo_verl.verl_plugin.losses import loss_of

BAPOPolicyLossConfig = SECTIONS["bapo"]
SUMS = OUR_LOSSES["bapo"].mini_batch_sums


def config(**changes):
    return actor_config(policy_loss=BAPOPolicyLossConfig(**changes))


@pytest.mark.parametrize("function", [ppo_loss, loss_with_statistics])
def test_the_record_and_settings_are_those_of_verls_loss_function(function):
    actor = config()
    settings = (OUR_LOSSES["bapo"], BAPOSettings())
    assert loss_of(partial(function, config=actor)) == settings
    other = actor_config(policy_loss=PolicyLossConfig(loss_mode="vanilla"))
    found = loss_of(partial(function, config=other))
    assert found is not None
    assert (found[0].name, found[0].mini_batch_sums, found[0].head_fields) == (
        "vanilla",
        None,
        None,
    )
    assert loss_of(partial(function, config=SimpleNamespace())) is None
    assert loss_of(function) is None
    assert loss_of(None) is None


def test_the_loss_without_bounds_says_what_is_needed():
    for policy_loss in (PolicyLossConfig(), BAPOPolicyLossConfig()):
        with pytest.raises(ConfigError, match=r"'bapo' needs the sums.*VERL_ENGINE_VENDOR = hpo"):
            losses.LOSSES["bapo"](**make_batch(), config=actor_config(policy_loss=policy_loss))


def test_verl_finds_the_engine_by_the_vendor_and_its_own_without(monkeypatch):
    plugin.register(engines)
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    for backend in plugin.STRATEGIES:
        monkeypatch.setenv("VERL_ENGINE_VENDOR", plugin.VENDOR)
        ours = EngineRegistry.get_engine_cls("language_model", backend)
        assert issubclass(ours, FSDPEngineWithLMHead)
        assert ours.__name__ == "GuardedEngine"
        parts = {"AdapterEngine", "MiniBatchEngine", "HeadEngine"}
        assert parts <= {parent.__name__ for parent in ours.__mro__}
        critic = EngineRegistry.get_engine_cls("value_model", backend)
        monkeypatch.delenv("VERL_ENGINE_VENDOR")
        assert EngineRegistry.get_engine_cls("language_model", backend) is FSDPEngineWithLMHead
        assert EngineRegistry.get_engine_cls("value_model", backend) is critic


# ---------------------------------------------------------------- engine


def nested_batch(rows=6, seed=0):
    """Micro-batch as the engine hands it to a loss, with the model's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + (3 * row) % 5 for row in range(rows)]

    def nested(make):
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    signs = iter([1.0, -2.0] * rows)
    data = tu.get_tensordict(
        {
            "prompts": nested(lambda n: torch.zeros(2, dtype=torch.long)),
            "responses": nested(lambda n: torch.zeros(n, dtype=torch.long)),
            "response_mask": nested(lambda n: (torch.arange(n) != 1).long()),
            "old_log_probs": nested(lambda n: -torch.rand(n, generator=generator)),
            "advantages": nested(lambda n: torch.full((n,), next(signs))),
        },
        non_tensor_dict={"dp_size": 1, "batch_num_tokens": 30, "global_batch_size": rows},
    )
    log_probs = nested(lambda n: -torch.rand(2 + n, generator=generator))
    return {"log_probs": log_probs}, data


def plain_sums(output, data, settings):
    """The contributions written out, response by response."""
    total = torch.zeros(len(settings.upper_bounds) + len(settings.lower_bounds)).double()
    parts = zip(
        output["log_probs"].unbind(), data["old_log_probs"].unbind(), data["advantages"].unbind(),
        data["response_mask"].unbind(), strict=True,
    )  # fmt: skip
    for log_prob, old, advantages, mask in parts:
        keep = mask.bool()
        # The log-probability of a token stands one place before it.
        new = log_prob[1:-1][keep]
        old, advantages = old[keep], advantages[keep]
        live = torch.ones_like(old).bool()
        total += contributions(TokenBatch(new - old, advantages, live, old), settings)
    return total


def test_the_summing_loss_sees_the_tokens_of_the_response():
    output, data = nested_batch()
    settings, sums = BAPOSettings(), []
    loss, metrics = plugin.summing_loss(SUMS, settings, sums)(model_output=output, data=data)
    assert (loss.item(), metrics) == (0.0, {})
    torch.testing.assert_close(sums[0], plain_sums(output, data, settings), rtol=1e-6, atol=0)


@pytest.mark.parametrize("field", ["advantages", "old_log_probs", "log_probs"])
def test_a_live_value_that_is_not_finite_counts_for_nothing_in_the_sums(field):
    """It is told where the loss is evaluated, by the guard or by the loss."""
    output, data = nested_batch()
    # The first token of the first response; its log-probability stands one place before it.
    tensor = output["log_probs"] if field == "log_probs" else data[field]
    tensor.values()[1 if field == "log_probs" else 0] = float("nan")
    sums = []
    plugin.summing_loss(SUMS, BAPOSettings(), sums)(model_output=output, data=data)
    output, data = nested_batch()
    data["response_mask"].values()[0] = 0
    plugin.summing_loss(SUMS, BAPOSettings(), sums)(model_output=output, data=data)
    assert torch.equal(sums[0], sums[1])


class Parent:
    """verl's engine as far as needed: calls the loss on each micro-batch."""

    def __init__(self, micro_batches, fails=False):
        self.micro_batches, self.fails, self.passes = micro_batches, fails, []

    def get_data_parallel_group(self):
        return "group"

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        self.passes.append((forward_only, torch.is_grad_enabled()))
        if self.fails and not forward_only:
            raise RuntimeError("out of memory")
        metrics = [loss_function(output, part)[1] for output, part in self.micro_batches]
        return {"metrics": {"seen": metrics}}


@pytest.fixture
def second_rank(monkeypatch):
    """An all-reduce with a rank that holds the same again, weighted by its advantages' sign."""
    calls = []

    def all_reduce(tensor, group):
        calls.append(group)
        tensor.mul_(torch.where(torch.arange(len(tensor)) < 37, 3.0, 2.0))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return calls


def loss_that_notes(seen):
    def loss_function(model_output, data, dp_group=None, config=None):
        seen.append(extras.get(extras.MINI_BATCH))
        return torch.zeros(()), {}

    return loss_function


def test_the_bounds_are_set_for_verls_own_pass_and_cleared_afterwards(second_rank):
    parts = [nested_batch(6, 0), nested_batch(3, 1)]
    actor, seen = config(positive_share=0.5), []
    engine = plugin.mini_batch_engine(Parent)(parts)
    output = engine.forward_backward_batch("data", partial(loss_that_notes(seen), config=actor))
    settings = BAPOSettings(positive_share=0.5)
    total = sum(plain_sums(*part, settings) for part in parts)
    total[:37] *= 3
    total[37:] *= 2
    expected = find_clip_bounds(total.tolist(), settings)
    assert expected.bapo_high > 1.2
    assert [bounds[:2] for bounds in seen] == [expected[:2]] * 2
    assert seen[0].bapo_positive_share == pytest.approx(expected.bapo_positive_share, rel=1e-6)
    assert engine.passes == [(True, False), (False, True)]
    assert second_rank == ["group"]
    assert extras.get(extras.MINI_BATCH) is None
    metrics = output["metrics"]
    assert metrics["actor/bapo_low"] == [expected.bapo_low]
    assert metrics["actor/bapo_high"] == [expected.bapo_high]
    assert metrics["actor/bapo_positive_share"] == [seen[0].bapo_positive_share]
    assert not [key for key in metrics if "min" in key or "max" in key]


def test_bounds_do_not_outlive_a_pass_that_fails(second_rank):
    engine = plugin.mini_batch_engine(Parent)([nested_batch()], fails=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.forward_backward_batch("data", partial(loss_that_notes([]), config=config()))
    assert extras.get(extras.MINI_BATCH) is None


@pytest.mark.parametrize("forward_only", [True, False])
def test_other_losses_and_passes_are_verls_own(second_rank, forward_only):
    engine = plugin.mini_batch_engine(Parent)([nested_batch()])
    actor = config() if forward_only else actor_config()
    function = partial(loss_that_notes([]), config=actor)
    if not forward_only:
        function = partial(lambda *_, config: (torch.zeros(()), {}), config=actor)
    output = engine.forward_backward_batch("data", function, forward_only)
    assert engine.passes == [(forward_only, True)]
    assert second_rank == []
    assert set(output["metrics"]) == {"seen"}


def test_every_setting_reaches_the_search(second_rank, monkeypatch):
    used = []

    def note(sums, settings):
        used.append(settings)
        return ClipBounds(1.0, 1.0, 0.0)

    record = replace(OUR_LOSSES["bapo"], mini_batch_sums=replace(SUMS, result=note))
    monkeypatch.setitem(losses.RECORDS, "bapo", record)
    changes = {
        "positive_share": 0.5, "clip_low_start": 0.3, "clip_low_end": 0.7, "clip_low_step": 0.1,
        "clip_high_start": 1.1, "clip_high_end": 1.5, "clip_high_step": 0.2,
        "repo_compatible": True,
    }  # fmt: skip
    engine = plugin.mini_batch_engine(Parent)([nested_batch()])
    seen = []
    engine.forward_backward_batch("data", partial(loss_that_notes(seen), config=config(**changes)))
    assert used == [BAPOSettings(**changes)]
    assert seen == [ClipBounds(1.0, 1.0, 0.0)]
