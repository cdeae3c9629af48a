"""Generation: against a plain forward pass, and bit for bit whatever the company."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hpo_verl.algorithms.base import TokenTemperature
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.cpu import attention
from hpo_verl.verl_plugin.cpu.generation import BatchGenerator, GenerationRequest

VOCABULARY, EOS, PAD = 40, 3, 0


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def either(request):
    return make_model().to(getattr(torch, request.param))


def make_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def make_requests(count, max_tokens=12, **settings):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [
        GenerationRequest(
            tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()),
            seed=seed,
            max_tokens=max_tokens,
            **settings,
        )
        for seed, length in enumerate(lengths)
    ]


def make_generator(model, eos=(EOS,), **options):
    return BatchGenerator(model, eos, PAD, **{"block_rows": 16, "num_threads": 1, **options})


def test_log_probs_equal_those_of_one_forward_pass_without_cache_or_padding(model):
    for request, result in zip(
        make_requests(20), make_generator(model).generate(make_requests(20)), strict=True
    ):
        ids = torch.tensor([[*request.prompt_ids, *result.token_ids]])
        with torch.inference_mode():
            log_prob = model(ids).logits.log_softmax(-1)[0, len(request.prompt_ids) - 1 : -1]
        expected = log_prob.gather(-1, torch.tensor(result.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_draws_by_float32_log_probs_of_its_own_logits():
    half = make_model().to(torch.bfloat16)
    (request,) = make_requests(1)
    (result,) = make_generator(half, eos=()).generate([request])
    ids = torch.tensor([[*request.prompt_ids, *result.token_ids]])
    with torch.inference_mode():
        log_prob = half(ids).logits.float().log_softmax(-1)[0, len(request.prompt_ids) - 1 : -1]
    expected = log_prob.gather(-1, torch.tensor(result.token_ids)[:, None]).squeeze(-1)
    given = torch.tensor(result.log_probs)
    # Two orders of sums differ by a few units in the last of 8 bits of logits up to 8.
    torch.testing.assert_close(given, expected, atol=0.15, rtol=0)
    assert bool((given != given.bfloat16()).any())


def test_a_temperature_per_token_follows_the_entropy_before_each_token(model):
    rule = TokenTemperature(0.5, pivot=0.5, low=-0.5, high=1.5)
    requests = make_requests(20, token_temperature=rule)
    results = make_generator(model).generate(requests)
    factors = []
    for request, result in zip(requests, results, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *result.token_ids]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        given = torch.distributions.Categorical(logits=logits).entropy().log()
        h = (given - 0.5).clamp(-1.0, 1.0)
        factors.append(1.0 + 0.5 * h)
        log_prob = (logits / factors[-1][:, None]).log_softmax(-1)
        expected = log_prob.gather(-1, torch.tensor(result.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=1e-4, rtol=1e-4)
    assert torch.cat(factors).min() < 0.95
    assert torch.cat(factors).max() > 1.05
    # Alone as in company, which may be sampled by another rule.
    mixed = make_generator(model).generate([requests[3], *make_requests(5)])
    assert mixed[0] == results[3]


def test_greedy_equals_transformers_own(model):
    request = make_requests(1, temperature=0.0)[0]
    (result,) = make_generator(model).generate([request])
    reference = model.generate(
        torch.tensor([request.prompt_ids]),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    assert result.token_ids == reference[0, len(request.prompt_ids) :].tolist()


def test_stops_after_eos_and_at_the_limit(model):
    results = make_generator(model).generate(make_requests(64, max_tokens=30))
    ended = [result for result in results if result.token_ids[-1] == EOS]
    assert ended
    assert all(EOS not in result.token_ids[:-1] for result in results)
    assert all(len(result.token_ids) == 30 for result in results if result not in ended)
    assert all(result.finished for result in results)


def test_zero_tokens_is_an_empty_response(model):
    (result,) = make_generator(model).generate([GenerationRequest((5,), 0, max_tokens=0)])
    assert (result.token_ids, result.log_probs, result.finished) == ([], [], True)


def test_a_response_does_not_depend_on_order_company_or_threads(either):
    requests = make_requests(50, max_tokens=20)
    reference = make_generator(either).generate(requests)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = make_generator(either).generate([requests[row] for row in order])
    assert [reference[row] for row in order] == shuffled
    assert make_generator(either, num_threads=2).generate(requests) == reference
    for row in (0, 7, 49):
        assert make_generator(either).generate([requests[row]]) == [reference[row]]


def test_a_response_does_not_depend_on_who_shares_its_prompt_or_takes_its_place(either):
    shared = make_requests(3, max_tokens=25)
    requests = [replace(r, seed=seed) for seed in range(20) for r in shared]
    together = make_generator(either).generate(requests)
    assert len({len(result.token_ids) for result in together}) > 5
    for row in range(0, 60, 7):
        assert make_generator(either).generate([requests[row]]) == [together[row]]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_shared_prompt_is_read_once_by_a_thread(model, monkeypatch, threads):
    read = []
    attend = attention.PromptPass.attend

    def recorded(self, layer, *args):
        read.extend(prompt for group in self.groups for prompt in group.prompts if layer == 0)
        return attend(self, layer, *args)

    generator = make_generator(model, num_threads=threads)
    monkeypatch.setattr(attention.PromptPass, "attend", recorded)
    (request,) = make_requests(1)
    generator.generate([replace(request, seed=seed) for seed in range(100)])
    assert set(read) == {request.prompt_ids[:-1]}
    assert len(read) <= threads


def test_attention_side_by_side_and_one_by_one_gives_the_same_bits(either, monkeypatch):
    requests = make_requests(50, max_tokens=20)
    reference = make_generator(either).generate(requests)
    monkeypatch.setattr(attention, "COPIED_BYTES", 0)
    assert make_generator(either).generate(requests) == reference


def test_prompts_longer_than_a_pass_are_read_alone(either):
    generator = torch.Generator().manual_seed(3)
    requests = [
        GenerationRequest(
            tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()), 0, 8
        )
        for length in (33, 34, 50, 34)
    ]
    together = make_generator(either).generate(requests)
    assert [make_generator(either).generate([request])[0] for request in requests] == together


def test_without_the_promise_a_pass_holds_no_empty_row(model):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    requests = make_requests(6)
    generator = make_generator(model, repeatable=False)
    rows.clear()
    dense = generator.generate(requests)
    hook.remove()
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 6
    for one, other in zip(dense, make_generator(model).generate(requests), strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_other_attention_is_refused_by_name():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    with pytest.raises(ConfigError, match=r"model type gemma2: .*sliding_attention"):
        make_generator(
            Gemma2ForCausalLM(
                Gemma2Config(
                    **sizes,
                    intermediate_size=16,
                    head_dim=8,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                )
            )
        )
    with pytest.raises(ConfigError, match="model type bloom: its attention"):
        make_generator(
            BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
        )


def test_requests_have_settings_of_their_own(model):
    prompt = make_requests(1)[0].prompt_ids
    requests = [
        GenerationRequest(prompt, seed=5, max_tokens=20, temperature=temperature, top_k=top_k)
        for temperature, top_k in ((1.0, -1), (0.0, -1), (1.0, 1), (1.0, -1))
    ]
    plain, greedy, first, again = make_generator(model, eos=()).generate(requests)
    assert greedy.token_ids == first.token_ids != plain.token_ids
    assert again == plain


def test_another_seed_gives_another_response(model):
    prompt = make_requests(1)[0].prompt_ids
    first, second = make_generator(model, eos=()).generate(
        [GenerationRequest(prompt, seed, max_tokens=20) for seed in (0, 1)]
    )
    assert first.token_ids != second.token_ids


def test_should_stop_ends_early_with_what_there_is(model):
    asked = iter([False, False, True])
    (result,) = make_generator(model, eos=()).generate(
        make_requests(1, max_tokens=20), should_stop=lambda: next(asked)
    )
    assert len(result.token_ids) == 2
    assert not result.finished


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_tokens", -1),
        ("prompt_ids", ()),
    ],
)
def test_refuses_settings_out_of_range(field, value):
    settings = {"prompt_ids": (1,), "seed": 0, "max_tokens": 1, field: value}
    with pytest.raises(ConfigError, match=field):
        GenerationRequest(**settings)
