"""A model learns what it is shown, and its loss counts the tokens of responses only."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.policies import training
from data_prep.policies.demos import (
    Demonstration,
    encode,
    token_batch,
)
from data_prep.policies.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).double()


SHOWN = [
    Demonstration([{"role": "user", "content": "3 7 2 = 8"}], "<answer>3+7-2</answer>"),
    Demonstration([{"role": "user", "content": "1 1 1 = 3, and say so"}], "=3"),
]


def test_the_loss_counts_the_tokens_of_responses_only(tokenizer, llama):
    """The sum of -log p of every response's tokens over 15 a row; a weighty token counts twice."""
    pairs = [encode(tokenizer, shown) for shown in SHOWN]
    (weighty,) = tokenizer.encode("=3")
    expected = 0.0
    for prompt, response in pairs:
        logits = llama(torch.tensor([prompt + response])).logits[0]
        for place, token in enumerate(response, start=len(prompt) - 1):
            weight = 2 if token == weighty else 1
            expected -= weight * logits[place].log_softmax(0)[token].item()
    loss = training._loss(llama, *token_batch(pairs), torch.tensor([weighty]))
    assert loss.item() == pytest.approx(expected / (2 * 15), rel=1e-12)


def test_another_model_learns_what_it_is_shown(tokenizer, llama):
    pairs = [encode(tokenizer, shown) for shown in SHOWN]
    done = []
    optimizer = torch.optim.AdamW(llama.parameters(), lr=0.03)
    batches = [token_batch(pairs)] * 60
    training.train(llama, batches, [optimizer], lambda step: 1 - step / 60, progress=done.append)
    assert done == list(range(1, 61))
    assert not llama.training
    for prompt, response in pairs:
        logits = llama(torch.tensor([prompt + response])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == response
