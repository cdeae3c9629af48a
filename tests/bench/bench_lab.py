"""Time a step of the lab: `python tests/bench/bench_lab.py`.

The worst case: an untrained policy of the tiny policy's shape, whose responses hardly end before
the longest length, and rewards by chance, so that every group has something to learn from. Then
half and a quarter of the samples, and of the tokens, to see the cost grow; and a policy of four
times the size.
"""

import dataclasses
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data_prep.policies.tokenizer import build_tokenizer
from data_prep.policies.training import build_model
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.settings import read_study
from hpo_verl.lab.trainer import Trainer

STEPS = 5


def untrained_model(tokenizer, hidden):
    """The tiny policy's shape, or a wider and deeper one."""
    model = build_model(tokenizer)
    if hidden == model.config.hidden_size:
        return model
    sizes = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**model.config.to_dict() | sizes | {"layer_types": None}))


def untrained_trainer(prompts, tokens, overrides=(), hidden=64):
    """A trainer of 8 responses per prompt with at most so many tokens."""
    changes = [f"training.prompts_per_step={prompts}", "evaluation.every=1000", *overrides]
    cell = next(c for c in read_study("sparse", changes).cells() if c.variant == "a_hpo")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    trainer = Trainer(cell, Policy(untrained_model(tokenizer, hidden).eval(), tokenizer))
    rng = random.Random(0)
    trainer.task = dataclasses.replace(
        trainer.task,
        max_response_length=tokens,
        score=lambda text, truth: float(rng.random() < 0.5),
    )
    return trainer


def seconds_per_step(prompts, tokens, hidden=64):
    """Median seconds of a step, and tokens sampled and trained on per second."""
    trainer = untrained_trainer(prompts, tokens, hidden=hidden)
    trainer.step(1)
    taken = []
    for step in range(2, 2 + STEPS):
        started = time.perf_counter()
        row = trainer.step(step)
        taken.append(time.perf_counter() - started)
    median = statistics.median(taken)
    return median, row["response_length"] * prompts * 8 / median


def main():
    torch.set_num_threads(1)
    print("prompts x 8, longest response: seconds per step, tokens per second (one thread)")
    for prompts, tokens in ((64, 24), (32, 24), (16, 24), (64, 12), (64, 48)):
        seconds, rate = seconds_per_step(prompts, tokens)
        print(f"{prompts:3} x 8, {tokens:2} tokens: {seconds:.2f} s, {rate:,.0f} tokens/s")
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    hidden = 128
    size = untrained_model(build_tokenizer(), hidden).num_parameters() / 1e6
    seconds, rate = seconds_per_step(64, 24, hidden)
    policy = f"{size:.2f} M parameters, {cores} threads"
    print(f" 64 x 8, 24 tokens, {policy}: {seconds:.2f} s, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
