"""The rollout server without Ray: requests, weight updates, and what goes wrong."""

import asyncio

import pytest
import torch
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

from hpo_verl.errors import ConfigError, WeightSyncError
from hpo_verl.verl_plugin.cpu.generation import BatchGenerator
from hpo_verl.verl_plugin.cpu.server import HFServer, request_from_sampling_params
from hpo_verl.verl_plugin.rollout.coalescer import Coalescer
from hpo_verl.verl_plugin.rollout.hf_settings import HFSettings, hf_settings

CONFIG = OmegaConf.create(
    {"seed": 0, "max_model_len": None, "prompt_length": 16, "response_length": 8}
)


def make_server():
    """A server around a random model, made without verl's configuration."""
    torch.manual_seed(0)
    server = HFServer.__new__(HFServer)
    server.config = CONFIG
    server.model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    ).eval()
    server.generator = BatchGenerator(server.model, [], 0, block_rows=8)
    server._global_steps = None
    server._requests = Coalescer(server._generate_together)
    server._admit = asyncio.Event()
    server._admit.set()
    server._abort = False
    server._received = None
    return server


def test_requests_that_arrive_together_are_generated_together():
    async def ask():
        server = make_server()
        batches = []
        generate = server.generator.generate

        def recorded(requests, should_stop):
            batches.append(len(requests))
            return generate(requests, should_stop)

        server.generator.generate = recorded
        single = [server.generate([1, 2], {"seed": seed}, str(seed)) for seed in range(5)]
        answers = await asyncio.gather(*single)
        again = await server.generate_batch(
            [
                {"prompt_ids": [1, 2], "sampling_params": {"seed": seed}, "request_id": "x"}
                for seed in range(5)
            ]
        )
        return batches, answers, again

    batches, answers, again = asyncio.run(ask())
    assert batches == [5, 5]
    assert [a.token_ids for a in answers] == [a.token_ids for a in again]
    assert all(len(a.token_ids) == len(a.log_probs) == 8 for a in answers)
    assert {a.stop_reason for a in answers} == {"completed"}


def test_one_bad_request_does_not_harm_the_others():
    async def ask():
        good = {"prompt_ids": [1], "sampling_params": {"seed": 0}, "request_id": "a"}
        bad = {**good, "sampling_params": {"temperature": -1.0}}
        return await make_server().generate_batch([good, bad])

    good, bad = asyncio.run(ask())
    assert len(good.token_ids) == 8
    assert isinstance(bad, ConfigError)


def test_an_update_needs_every_weight_and_changes_the_answers():
    async def update():
        server = make_server()
        before = await server.generate([1, 2], {"temperature": 0.0}, "a")
        weights = {name: value + 0.5 for name, value in server.model.state_dict().items()}
        names = list(weights)
        await server.load_weights({name: weights[name] for name in names[:3]})
        with pytest.raises(WeightSyncError, match="partly updated"):
            await server.generate([1, 2], {"temperature": 0.0}, "a")
        with pytest.raises(WeightSyncError, match=f"{len(names) - 3} weights were not sent"):
            await server.finish_weight_update(1)
        # What came before does not count: it may be of another step.
        await server.load_weights({name: weights[name] for name in names[3:]})
        with pytest.raises(WeightSyncError, match="3 weights were not sent"):
            await server.finish_weight_update(1)
        await server.load_weights({name: weights[name] for name in names[:3]})
        await server.load_weights({name: weights[name] for name in names[3:]})
        await server.finish_weight_update(7)
        after = await server.generate([1, 2], {"temperature": 0.0}, "a")
        assert all(torch.equal(server.model.state_dict()[n], weights[n]) for n in names)
        return before, after

    before, after = asyncio.run(update())
    assert before.log_probs != after.log_probs
    assert {after.extra_fields[f"{end}global_steps"] for end in ("", "min_", "max_")} == {7}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.no.such", torch.zeros(1), "unknown to the rollout model"),
        ("lm_head.weight", torch.zeros(3, 3), r"size mismatch for lm_head\.weight: .*\[3, 3\]"),
        ("lm_head.weight", torch.full((20, 16), float("nan")), "not finite"),
    ],
)
def test_wrong_weights_are_refused(name, value, message):
    async def load():
        await make_server().load_weights({name: value})

    with pytest.raises(WeightSyncError, match=message):
        asyncio.run(load())


def test_abort_returns_what_there_is_and_holds_new_requests():
    async def abort():
        server = make_server()
        running = asyncio.create_task(server.generate([1], {"max_tokens": 10_000, "seed": 0}, "a"))
        server.config = OmegaConf.merge(CONFIG, {"max_model_len": 20_000})
        await asyncio.sleep(0.2)
        await server.abort_all_requests()
        stopped = await running
        held = asyncio.create_task(server.generate([1], {"max_tokens": 2, "seed": 0}, "b"))
        await asyncio.sleep(0.1)
        assert not held.done()
        await server.resume_generation()
        return stopped, await held

    stopped, resumed = asyncio.run(abort())
    assert stopped.stop_reason in ("aborted", "completed")
    assert len(resumed.token_ids) == 2


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_what_is_no_text_is_refused(kind):
    with pytest.raises(ConfigError, match="images"):
        asyncio.run(make_server().generate([1], {}, "a", **{f"{kind}_data": [b""]}))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"best_of": 2}, "unknown sampling parameter 'best_of'"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_unsupported_sampling_parameters(params, message):
    with pytest.raises(ConfigError, match=message):
        request_from_sampling_params([1], params, "a", CONFIG)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"repeatable": 1}, r"hf\.repeatable = 1: must be true or false"),
        ({"speed": 9}, r"hf\.speed = 9: unknown setting, known are repeatable"),
    ],
)
def test_settings_are_checked(hf, message):
    rollout = {"name": "hf", "dtype": "bfloat16"}
    assert hf_settings({**rollout, "engine_kwargs": {"hf": {"repeatable": False}}}) == HFSettings(
        repeatable=False
    )
    assert hf_settings(rollout).repeatable is True
    with pytest.raises(ConfigError, match=message):
        hf_settings({**rollout, "engine_kwargs": {"hf": hf}})


def test_only_the_rollout_hf_is_bound_to_two_types():
    with pytest.raises(ConfigError, match=r"rollout\.dtype = 'half': .* in float32 or bfloat16$"):
        hf_settings({"name": "hf", "dtype": "half"})
    hf_settings({"name": "vllm", "dtype": "half"})


def test_limits_and_seeds():
    request = request_from_sampling_params([1] * 20, {"seed": 5}, "a", CONFIG)
    assert (request.seed, request.max_tokens) == (5, 4)
    unseeded = [
        request_from_sampling_params([1], {}, name, CONFIG).seed for name in ("a", "a", "b")
    ]
    assert unseeded[0] == unseeded[1] != unseeded[2]
