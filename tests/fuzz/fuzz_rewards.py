"""Throw mutated responses at both reward functions: `python tests/fuzz/fuzz_rewards.py`.

A response is wrong if the function raises, takes more than 5 ms of CPU time, breaks
the format of its result, or disagrees with the independent judges of `oracles.py`.
Every score of 1 is checked against them, and so is one in eight of the zeros. The
same seed gives the same responses; a failure prints the response and exits with 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from oracles import UNICODE_FORMS, countdown_oracle, telelogs_oracle

from hpo_verl.rewards import countdown, telelogs

LIMIT_SECONDS = 0.005
ZEROS_CHECKED = 8

PUZZLES = [
    ([3, 7, 2], 20, ["(3 + 7) * 2", "2*(7+3)", "3*2 + 7*2"]),
    ([44, 19, 35], 98, ["44 + 19 + 35", "(44+19)+35", "98"]),
    ([1, 5, 2], 3, ["5 - 1 * 2", "1.5*2", "(5+1)/2"]),
    ([8, 3, 8, 3], 24, ["8 / (3 - 8 / 3)", "8*3*(8/8)"]),
    ([6, 6, 6, 6, 1, 100], 124, ["100 + 6 + 6 + 6 + 6 * 1", "100+6*(6-6/6)-1"]),
]
TOKENS = [
    "<answer>", "</answer>", "<answer", "</think>", "<think>", "(", ")", "((", "))", "+", "-",
    "*", "/", "**", "//", "=", "= 20", "==", " ", "\n", "\t", "0", "1", "007", "3", "7", "2",
    "1e9", ".5", "0x10", "1_0", "²", "３", "٣", "nan", "inf", "__import__('os')", "9**9**9",
    "lambda:0", "\x00", "\ud800", "\u202e", "😀", "\\times", "\\frac{1}{2}", "\\boxed{",
    "\\boxed{{", "}", "}}", "{", "C", "c3", "C3", "C12", "\\text{", "\\text{C3}", "5", "8", "9",
    "\\", "%", "#", "and", "if", ",", ":=", *"".join(UNICODE_FORMS.values()),
]  # fmt: skip
BOXES = [
    "\\boxed{C3}",
    "\\boxed{{C3}}",
    "\\boxed{\\text{C3}}",
    "\\boxed{3}",
    "\\boxed{{\\text{c3}}}",
    "\\boxed{C5}",
    "\\boxed{{c8}}",
]


def countdown_seeds() -> Iterator[tuple[str, dict]]:
    """Yield responses to start from, right and wrong, each with its ground truth."""
    for numbers, target, answers in PUZZLES:
        for answer in answers:
            for text in (
                answer,
                f" {answer} = {target}\n",
                f"{answer}={target + 1}",
                answer.replace("*", "×"),
            ):
                yield f"I try.\n<answer>{text}</answer>", {"target": target, "numbers": numbers}


def mutate(text: str, rng: random.Random, pool: list[str]) -> str:
    """Return the text after one to six random edits."""
    for _ in range(rng.randint(1, 6)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        match rng.randrange(8):
            case 0 | 1:
                text = text[:a] + rng.choice(TOKENS) + text[a:]
            case 2:
                text = text[:a] + text[a + 1 :]
            case 3:
                text = text[:a] + rng.choice(TOKENS) + text[a + 1 :]
            case 4:
                text = text[:a] + text[a:b] * rng.randint(0, 3) + text[b:]
            case 5:
                text = text[:a] + text[b:] + text[a:b]
            case 6:
                text = text + rng.choice(pool)
            case _:
                if rng.random() < 0.02:
                    text = (rng.choice(TOKENS) * rng.choice((300, 5_000, 60_000)))[:99_000] + text
    return text[:150_000]


def check(score: Callable[[], dict], oracle: Callable[[], float], thorough: bool) -> str | None:
    """Return what is wrong with one call, or None."""
    started = time.thread_time()
    result = score()
    if time.thread_time() - started > LIMIT_SECONDS:
        # Once may be a garbage collection or a cold cache; three times is the input.
        times = []
        for _ in range(3):
            started = time.thread_time()
            score()
            times.append(time.thread_time() - started)
        if min(times) > LIMIT_SECONDS:
            return f"took {min(times) * 1e3:.1f} ms"
    if list(result)[:4] != ["score", "acc", "format", "reason"] or result["score"] not in (0.0, 1):
        return f"malformed result {result}"
    if (result["score"] or thorough) and result["score"] != oracle():
        return f"scored {result['score']}, the judge says {oracle()}"
    return None


def fuzz(count: int, seed: int) -> tuple[Counter[str], str | None]:
    """Score `count` mutated responses; return how often each reason came, and a failure."""
    rng = random.Random(seed)
    corpus = list(countdown_seeds())
    pool = [text for text, _ in corpus] + BOXES
    reasons: Counter[str] = Counter()
    for number in range(count):
        thorough = number % (2 * ZEROS_CHECKED) < 2
        if number % 2:
            start, truth = rng.choice(corpus)
            text = mutate(start, rng, pool)
            call = lambda text=text, truth=truth: countdown.compute_score("f", text, truth)  # noqa: E731
            judge = lambda text=text, truth=truth: countdown_oracle(  # noqa: E731
                text, truth["target"], truth["numbers"]
            )
        else:
            text = mutate(rng.choice(BOXES), rng, BOXES)
            call = lambda text=text: telelogs.compute_score("f", text, "C3")  # noqa: E731
            judge = lambda text=text: telelogs_oracle(text, "C3")  # noqa: E731
        try:
            wrong = check(call, judge, thorough)
        except Exception as error:
            wrong = f"raised {error!r}"
        if wrong:
            return reasons, f"seed {seed}, response {number}: {wrong}: {text[:2000]!r}"
        if thorough:
            reasons[call()["reason"]] += 1
    return reasons, None


def main() -> int:
    """Run the fuzzer in several processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000, help="responses (1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    started = time.perf_counter()
    chunk = 20_000
    parts = [
        (min(chunk, arguments.count - begin), arguments.seed * 1_000_003 + begin)
        for begin in range(0, arguments.count, chunk)
    ]
    done, reasons = 0, Counter()
    with get_context("spawn").Pool(arguments.jobs) as pool:
        for (size, _), (counted, wrong) in zip(parts, pool.imap(_fuzz, parts), strict=True):
            if wrong:
                print(f"FAILED: {wrong}")
                return 1
            done += size
            reasons += counted
            if done % 100_000 == 0:
                print(f"{done:,} responses, {time.perf_counter() - started:.0f} s", flush=True)
    shown = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    print(
        f"{done:,} responses, no fault; reasons of the {sum(reasons.values()):,} zeros and ones "
        f"compared in full: {shown}"
    )
    return 0


def _fuzz(part: tuple[int, int]) -> tuple[Counter[str], str | None]:
    return fuzz(*part)


if __name__ == "__main__":
    sys.exit(main())
