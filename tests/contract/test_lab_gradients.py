"""On one batch the lab's advantages and gradient are those of verl's actor."""

import itertools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from estimator_calls import named_rewards
from lab_policies import IN_LAB
from transformers import Qwen2Config, Qwen2ForCausalLM

from hpo_verl.lab.policy import Policy
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.tasks import find_task

WORKER = Path(__file__).with_name("lab_gradients_worker.py")
WIDTH, GROUP, VOCABULARY = 9, 4, 32
# Where a recipe has an entropy term, a weight of it that shows.
ENTROPY = {"actor_rollout_ref.actor.entropy_coeff": 0.1}
RELATIVE = 1e-5


def rows_of(prompts, lengths):
    """Tokens of every response's prompt."""
    rows = [tuple(row[:n].tolist()) for row, n in zip(prompts, lengths.tolist(), strict=True)]
    return [row for row in rows for _ in range(16 // len(rows))]


def make_batch(policy, generator):
    """Four prompts with four responses: two groups are mixed (alpha = 2/6), two are not."""
    prompt_lengths = torch.tensor([3, 5, 4, 5])
    prompts = torch.randint(0, VOCABULARY, (4, 5), generator=generator)
    lengths = torch.tensor([9, 2, 5, 7, 1, 4, 6, 3, 8, 2, 9, 5, 4, 4, 6, 1])
    mask = torch.arange(WIDTH) < lengths[:, None]
    responses = torch.randint(0, VOCABULARY, (16, WIDTH), generator=generator)
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    with torch.no_grad():
        log_prob = policy.log_probs(rows_of(prompts, prompt_lengths), responses, mask)
    # Ratios on both sides of every clip; one sequence as a whole close to 1, within GSPO's.
    old = log_prob + 0.3 * torch.randn(16, WIDTH, generator=generator)
    old[5] = log_prob[5] + 1e-4
    old[0, 1] = log_prob[0, 1] - 1.0  # a ratio of 2.7, beyond the widest clip
    old[7, 0] += 30.0  # beyond the bound of the log-ratio
    ref = log_prob + 0.3 * torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
    return {
        "prompts": prompts.repeat_interleave(GROUP, 0),
        "prompt_lengths": prompt_lengths.repeat_interleave(GROUP),
        "responses": responses,
        "mask": mask,
        "old_log_prob": torch.where(mask, old, 0.0),
        "ref_log_prob": torch.where(mask, ref, 0.0),
        "rewards": rewards,
        "groups": torch.arange(4).repeat_interleave(GROUP),
        "entropy": 3.0 * torch.rand(16, WIDTH, generator=generator) ** 2,
        "progress": 0.5,
        **named_rewards(16),
        "values": torch.rand(16, generator=generator, dtype=torch.float64),
        "memory": {
            "epo_entropy": 1.5,
            "epo_steps": 2.0,
            "ares_threshold": 1.5,
            **{f"ares_target_{bucket}": 0.2 for bucket in ("easy", "medium", "hard")},
        },
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    policy = Policy(model, SimpleNamespace(eos_token_id=0, pad_token_id=1))
    batch = make_batch(policy, generator)
    torch.save(batch, folder / "batch.pt")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    finished = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(port), *IN_LAB],
        env=os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return policy, batch, torch.load(folder / "verl.pt")


@pytest.mark.parametrize("name", IN_LAB)
def test_advantages_and_gradient_equal_those_of_verls_actor(compared, name):
    policy, batch, verl = compared
    task = replace(find_task("countdown3"), max_response_length=WIDTH)
    objective = read_objective(task, name)
    if objective.has_entropy_term:
        objective = read_objective(task, name, ENTROPY)
    mask, entropy = batch["mask"], batch["entropy"]
    groups = batch["groups"] if objective.history(16) is None else torch.arange(len(mask))
    known = batch | {"memory": dict(batch["memory"])}
    advantages, _, given = objective.advantages(batch["rewards"], groups, mask, known)
    torch.testing.assert_close(advantages, verl[name]["advantages"], rtol=RELATIVE, atol=RELATIVE)

    policy.model.zero_grad()
    prompts = rows_of(batch["prompts"], batch["prompt_lengths"])
    with_entropy, counts = objective.has_entropy_term, (int(mask.sum()), len(mask))
    log_prob, now = policy.scored(prompts, batch["responses"], mask, with_entropy)
    fields = objective.token_fields(entropy, mask, given)
    # Of the tokens that a loss chooses by chance.
    torch.manual_seed(0)
    slopes, _ = objective.gradient(
        log_prob, batch["old_log_prob"], advantages, mask, fields, counts
    )
    if objective.actor.use_kl_loss:
        ref = batch["ref_log_prob"]
        slopes = slopes + objective.kl_gradient(log_prob, ref, mask, fields, counts)
    if now is None:
        log_prob.backward(slopes)
    else:
        of_entropy = objective.entropy_gradient(now, mask, fields, counts)
        torch.autograd.backward([log_prob, now], [slopes, of_entropy])
    theirs = verl[name]["gradients"]
    ours = {key: parameter.grad for key, parameter in policy.model.named_parameters()}
    assert set(ours) == set(theirs)
    for key, gradient in ours.items():
        largest = theirs[key].abs().max().item()
        assert largest > 0, key
        difference = (gradient - theirs[key]).abs().max().item()
        assert difference <= RELATIVE * largest, (key, difference / largest)


def test_the_algorithms_differ_on_this_batch(compared):
    """Equality above would mean little if the batch could not tell the algorithms apart.

    Sessions of one output leave `eapo` nothing to discount; `test_sessions.py` has longer ones.
    """
    _, _, verl = compared
    flat = {
        name: torch.cat([g.flatten() for g in verl[name]["gradients"].values()]) for name in IN_LAB
    }
    for first, second in itertools.combinations(IN_LAB, 2):
        gap = (flat[first] - flat[second]).norm() / flat[first].norm()
        assert (gap > 1e-3) == ((first, second) != ("gspo", "eapo")), (first, second)
