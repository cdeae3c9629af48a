"""Forward passes against transformers', and sampling against the policy's distribution."""

import numpy as np
import pytest
import torch
from lab_policies import END, PAD, random_policy

from hpo_verl.lab.policy import Policy, Prompts
from hpo_verl.lab.sampling import noise, sample

GROUP = 3


@pytest.fixture
def policy():
    return random_policy()


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 32, (len(lengths), max(lengths)), generator=generator)
    return Prompts(tokens, torch.tensor(lengths))


def make_responses(prompts, width=7):
    generator = torch.Generator().manual_seed(2)
    rows = len(prompts.lengths) * GROUP
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = 1, width
    tokens = torch.randint(0, 32, (rows, width), generator=generator)
    return tokens, torch.arange(width) < lengths[:, None]


def log_probs_of_transformers(policy, prompts, tokens, mask):
    """One response at a time, without padding, as a straightforward reading of the definition."""
    result = torch.zeros(tokens.shape)
    for row in range(len(tokens)):
        prompt = prompts.tokens[row // GROUP, : prompts.lengths[row // GROUP]]
        response = tokens[row][mask[row]]
        ids = torch.cat([prompt, response])[None]
        logits = policy.model(input_ids=ids, use_cache=False).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        result[row, : len(response)] = log_p.gather(-1, response[:, None]).squeeze(-1)
    return result


@pytest.mark.parametrize("lengths", [(5, 5), (2, 6, 4)])
def test_log_probs_and_gradients_are_those_of_transformers(policy, lengths):
    prompts = make_prompts(*lengths)
    tokens, mask = make_responses(prompts)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, function in (
        ("ours", policy.response_log_probs),
        ("theirs", lambda *arguments: log_probs_of_transformers(policy, *arguments)),
    ):
        policy.model.zero_grad()
        log_probs = function(prompts, tokens, mask)
        (log_probs * weights * mask).sum().backward()
        gradients = {key: p.grad.clone() for key, p in policy.model.named_parameters()}
        found[name] = (log_probs.detach(), gradients)
    torch.testing.assert_close(found["ours"][0], found["theirs"][0], rtol=1e-5, atol=1e-5)
    for key, gradient in found["theirs"][1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found["ours"][1][key], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_padding_of_prompts_and_responses_changes_nothing(policy):
    prompts = make_prompts(4, 6)
    tokens, mask = make_responses(prompts)
    expected = policy.response_log_probs(prompts, tokens, mask)
    other = Prompts(torch.nn.functional.pad(prompts.tokens, (0, 3), value=9), prompts.lengths)
    wide = torch.nn.functional.pad(tokens, (0, 4), value=7)
    found = policy.response_log_probs(other, wide, torch.nn.functional.pad(mask, (0, 4)))
    torch.testing.assert_close(found[:, : tokens.shape[1]], expected, rtol=1e-5, atol=1e-6)
    assert (found[:, tokens.shape[1] :] == 0).all()
    assert (found[:, : tokens.shape[1]][~mask] == 0).all()


@pytest.mark.parametrize("lengths", [(4, 4), (3, 6)])
def test_sampled_log_probs_are_those_of_the_policy(policy, lengths):
    prompts = make_prompts(*lengths)
    uniforms = noise([(0, i) for i in range(2 * GROUP)], 12)
    responses = sample(policy, prompts, uniforms)
    again = policy.response_log_probs(prompts, responses.tokens, responses.mask)
    torch.testing.assert_close(responses.log_probs, again.detach(), rtol=1e-5, atol=1e-5)
    assert (responses.entropy[responses.mask] > 0).all()
    assert (responses.entropy[~responses.mask] == 0).all()


def test_a_response_ends_with_the_end_token_and_padding_follows(policy):
    prompts = make_prompts(4, 4, 4, 4)
    responses = sample(policy, prompts, noise([(1, i) for i in range(256)], 40))
    lengths = responses.mask.sum(-1)
    assert 1 <= lengths.min() < lengths.max()
    for tokens, mask, length in zip(*responses[:2], lengths.tolist(), strict=True):
        assert mask[:length].all()
        assert END not in tokens[: length - 1]
        assert length == 40 or tokens[length - 1] == END
        assert (tokens[length:] == PAD).all()


def test_a_response_depends_on_its_own_prompt_and_seed_only(policy):
    prompts = make_prompts(3, 5, 4)
    uniforms = noise([(7, i) for i in range(12)], 10)
    whole = sample(policy, prompts, uniforms)
    order = [2, 0, 1]
    turned = Prompts(prompts.tokens[order], prompts.lengths[order])
    rows = torch.tensor(order)[:, None] * 4 + torch.arange(4)
    other = sample(policy, turned, uniforms[rows.flatten()])
    assert torch.equal(other.tokens, whole.tokens[rows.flatten()])
    torch.testing.assert_close(other.log_probs, whole.log_probs[rows.flatten()])


def test_tokens_are_drawn_with_their_probabilities(policy):
    prompts = make_prompts(4)
    count = 20_000
    responses = sample(policy, prompts, noise([(5, i) for i in range(count)], 1))
    logits = policy.next_token_logits(policy.read_prompts(prompts).hidden)[0]
    expected = logits.softmax(-1).detach().numpy() * count
    seen = np.bincount(responses.tokens[:, 0], minlength=32)
    usual = expected >= 5
    statistic = float(((seen - expected)[usual] ** 2 / expected[usual]).sum())
    # The 99.9 % quantile of chi-square with 31 degrees of freedom is 61.1.
    assert statistic < 61.1


def test_noise_is_that_of_each_seed_alone():
    first = noise([(0, 1), (0, 2)], 5)
    assert torch.equal(first[1:], noise([(0, 2)], 5))
    assert torch.equal(first[:, :3], noise([(0, 1), (0, 2)], 3))
    assert not torch.equal(first[0], first[1])
    assert ((first >= 0) & (first < 1)).all()


def test_a_folder_without_a_policy_is_refused(tmp_path):
    from hpo_verl.errors import DataError

    with pytest.raises(DataError, match="holds no policy"):
        Policy.load(tmp_path)
