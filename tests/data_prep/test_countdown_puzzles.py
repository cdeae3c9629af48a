from collections import Counter
from itertools import combinations_with_replacement

import numpy as np
import pytest
from countdown_values import expressions

from data_prep.countdown import puzzles as countdown_puzzles
from data_prep.countdown.puzzles import Ranges, sample_puzzles, worked
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.rewards.countdown import compute_score


def key(puzzle):
    return tuple(sorted(puzzle.numbers)), puzzle.target


def universe(ranges):
    """All solvable puzzles of small ranges with their number of solutions."""
    found = Counter()
    numbers = range(ranges.min_number, ranges.max_number + 1)
    for chosen in combinations_with_replacement(numbers, ranges.numbers):
        for _, value in expressions(chosen):
            if value.denominator == 1 and ranges.min_target <= value <= ranges.max_target:
                found[chosen, int(value)] += 1
    return found


@pytest.mark.parametrize(
    "ranges", [Ranges(3, 1, 9, 1, 100), Ranges(3, 2, 6, 5, 9), Ranges(4, 1, 4, 1, 30)]
)
def test_exhausting_the_ranges_gives_every_solvable_puzzle_once(ranges):
    every = universe(ranges)
    puzzles = sample_puzzles(len(every), ranges, seed=3)
    assert {key(p): p.difficulty for p in puzzles} == every
    with pytest.raises(DataError, match=f"only {len(every)} solvable ones"):
        sample_puzzles(len(every) + 1, ranges, seed=3)


@pytest.mark.parametrize(
    ("ranges", "count"),
    [(Ranges(3), 3000), (Ranges(4), 2000), (Ranges(4, 1, 50, 100, 999), 1000)],
)
def test_puzzles_are_solvable_in_range_and_different(ranges, count):
    puzzles = sample_puzzles(count, ranges, seed=1)
    assert len({key(p) for p in puzzles}) == len(puzzles) == count
    for puzzle in puzzles:
        assert len(puzzle.numbers) == ranges.numbers
        assert ranges.min_number <= min(puzzle.numbers) <= max(puzzle.numbers) <= ranges.max_number
        assert ranges.min_target <= puzzle.target <= ranges.max_target
        assert puzzle.difficulty >= 1
        truth = {"target": puzzle.target, "numbers": puzzle.numbers}
        response = f"<answer>{puzzle.solution}</answer>"
        assert compute_score("c", response, truth)["score"] == 1
    # The numbers are not listed in order.
    assert sum(list(p.numbers) == sorted(p.numbers) for p in puzzles) < 0.5 * count


def test_same_seed_same_puzzles_other_seed_others():
    ranges = Ranges(4, 1, 20, 1, 50)
    first = sample_puzzles(500, ranges, seed=7)
    assert sample_puzzles(500, ranges, seed=7) == first
    assert {key(p) for p in sample_puzzles(500, ranges, seed=8)} != {key(p) for p in first}


def test_seeds_draw_different_number_sets_and_many_of_them():
    first, second = (
        {key(p)[0] for p in sample_puzzles(8000, Ranges(4), seed=seed)} for seed in (7, 8)
    )
    assert len(first) > 4000
    assert len(first & second) < 400


def test_the_solution_shown_is_drawn_among_all():
    ranges = Ranges(3, 1, 5, 1, 12)
    every = universe(ranges)
    shown = {}
    for seed in range(30):
        for puzzle in sample_puzzles(len(every), ranges, seed=seed):
            shown.setdefault(key(puzzle), set()).add(puzzle.solution)
    several = [k for k, difficulty in every.items() if difficulty >= 3 and len(set(k[0])) == 3]
    assert several
    assert all(len(shown[k]) > 1 for k in several)


def test_a_shortfall_is_made_up(monkeypatch):
    """Where keeping a part of the targets proves too few, all are kept."""
    monkeypatch.setattr(countdown_puzzles, "_keep_probability", lambda *_: 0.1)
    ranges = Ranges(3, 1, 9, 1, 100)
    assert len({key(p) for p in sample_puzzles(2000, ranges, seed=0)}) == 2000


def test_sampling_is_uniform_over_solvable_puzzles():
    """Half of a small universe, many times: every puzzle comes in half of the samples."""
    ranges = Ranges(3, 1, 5, 1, 12)
    every = universe(ranges)
    half, repeats = len(every) // 2, 300
    seen = Counter(
        key(p) for seed in range(repeats) for p in sample_puzzles(half, ranges, seed=seed)
    )
    share = np.array([seen[k] for k in every]) / repeats
    # Five standard deviations of a frequency of 1/2 over 300 draws.
    assert np.abs(share - half / len(every)).max() < 5 * 0.5 / np.sqrt(repeats)


