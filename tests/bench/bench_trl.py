"""The lab against TRL's GRPOTrainer: `python tests/bench/bench_trl.py`; needs `pip install trl`.

Both train the same untrained policy (the tiny policy's shape), 64 prompts x 8 responses of at most
24 tokens, one optimizer step per batch, no KL term, rewards by chance, with the same number of
threads, in turns, so that other work on the machine meets both. Tokens per second count sampled
tokens over the whole step: sampling, reward, loss, update.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_lab import untrained_trainer

PROMPTS, GROUP, TOKENS = 64, 8, 24
ROUNDS, STEPS = 3, 4


class Clock(TrainerCallback):
    """Notes when every step ends."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def trl_rates(policy, questions, folder):
    """Tokens per second of every step but the first."""
    rng = random.Random(0)
    lengths = []

    def reward(completion_ids, **kwargs):
        lengths.append(sum(map(len, completion_ids)))
        return [float(rng.random() < 0.5) for _ in completion_ids]

    clock = Clock()
    settings = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP, max_completion_length=TOKENS, max_steps=STEPS + 1,
        learning_rate=1e-4, beta=0.0, temperature=1.0, top_k=0, top_p=1.0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy.model, processing_class=policy.tokenizer, reward_funcs=reward,
        args=settings, callbacks=[clock],
        train_dataset=Dataset.from_list([{"prompt": list(q.messages)} for q in questions]),
    )  # fmt: skip
    trainer.train()
    taken = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return [length / seconds for length, seconds in zip(lengths[1:], taken, strict=True)]


def lab_rates(trainer):
    """Tokens per second of every step but the first."""
    trainer.step(1)
    rates = []
    for step in range(2, STEPS + 2):
        started = time.perf_counter()
        row = trainer.step(step)
        rates.append(row["response_length"] * PROMPTS * GROUP / (time.perf_counter() - started))
    return rates


def main():
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    lab, trl = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            trainer = untrained_trainer(PROMPTS, TOKENS, ["training.mini_batches=1"])
            lab += lab_rates(trainer)
            trainer = untrained_trainer(PROMPTS, TOKENS)
            trl += trl_rates(trainer.policy, trainer.questions, folder)
    ratio = statistics.median(lab) / statistics.median(trl)
    print(f"{threads} threads, median over {len(lab)} steps each")
    print(f"lab: {statistics.median(lab):,.0f} tokens/s")
    print(f"TRL: {statistics.median(trl):,.0f} tokens/s")
    print(f"lab / TRL: {ratio:.2f}")


if __name__ == "__main__":
    main()
