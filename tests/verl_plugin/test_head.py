"""Fields that a loss gets of the model's head: which tokens, from what, and what is logged."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from policy_batches import actor_config

from hpo_verl.algorithms.base import HeadFields, HeadOptimizer, Loss
from hpo_verl.config.recipes import compose_recipe
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin import extras, losses
from hpo_verl.verl_plugin.config import SECTIONS
from hpo_verl.verl_plugin.engine import head as plugin
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
from hpo_verl.verl_plugin.engine.mini_batch import mini_batch_engine
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

PROMPTS, RESPONSES = [2, 3, 1], [3, 1, 4]
VOCABULARY, HIDDEN = 11, 4


class Model(torch.nn.Module):
    """An embedding and a head, so that packing changes nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.resharded = 0

    def get_output_embeddings(self):
        return self.head

    def reshard(self):
        self.resharded += 1

    def forward(self, ids):
        return SimpleNamespace(logits=self.head(self.embedding(ids)))


def micro_batch(seed, temperature):
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(seed)

    def ids(lengths):
        return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    prompts, responses = ids(PROMPTS), ids(RESPONSES)
    masks = [torch.ones(n, dtype=torch.long) for n in RESPONSES]
    masks[2][1] = 0
    advantages = [torch.full((n,), a) for n, a in zip(RESPONSES, (1.5, 0.0, -0.5), strict=True)]
    fields = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested([torch.cat(p) for p in zip(prompts, responses, strict=True)]),
        "response_mask": nested(masks),
        "advantages": nested(advantages),
        "old_log_probs": nested([torch.full((n,), -2.5) for n in RESPONSES]),
    }
    other = {"temperature": temperature, "dp_size": 1, "batch_num_tokens": 7}
    if isinstance(temperature, torch.Tensor):
        fields["temperature"] = other.pop("temperature")
    return tu.get_tensordict(fields, non_tensor_dict=other | {"global_batch_size": 3})


class Parent:
    """verl's engine as far as needed: the model, its outputs and the loss."""

    def __init__(self, packed=True):
        self.module, self.packed = Model(), packed
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.25, eps=1e-3)

    def get_data_parallel_group(self):
        return "group"

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        metrics = []
        for part in data:
            ids = part["input_ids"]
            padded = ids.values().unsqueeze(0) if self.packed else ids.to_padded_tensor(0)
            args = {"temperature_rmpad": None} if self.packed else {"temperature": None}
            output = self.module(padded)
            model_output = self.prepare_model_outputs(output, args, part, loss_function)
            loss, found = loss_function(model_output=model_output, data=part)
            loss.backward()
            metrics.append(found)
        return {"metrics": {"seen": metrics}}

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        logits, ids = output.logits, micro_batch["input_ids"]
        if not self.packed:
            lengths = ids.offsets().diff().tolist()
            logits = torch.cat([row[:n] for row, n in zip(logits, lengths, strict=True)])
        log_prob = logits.flatten(0, -2).log_softmax(-1)
        log_prob = log_prob.gather(-1, ids.values().roll(-1).unsqueeze(-1)).squeeze(-1)
        return {"log_probs": torch.nested.nested_tensor_from_jagged(log_prob, ids.offsets())}


