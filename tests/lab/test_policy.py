"""Any causal model: its log-probabilities, entropies and samples against their definitions."""

import numpy as np
import pytest
import torch
from lab_policies import END, PAD, random_policy, tiny_random_policy
from transformers import GPT2Config, GPT2LMHeadModel

from hpo_verl.errors import DataError
from hpo_verl.lab.policy import Policy

PROMPTS = [(5, 6, 7, 8, 9), (5, 6), (2, 3, 4, 5, 6, 7), (9, 8, 7, 6)]


def gpt2_policy():
    policy = random_policy()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = END
    return Policy(model, policy.tokenizer)


@pytest.fixture(params=[random_policy, gpt2_policy], ids=["qwen2", "gpt2"])
def policy(request):
    return request.param()


def responses(width=7):
    lengths = torch.tensor([1, width, 3, 5])
    tokens = torch.randint(2, 32, (4, width), generator=torch.Generator().manual_seed(2))
    return tokens, torch.arange(width) < lengths[:, None]


def distributions(policy, prompt, response):
    """One response alone, without padding, as a straightforward reading of the definition."""
    ids = torch.cat([torch.tensor(prompt), response])[None]
    logits = policy.model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_log_probs_entropies_and_gradients_are_those_of_the_model_alone(policy):
    tokens, mask = responses()
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    found = policy.log_probs(PROMPTS, tokens, mask)
    (found * weights).sum().backward()
    gradients = {key: p.grad.clone() for key, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    entropy = policy.entropy(PROMPTS, tokens, mask)
    assert (found[~mask] == 0).all()
    assert (entropy[~mask] == 0).all()
    total = torch.zeros(())
    for row, prompt in enumerate(PROMPTS):
        response = tokens[row][mask[row]]
        log_p = distributions(policy, prompt, response)
        expected = log_p.gather(-1, response[:, None]).squeeze(-1)
        torch.testing.assert_close(found[row, : len(response)], expected, rtol=1e-5, atol=1e-5)
        spread = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy[row, : len(response)], spread, rtol=1e-5, atol=1e-5)
        total = total + (expected * weights[row, : len(response)]).sum()
    total.backward()
    for key, parameter in policy.model.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5 * largest)


def test_what_stands_behind_the_end_changes_nothing(policy):
    tokens, mask = responses()
    expected = policy.log_probs(PROMPTS, tokens, mask)
    wide = torch.nn.functional.pad(tokens.masked_fill(~mask, 9), (0, 4), value=7)
    found = policy.log_probs(PROMPTS, wide, torch.nn.functional.pad(mask, (0, 4)))
    torch.testing.assert_close(found[:, :7], expected, rtol=1e-5, atol=1e-6)


def test_samples_end_with_the_end_token_and_have_the_policys_log_probs(policy):
    prompts = PROMPTS * 16
    found = policy.sample(prompts, range(64), 30)
    lengths = found.mask.sum(-1)
    assert 1 <= lengths.min() < lengths.max()
    for tokens, length in zip(found.tokens, lengths.tolist(), strict=True):
        assert END not in tokens[: length - 1]
        assert length == 30 or tokens[length - 1] == END
        assert (tokens[length:] == PAD).all()
    again = policy.log_probs(prompts, found.tokens, found.mask)
    torch.testing.assert_close(found.log_probs, again.detach(), rtol=1e-4, atol=1e-5)


def test_a_response_depends_on_its_own_prompt_and_seed_only(policy):
    whole = policy.sample(PROMPTS, [1, 2, 3, 4], 10)
    order = [2, 0, 1]
    other = policy.sample([PROMPTS[i] for i in order], [[1, 2, 3, 4][i] for i in order], 10)
    assert torch.equal(other.tokens, whole.tokens[order])
    assert torch.equal(other.log_probs, whole.log_probs[order])


def test_tokens_are_drawn_with_their_probabilities():
    policy, count = random_policy(), 20_000
    found = policy.sample([PROMPTS[0]] * count, range(count), 1)
    log_p = distributions(policy, PROMPTS[0], torch.tensor([2]))[0]
    expected = log_p.exp().detach().numpy() * count
    seen = np.bincount(found.tokens[:, 0], minlength=32)
    usual = expected >= 5
    statistic = float(((seen - expected)[usual] ** 2 / expected[usual]).sum())
    # The 99.9 % quantile of chi-square with 31 degrees of freedom is 61.1.
    assert statistic < 61.1


def test_a_policy_comes_back_from_its_folder(tmp_path):
    policy = tiny_random_policy()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    again = Policy.load(tmp_path)
    assert again.ends == policy.ends
    prompt = again.encode([{"role": "user", "content": "1 2 3 = 6"}])
    assert prompt == policy.encode([{"role": "user", "content": "1 2 3 = 6"}])
    assert torch.equal(again.sample([prompt], [0], 5)[0], policy.sample([prompt], [0], 5)[0])


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no policy"):
        Policy.load(tmp_path)
    policy = tiny_random_policy()
    policy.tokenizer.chat_template = None
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        Policy.load(tmp_path)
