"""A long run of `countdown-tiny` in small batches, and what its processes take: `make soak`.

Prints a table, and exits with 1 if the memory of a process grows by more than 1 % per
100 steps after the first 50, or file descriptors or shared memory grow at all. A
process's memory is its anonymous memory: which pages of programs and libraries are in
memory depends on what else runs on the machine, and Ray's object store is counted as
shared memory. Every sample is a line of `samples.jsonl` in the folder of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hpo_verl.runs.metrics import MetricsFile
from hpo_verl.runs.process import MARKER, SHARED_MEMORY, marked_processes

FIRST_STEPS = 50
LIMIT_PERCENT = 1.0
SAMPLE_SECONDS = 5.0
SMALL = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    # Both belong to the first steps, too.
    "trainer.test_freq=25",
    "trainer.save_freq=25",
]


class Sample(NamedTuple):
    """One look at one process."""

    step: int
    process: str
    anonymous: int
    pss: int
    descriptors: int
    threads: int


class Shared(NamedTuple):
    """One look at what all processes share."""

    step: int
    files: int
    bytes: int


def growth_percent(steps: Sequence[int], values: Sequence[float]) -> float:
    """Growth per 100 steps in percent of the first value, by the line of least squares."""
    if len(set(steps)) < 2:
        raise ValueError("growth needs samples at two steps at least")
    slope, start = statistics.linear_regression(steps, values)
    return 100 * 100 * slope / (start + slope * steps[0])


def grows(values: Sequence[int]) -> bool:
    """Whether the median of the later half is above the median of the earlier half."""
    half = len(values) // 2
    return statistics.median(values[half:]) > statistics.median(values[:half])


def look(marker: str, step: int) -> Iterator[Sample]:
    """Look at every process of the run."""
    for process in marked_processes(marker):
        try:
            memory = process.memory_full_info()
            name = f"{process.name().split('.')[0].removeprefix('ray::')} {process.pid}"
            yield Sample(
                *(step, name, anonymous_bytes(process.pid), memory.pss),
                *(process.num_fds(), process.num_threads()),
            )
        except (psutil.Error, OSError):
            continue


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(f"process {pid} has ended")


def judge(samples: Sequence[Sample], shared: Sequence[Shared], last_step: int) -> tuple[str, int]:
    """Table of what grew, and how many limits were missed."""
    by_process: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.step >= FIRST_STEPS:
            by_process[sample.process.rsplit(" ", 1)[1]].append(sample)
    lines = [f"{'process':<28}{'MiB':>8}{'% / 100 steps':>15}{'fds':>12}{'threads':>9}"]
    missed = 0
    for seen in by_process.values():
        # What comes and goes has no growth.
        if seen[0].step > FIRST_STEPS + 0.1 * last_step or seen[-1].step < 0.9 * last_step:
            continue
        steps = [sample.step for sample in seen]
        growth = growth_percent(steps, [sample.anonymous for sample in seen])
        descriptors = [sample.descriptors for sample in seen]
        wrong = [
            *(["memory grows"] if growth > LIMIT_PERCENT else []),
            *(["descriptors grow"] if grows(descriptors) else []),
        ]
        missed += len(wrong)
        size = seen[-1].anonymous / 2**20
        lines.append(
            f"{seen[-1].process.split()[0][:27]:<28}{size:>8.0f}{growth:>15.2f}"
            f"{f'{min(descriptors)}-{max(descriptors)}':>12}{seen[-1].threads:>9}"
            f"  {', '.join(wrong)}".rstrip()
        )
    later = [one for one in shared if one.step >= FIRST_STEPS]
    wrong = grows([one.bytes for one in later]) or grows([one.files for one in later])
    missed += wrong
    sizes = [one.bytes / 2**20 for one in later]
    lines.append(
        f"{'shared memory':<28}{sizes[-1]:>8.1f} MiB, {min(sizes):.1f}-{max(sizes):.1f}; files "
        f"{min(one.files for one in later)}-{max(one.files for one in later)}"
        f"{'  grows' if wrong else ''}"
    )
    return "\n".join(lines), missed


def run(steps: int, seconds: float, folder: Path, overrides: Sequence[str]) -> tuple[Any, ...]:
    """Run, and look every few seconds; a run that takes too long is stopped as by Ctrl-C."""
    command = [
        *(sys.executable, "-m", "hpo_verl", "train", "countdown-tiny", *SMALL, *overrides),
        *(f"trainer.total_training_steps={steps}", f"hydra.run.dir={folder}"),
    ]
    launcher = subprocess.Popen(command)
    metrics = MetricsFile(folder / "metrics.jsonl")
    samples: list[Sample] = []
    shared: list[Shared] = []
    started = time.monotonic()
    marker = ""
    with (folder / "samples.jsonl").open("w") as log:
        while launcher.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            metrics.read_new()
            if not metrics.rows:
                continue
            step = metrics.rows[-1][0]
            if not marker:
                (main,) = psutil.Process(launcher.pid).children()
                marker = main.environ()[MARKER]
            new = list(look(marker, step))
            samples += new
            used = shutil.disk_usage(SHARED_MEMORY).used
            shared.append(Shared(step, len(os.listdir(SHARED_MEMORY)), used))
            for line in (*new, shared[-1]):
                log.write(json.dumps(line._asdict()) + "\n")
            if time.monotonic() - started > seconds:
                launcher.terminate()
                seconds = float("inf")
    return launcher.returncode, samples, shared, metrics.rows[-1][0]


def main() -> int:
    """Run, print the table, and say whether every limit was kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop then (3600)")
    parser.add_argument("--out", type=Path, help="folder of the run; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    code, samples, shared, step = run(
        arguments.steps, arguments.seconds, folder.absolute(), arguments.overrides
    )
    table, missed = judge(samples, shared, step)
    print(f"{step} steps, {len(shared)} samples, exit code {code}: {folder}/samples.jsonl\n{table}")
    return int(missed > 0 or code not in (0, 130))


if __name__ == "__main__":
    sys.exit(main())