@pytest.fixture
def two_ranks(monkeypatch):
    """An all-reduce with a rank that holds the same again."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))


@pytest.fixture
def probe(monkeypatch):
    """A loss whose field is a number of all that is made of; the calls of it."""
    calls = []

    def make(head, optimizer, settings):
        calls.append((head, optimizer, settings))
        return {"probe": head.hidden.sum(-1) + head.logits[:, 0] + 10.0 * head.advantages}

    record = Loss("capo", head_fields=HeadFields(("probe",), make), caveat="probes")
    monkeypatch.setitem(losses.RECORDS, "capo", record)
    return calls


def noting_loss(seen):
    def loss_function(model_output, data, dp_group=None, config=None):
        seen.append(model_output)
        return model_output["log_probs"].values().sum(), {}

    return partial(loss_function, config=actor_config(policy_loss=SECTIONS["capo"]()))


def expected_tokens(model, part, row, temperature):
    """Hidden states and logits before each token of a response, written out."""
    ids = part["input_ids"].unbind()[row]
    hidden = model.embedding(ids[PROMPTS[row] - 1 : -1]).detach()
    return hidden / temperature, model.head(hidden).detach() / temperature


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("temperature", [0.5, torch.tensor([0.5, 1.0, 2.0])])
def test_fields_stand_where_the_log_probabilities_stand(two_ranks, probe, packed, temperature):
    engine, seen = plugin.head_engine(Parent)(packed), []
    parts = [micro_batch(seed, temperature) for seed in (0, 1)]
    output = engine.forward_backward_batch(parts, noting_loss(seen))
    total = 0.0
    for part, outputs, (head, _, settings) in zip(parts, seen, probe, strict=True):
        assert settings is None
        found = outputs["probe"]
        assert torch.equal(found.offsets(), part["input_ids"].offsets())
        # Row 1 has no advantage, the second token of row 2 no mask.
        keep = {0: [0, 1, 2], 2: [0, 2, 3]}
        for row in range(3):
            t = temperature[row] if isinstance(temperature, torch.Tensor) else temperature
            hidden, logits = expected_tokens(engine.module, part, row, t)
            advantages = part["advantages"].unbind()[row]
            values = torch.zeros(PROMPTS[row] + RESPONSES[row])
            for k in keep.get(row, []):
                one = hidden[k].sum() + logits[k, 0] + 10.0 * advantages[k]
                values[PROMPTS[row] - 1 + k] = one
                total += one.item()
            torch.testing.assert_close(found.unbind()[row], values)
        tokens = [part["responses"].unbind()[row][places] for row, places in keep.items()]
        assert torch.equal(head.tokens, torch.cat(tokens))
        assert not any(tensor.requires_grad for tensor in head)
    # Over the live tokens of both micro-batches, with an advantage or not.
    assert output["metrics"]["actor/probe"] == [pytest.approx(total / 14, rel=1e-5)]
    assert 0 < output["metrics"][plugin.SECONDS][0] < 1
    assert not [key for key in output["metrics"] if "min" in key or "max" in key]
    assert not engine.module.head._forward_pre_hooks
    assert engine.module.resharded == 1


def test_tokens_are_handed_over_in_parts(two_ranks, probe, monkeypatch):
    whole, split = [], []
    engine = plugin.head_engine(Parent)()
    engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss(whole))
    monkeypatch.setattr(plugin, "LOGITS", 4 * VOCABULARY)
    engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss(split))
    assert [len(head.tokens) for head, *_ in probe] == [6, 4, 2]
    torch.testing.assert_close(split[0]["probe"].values(), whole[0]["probe"].values())
    # Nothing to do is done, too.
    part = micro_batch(0, 1.0)
    part["advantages"].values().zero_()
    output = engine.forward_backward_batch([part], noting_loss([]))
    assert output["metrics"]["actor/probe"] == [0.0]


def test_the_optimizers_averages_of_the_head_are_read(two_ranks, probe):
    engine = plugin.head_engine(Parent)()
    engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss([]))
    assert probe[0][1] == HeadOptimizer(0.25, (0.9, 0.999), 1e-3, 0, None)
    gradient = engine.module.head.weight.grad.clone()
    engine.optimizer.step()
    engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss([]))
    found = probe[1][1]
    assert found.steps == 1
    torch.testing.assert_close(found.moments, (0.1 * gradient, 0.001 * gradient.square()))


def test_an_optimizer_that_is_not_adam_is_refused(two_ranks, probe):
    engine = plugin.head_engine(Parent)()
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"optim\.optimizer: the policy loss needs Adam or AdamW"):
        engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss([]))
    engine.optimizer = torch.optim.AdamW(engine.module.embedding.parameters())
    with pytest.raises(ConfigError, match="optimizer of the model's head, which has none"):
        engine.forward_backward_batch([micro_batch(0, 1.0)], noting_loss([]))
    assert engine._watch is None


def test_other_losses_and_passes_are_verls_own(two_ranks, probe):
    engine, seen = plugin.head_engine(Parent)(), []
    other = partial(noting_loss(seen).func, config=actor_config())
    for function, forward_only in ((other, False), (noting_loss(seen), True)):
        output = engine.forward_backward_batch([micro_batch(0, 1.0)], function, forward_only)
        assert set(output["metrics"]) == {"seen"}
    assert not probe
    assert [set(one) for one in seen] == [{"log_probs"}] * 2


# ---------------------------------------------------------------- the loss that reads them


@pytest.mark.parametrize("packed", [True, False])
def test_a_masked_token_has_no_gradient(two_ranks, packed):
    """Bounds that nothing meets mask every token with an advantage, those of any meet none."""
    gradients = {}
    for fisher_high in (1e-30, 1e30):
        section = SECTIONS["capo"](
            hessian_low=-1e30, hessian_high=1e30, fisher_high=fisher_high, top_tokens=5
        )
        config = actor_config("seq-mean-token-mean", section)
        engine = mini_batch_engine(plugin.head_engine(Parent))(packed)
        output = engine.forward_backward_batch(
            [micro_batch(0, 1.0)], partial(loss_with_statistics, config=config)
        )
        gradients[fisher_high] = engine.module.head.weight.grad.abs().max().item()
        # Six of the seven live tokens have an advantage.
        share = 6 / 7 if fisher_high < 1 else 0.0
        assert output["metrics"]["actor/curvature_masked"] == [pytest.approx(share)]
        assert output["metrics"]["actor/curvature_fisher"][0] > 0
    assert gradients[1e-30] == 0
    assert gradients[1e30] > 0


def test_without_the_engine_the_loss_says_what_it_needs():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    ones = torch.ones(1, 2)
    call = partial(
        get_policy_loss_fn("capo"), -ones, -ones, ones, ones.bool(), "token-mean",
        actor_config(policy_loss=SECTIONS["capo"]()),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"'capo' needs the model's head: .* VERL_ENGINE_VENDOR"):
        call()
    with extras.provide(curvature_masked=ones, curvature_hessian=ones, curvature_fisher=ones):
        assert call()[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("actor_rollout_ref.actor.strategy=fsdp", "actor.strategy = 'fsdp'"),
        ("actor_rollout_ref.actor.optim.optimizer=SGD", "actor.optim.optimizer = 'SGD'"),
        ("actor_rollout_ref.actor.optim.optimizer_impl=torchao.optim", "optimizer_impl = 'torchao"),
        ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2", "size = 2"),
        ("actor_rollout_ref.actor.fsdp_config.offload_policy=true", "offload_policy = True"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels = True"),
        ("actor_rollout_ref.model.lora_rank=8", "model.lora_rank = 8"),
    ],
)
def test_what_hides_the_head_is_refused(change, message):
    config = compose_recipe("countdown-tiny", ["algo=capo"])
    assert check_algorithm(config) == []
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_algorithm(compose_recipe("countdown-tiny", ["algo=capo", change]))
    assert "policy_loss.loss_mode = 'capo' reads logits" in str(caught.value)


def test_it_needs_a_trainer_mode_of_ours_and_the_engine():
    config = compose_recipe("countdown-tiny", ["algo=capo", "trainer.v1.trainer_mode=sync"])
    with pytest.raises(ConfigError, match="loss_mode = 'capo' needs hpo_sync"):
        check_trainer_mode(config)
