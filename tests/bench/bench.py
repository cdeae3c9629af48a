"""Times of the mathematics against verl's own functions, in one run: `make bench`.

Prints medians, ratios and limits, and exits with 1 if a limit is missed.
Repetitions of all candidates take turns, so that a busy machine slows each of
them alike. `--device cuda` measures the losses on a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def medians(candidates: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, float]:
    """Median seconds of each candidate, given as function and number of repetitions."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for function, _ in candidates.values():
        function()
    for turn in range(max(turns for _, turns in candidates.values())):
        for name, (function, turns) in candidates.items():
            if turn < turns:
                begin = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


class Report:
    """Collects lines and remembers whether every limit was kept."""

    def __init__(self) -> None:
        self.missed = 0

    def line(self, text: str, value: float, limit: float, *, at_least: bool = False) -> None:
        kept = value >= limit if at_least else value <= limit
        self.missed += not kept
        sign = ">=" if at_least else "<="
        print(f"  {text:<58}{value:8.2f}  {sign} {limit:<6g}{'' if kept else '  MISSED'}")


def estimators(report: Report) -> None:
    """`a_hpo` against verl's two implementations of GRPO, and against one broadcast."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    def candidate(name: str, responses: int, width: int) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        rewards = torch.zeros(responses, width)
        rewards[:, -1] = torch.randint(0, 2, (responses,), generator=generator).float()
        mask = torch.ones(responses, width)
        names = random.Random(0)
        prompts = [str(uuid.UUID(int=names.getrandbits(128))) for _ in range(responses // 8)]
        uids = np.array([prompts[i // 8] for i in range(responses)], dtype=object)
        function = get_adv_estimator_fn(name)
        return lambda: function(
            token_level_rewards=rewards, response_mask=mask, config=None, index=uids
        )

    print("advantages, 65,536 responses x 32 tokens")
    turns = {"a_hpo": 15, "grpo_vectorized": 15, "grpo": 3}
    short = medians({name: (candidate(name, 65536, 32), count) for name, count in turns.items()})
    for name, seconds in short.items():
        print(f"  {name:<20}{1e3 * seconds:10.1f} ms")
    report.line("grpo / a_hpo", short["grpo"] / short["a_hpo"], 50, at_least=True)
    report.line(
        "grpo_vectorized / a_hpo", short["grpo_vectorized"] / short["a_hpo"], 3, at_least=True
    )

    print("advantages, 8,192 responses x 2,048 tokens")
    values, mask = torch.randn(8192), torch.ones(8192, 2048)
    long = medians(
        {
            "a_hpo": (candidate("a_hpo", 8192, 2048), 25),
            "broadcast": (lambda: values[:, None] * mask, 25),
        }
    )
    for name, seconds in long.items():
        print(f"  {name:<20}{1e3 * seconds:10.1f} ms")
    report.line("a_hpo / a[:, None] * mask", long["a_hpo"] / long["broadcast"], 1.3)


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Largest memory that one step holds beyond its inputs, bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def losses(report: Report, device: str) -> None:
    """Forward and backward of a loss on 64 x 8,192 tokens, float32."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    rows, width = 64, 8192
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, width, generator=generator)
    current = (old + 0.1 * torch.randn(rows, width, generator=generator)).to(device)
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, width).contiguous()
    lengths = torch.randint(1000, width, (rows, 1), generator=generator)
    mask = (torch.arange(width) < lengths).to(device)
    old, advantages = old.to(device), advantages.to(device)
    config = ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=int(mask.sum()),
        global_batch_size=rows,
        loss_scale_factor=None,
    )

    def candidate(name: str) -> Callable[[], Any]:
        mode = "seq-mean-token-mean" if name in ("gspo", "sapo", "mhpo") else "token-mean"
        log_prob = current.clone().requires_grad_()

        def step() -> None:
            log_prob.grad = None
            loss, _ = get_policy_loss_fn(name)(
                old_log_prob=old,
                log_prob=log_prob,
                advantages=advantages,
                response_mask=mask,
                loss_agg_mode=mode,
                config=config,
            )
            loss.backward()
            if device != "cpu":
                torch.cuda.synchronize()

        return step

    print(f"loss, forward and backward, 64 x 8,192 float32, {device}")
    names = ("vanilla", "hpo", "mhpo", "gspo", "sapo", "cispo")
    steps = {name: candidate(name) for name in names}
    seconds = medians({name: (step, 41) for name, step in steps.items()})
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    for name in names:
        print(f"  {name:<20}{1e3 * seconds[name]:10.2f} ms{memory[name] / 2**20:10.1f} MiB")
    report.line("hpo / vanilla, time", seconds["hpo"] / seconds["vanilla"], 0.6)
    report.line("hpo / vanilla, peak memory", memory["hpo"] / memory["vanilla"], 1.0)
    report.line("mhpo / vanilla, time", seconds["mhpo"] / seconds["vanilla"], 1.2)


def main() -> int:
    """Run what was asked for; 1 if a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the losses")
    # Ray gives verl's driver one thread; with more, a busy machine measures its scheduler.
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--only", choices=("advantages", "losses"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, medians; load {os.getloadavg()}"
    )
    report = Report()
    if arguments.only != "losses":
        estimators(report)
    if arguments.only != "advantages":
        losses(report, arguments.device)
    print("all limits kept" if not report.missed else f"{report.missed} limits missed")
    return int(report.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
