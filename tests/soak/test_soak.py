"""What `make soak` finds fault with, on samples made by hand."""

import os
import runpy
from pathlib import Path

import pytest

SOAK = runpy.run_path(str(Path(__file__).with_name("soak.py")))
Sample, Shared = SOAK["Sample"], SOAK["Shared"]
STEPS = range(0, 501, 10)


def samples(name, anonymous=lambda step: 1000, descriptors=lambda step: 10, steps=STEPS):
    return [Sample(step, name, anonymous(step) << 20, 0, descriptors(step), 5) for step in steps]


def shared(size=lambda step: 64):
    return [Shared(step, 1, size(step) << 20) for step in STEPS]


def test_growth_is_per_hundred_steps_of_the_first_value():
    assert SOAK["growth_percent"]([50, 100, 150], [200, 201, 202]) == pytest.approx(1.0)
    assert SOAK["growth_percent"]([50, 100], [200, 200]) == 0
    with pytest.raises(ValueError, match="two steps"):
        SOAK["growth_percent"]([50, 50], [1, 2])


def test_what_stays_the_same_misses_nothing():
    table, missed = SOAK["judge"](samples("WorkerDict 7"), shared(), 500)
    assert missed == 0
    assert table.splitlines()[1].split() == ["WorkerDict", "1000", "0.00", "10-10", "5"]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        # 11 of 1000 MiB per 100 steps: 1.1 %.
        ({"anonymous": lambda step: 1000 + 11 * step // 100}, "memory grows"),
        ({"descriptors": lambda step: 10 + step // 300}, "descriptors grow"),
    ],
)
def test_what_grows_is_named(changed, word):
    table, missed = SOAK["judge"](samples("WorkerDict 7", **changed), shared(), 500)
    assert missed == 1
    assert table.splitlines()[1].endswith(word)


def test_growth_of_the_first_steps_is_the_start():
    start = samples("WorkerDict 7", anonymous=lambda step: min(1000, 20 * step))
    assert SOAK["judge"](start, shared(), 500)[1] == 0


def test_what_comes_and_goes_is_left_out():
    passing = samples("IDLE 8", anonymous=lambda step: 100 + step, steps=range(100, 300, 10))
    table, missed = SOAK["judge"]([*samples("WorkerDict 7"), *passing], shared(), 500)
    assert missed == 0
    assert "IDLE" not in table


def test_anonymous_memory_is_what_a_process_takes_for_itself():
    before = SOAK["anonymous_bytes"](os.getpid())
    taken = bytearray(b"x") * (64 << 20)
    after = SOAK["anonymous_bytes"](os.getpid())
    assert after - before == pytest.approx(len(taken), rel=0.1)


def test_what_is_open_for_a_moment_is_no_growth():
    table, missed = SOAK["judge"](
        samples("WorkerDict 7", descriptors=lambda step: 12 if step == 400 else 10), shared(), 500
    )
    assert missed == 0
    assert "10-12" in table


def test_shared_memory_that_grows_is_named():
    table, missed = SOAK["judge"](samples("WorkerDict 7"), shared(lambda step: step), 500)
    assert missed == 1
    assert table.splitlines()[-1].endswith("grows")
