"""Time a step of the lab: `python tests/bench/bench_lab.py`.

The worst case: an untrained policy of the tiny policy's shape, whose responses hardly end before
the longest length, and rewards by chance, so that every group has something to learn from. Then
half and a quarter of the samples, and of the tokens, to see the cost grow.
"""

import dataclasses
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data_prep.policies.tokenizer import build_tokenizer
from data_prep.policies.training import build_model
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.settings import read_study
from hpo_verl.lab.trainer import Trainer

STEPS = 5


def untrained_trainer(prompts, tokens, overrides=()):
    """A trainer of 8 responses per prompt with at most so many tokens."""
    changes = [
        f"training.prompts_per_step={prompts}", f"max_response_length={tokens}",
        "training.learning_rate=3e-4", "evaluation.every=1000", *overrides,
    ]  # fmt: skip
    cell = read_study("rates", changes, only=["a_hpo"]).cells()[0]
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    trainer = Trainer(cell, Policy(build_model(tokenizer).eval(), tokenizer))
    rng = random.Random(0)
    trainer.task = dataclasses.replace(
        trainer.task, score=lambda text, truth: {"score": float(rng.random() < 0.5)}
    )
    return trainer


def seconds_per_step(prompts, tokens):
    """Median seconds of a step, and tokens sampled and trained on per second."""
    trainer = untrained_trainer(prompts, tokens)
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


if __name__ == "__main__":
    main()
