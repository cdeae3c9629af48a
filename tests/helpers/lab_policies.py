"""Small random policies for the lab's tests, and results without a run."""

import math
from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.lab import warm_start
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.results import Result
from hpo_verl.lab.settings import read_study

END, PAD = 0, 1
QUICK = [
    "seeds=2", "training.steps=2", "training.prompts_per_step=4", "training.mini_batches=2",
    "training.responses_per_prompt=4", "training.questions=16", "evaluation.questions=8",
    "evaluation.every=1",
]  # fmt: skip


def random_model(vocabulary=32, seed=0, std=0.3):
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def random_policy(vocabulary=32, seed=0):
    return Policy(
        random_model(vocabulary, seed), SimpleNamespace(eos_token_id=END, pad_token_id=PAD)
    )


def keep_warm_starts(study):
    """Put random policies where the cells of a study look for their warm starts."""
    tokenizer = build_tokenizer()
    policy = Policy(random_model(len(tokenizer), std=0.1), tokenizer)
    for folder in {cell.start.folder for cell in study.cells()}:
        folder.parent.mkdir(parents=True, exist_ok=True)
        warm_start.save(policy, folder, 0.05)


def made_up_result(cell, success, status="finished", **columns):
    """A result with the given learning curve, one measurement per step."""
    steps = len(success)
    missing = [math.nan] * steps
    names = (
        "alpha", "solve_rate", "entropy", "response_length", "response_length_std",
        "response_length_positive", "response_length_negative",
    )  # fmt: skip
    values = {name: [0.5 + 0.1 * i for i in range(steps)] for name in names}
    values["step"] = [float(i) for i in range(steps)]
    values["success"] = list(success)
    values["responses_sampled"] = [math.nan, *(512.0 * i for i in range(1, steps))]
    environment = {"commit": "abc", "versions": "{}", "machine": "test", "finished": "now"}
    facts = {
        "cell": cell, "status": status, "seconds": 1.0, "warm_start_success": success[0],
        "environment": environment,
    }  # fmt: skip
    assert set(columns) <= {*values, *names}
    return Result(facts, {**values, **columns} if steps else {"step": missing})


def quick_study(name="alpha", *overrides):
    return read_study(name, [*QUICK, *overrides])