def test_sampling_a_part_is_uniform_over_puzzles_not_over_number_sets():
    """With r reachable targets of a puzzle's own number set, the mean of 1/r is sets/puzzles."""
    ranges = Ranges(3, 1, 15, 1, 60)
    every = universe(ranges)
    reachable = Counter(chosen for chosen, _ in every)
    drawn = [p for seed in range(12) for p in sample_puzzles(400, ranges, seed=seed)]
    inverse = np.array([1 / reachable[key(p)[0]] for p in drawn])
    error = 5 * inverse.std() / np.sqrt(len(inverse))
    assert inverse.mean() == pytest.approx(len(reachable) / len(every), abs=error)
    # Drawing the number set uniformly would be told apart.
    over_sets = np.mean([1 / r for r in reachable.values()])
    assert abs(over_sets - len(reachable) / len(every)) > 2 * error


def test_number_sets_are_a_permutation_of_all_multisets(monkeypatch):
    ranges = Ranges(4, 3, 9, 1, 10)
    every = sorted(combinations_with_replacement(range(3, 10), 4))
    monkeypatch.setitem(countdown_puzzles.SETS_AT_ONCE, 4, 50)
    drawn = np.concatenate(list(countdown_puzzles._number_sets(ranges, 5)))
    assert sorted(map(tuple, drawn.tolist())) == every
    assert list(map(tuple, drawn.tolist())) != every


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((2,), "numbers is 2; permitted: 3 or 4"),
        ((5,), "numbers is 5"),
        ((3, 0, 9), "min_number is 0 and max_number is 9; permitted: 1 <="),
        ((3, 9, 8), "min_number is 9 and max_number is 8"),
        ((3, 1, 9, 20, 10), "min_target is 20 and max_target is 10"),
        ((3, 1, 9, 0, 10), "min_target is 0"),
        ((3, 4000, 4097), "4097 make too many sets; permitted: numbers up to 4096 and"),
        ((4, 1, 200), "4 numbers from 1 to 200 make too many sets; permitted: .* 20,000,000 sets"),
    ],
)
def test_bad_ranges(values, message):
    with pytest.raises(ConfigError, match=message):
        Ranges(*values)


def test_ranges_without_any_puzzle_end_with_an_error():
    with pytest.raises(DataError, match="only 0 solvable ones"):
        sample_puzzles(1, Ranges(3, 1, 9, 800, 900), seed=0)


def test_progress_reaches_the_count():
    calls = []
    sample_puzzles(300, Ranges(3), seed=0, progress=calls.append)
    assert calls[-1] == 300
    assert calls == sorted(calls)


def test_operators_suffice_and_none_is_missed():
    ranges = Ranges(3, 1, 6, 1, 18, operators="+-")
    expected = {
        (numbers, int(value))
        for numbers in combinations_with_replacement(range(1, 7), 3)
        for text, value in expressions(numbers)
        if not set(text) & set("*/") and value.denominator == 1 and 1 <= value <= 18
    }
    found = sample_puzzles(len(expected), ranges, seed=0)
    assert {(tuple(sorted(puzzle.numbers)), puzzle.target) for puzzle in found} == expected
    assert all(not set(puzzle.solution) & set("*/") for puzzle in found)
    with pytest.raises(DataError, match="operators \\+- exist"):
        sample_puzzles(len(expected) + 1, ranges, seed=0)


@pytest.mark.parametrize("operators", ["", "+x", "%"])
def test_unknown_operators_are_refused(operators):
    with pytest.raises(ConfigError, match=r"permitted: one or more of \+ - \* /"):
        Ranges(3, operators=operators)


@pytest.mark.parametrize(
    ("solution", "lines"),
    [
        ("(3 + 7) * 2", ["3+7=10", "10*2=20", "<answer>(3+7)*2</answer>"]),
        ("9 * (3 - 7) + 40", ["3-7=-4", "9*(-4)=-36", "(-36)+40=4", "<answer>9*(3-7)+40</answer>"]),
        ("8 / (3 / 6)", ["3/6=1/2", "8/(1/2)=16", "<answer>8/(3/6)</answer>"]),
    ],
)
def test_a_solution_is_worked_out_by_hand(solution, lines):
    assert worked(solution).splitlines() == lines
