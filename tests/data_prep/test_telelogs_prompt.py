"""The printed question: golden files, columns and number formats, balance, tiny form."""

from __future__ import annotations

import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_prep.telelogs.__main__ import synthetic_rows
from data_prep.telelogs.prompt import FEATURES, expert_answer, render, tiny_prompt
from data_prep.telelogs.simulator import simulate
from hpo_verl.rewards.telelogs import CAUSES

GOLDEN = Path(__file__).with_name("golden")


def golden_texts() -> dict[str, str]:
    """What the golden files hold; running this file as a script writes them anew."""
    tiny = islice(synthetic_rows("val", 16, 2025, "tiny"), 16)
    return {
        "telelogs_C1.txt": render(simulate((2025, 1), "C1")),
        "telelogs_C5.txt": render(simulate((2025, 5), "C5")),
        "telelogs_C6.txt": render(simulate((2025, 6), "C6")),
        "telelogs_tiny.txt": "".join(f"{row.question} {row.answer}\n" for row in tiny),
    }


def test_prompts_equal_the_golden_files() -> None:
    texts = golden_texts()
    assert {path.name for path in GOLDEN.glob("telelogs_*.txt")} == set(texts)
    for name, text in texts.items():
        assert (GOLDEN / name).read_text(encoding="utf-8") == text, name


DRIVE_FORMATS = [
    r"2025-\d\d-\d\d \d\d:\d\d:\d\d\.000000",
    r"128\.\d{6}",
    r"32\.\d{6}",
    r"\d{1,2}",
    r"\d{1,3}",
    r"-\d{2,3}\.\d\d",
    r"-?\d{1,2}\.\d\d",
    r"\d{1,4}\.\d\d",
    *[r"\d{1,3}|-"] * 5,
    *[r"-\d{2,3}\.\d\d|-"] * 5,
    r"\d{2,3}\.\d\d",
]
CELL_FORMATS = [
    r"00339\d\d",
    r"[0-2]",
    r"128\.\d{6}",
    r"32\.\d{6}",
    r"\d{1,3}",
    r"\d{1,2}",
    r"\d|10|255",
    r"0|5|10",
    r"DEFAULT|SCENARIO_([1-9]|1[0-6])",
    r"\d{1,2}\.\d",
    r"\d{1,3}",
    r"32T32R|64T64R",
    r"34\.9",
    r"NR AAU [1-3]",
]


def test_every_cause_prints_the_same_columns_and_formats() -> None:
    for index in range(160):
        question = render(simulate((4, index), CAUSES[index % 8]))
        head, drive, cells = re.split(
            r"User plane drive test data as follows：\n|Engeneering parameters data as follows：\n",
            question,
        )
        assert head.count("\\boxed{{}}") == 1
        assert [line[:3] for line in head.splitlines() if re.match(r"C\d", line)] == [
            f"{cause}:" for cause in CAUSES
        ]
        for table, formats, sizes in (
            (drive, DRIVE_FORMATS, range(9, 12)),
            (cells, CELL_FORMATS, range(6, 9)),
        ):
            header, *rows = [line.split("|") for line in table.strip().splitlines()]
            assert len(header) == len(formats)
            assert len(rows) in sizes
            for row in rows:
                for value, pattern in zip(row, formats, strict=True):
                    assert re.fullmatch(pattern, value), (value, pattern)


def test_values_stay_in_the_ranges_of_a_real_network() -> None:
    for index in range(160):
        drive = simulate((5, index), CAUSES[index % 8])
        assert drive.throughput.min() > 0
        assert drive.throughput.max() <= 1450
        assert drive.low.any()
        assert not drive.low.all()
        assert -2 <= drive.sinr.min() <= drive.sinr.max() <= 28
        assert drive.rsrp[np.arange(len(drive.serving)), drive.serving].min() > -101
        assert drive.rsrp.max() < -65
        assert (drive.speed >= 0).all()
        assert drive.speed.max() <= 75
        pcis = [cell.pci for cell in drive.cells]
        assert len(set(pcis)) == len(pcis)
        assert 0 <= min(pcis) <= max(pcis) <= 1007
        places = Counter((cell.gnodeb_id, cell.east, cell.north) for cell in drive.cells)
        assert len(places) == len({cell.gnodeb_id for cell in drive.cells})  # one mast per site
        assert max(places.values()) <= 3


@pytest.mark.parametrize("count", [1, 8, 100, 803])
def test_causes_are_balanced(count: int) -> None:
    counts = Counter(row.answer for row in synthetic_rows("train", count, 1, "tiny"))
    assert sum(counts.values()) == count
    assert max(counts.values()) - min(counts[cause] for cause in CAUSES) <= 1


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    first, again, other, val = (
        [(row.question, row.answer) for row in synthetic_rows(split, 24, seed)]
        for split, seed in (("train", 7), ("train", 7), ("train", 8), ("val", 7))
    )
    assert first == again
    assert len({*first, *other, *val}) == 72


def test_10000_prompts_take_30_seconds_of_one_core_at_most() -> None:
    start = time.process_time()
    assert sum(1 for _ in synthetic_rows("train", 1000, 3)) == 1000
    assert time.process_time() - start < 3.0


# --- tiny -----------------------------------------------------------------------------------------


def tiny_cause(letters: str) -> str:
    """Read the cause off the nine letters."""
    speed, far, changes, rbs, residue, overlap, tilt, level, ends = letters
    found = {
        "C1": tilt == "T" and level in "UV",
        "C2": far == "F",
        "C3": ends == "Y",
        "C4": overlap == "Q",
        "C5": changes == "I",
        "C6": residue == "O",
        "C7": speed == "C",
        "C8": rbs == "J",
    }
    (cause,) = [cause for cause, holds in found.items() if holds]
    return cause


def test_tiny_prompts_hold_the_label() -> None:
    rows = list(synthetic_rows("train", 1600, 9, "tiny"))
    assert {len(row.question) for row in rows} == {len(FEATURES)}
    solved = sum(tiny_cause(row.question) == row.answer for row in rows)
    assert solved / len(rows) >= 0.99
    # Enough different prompts to learn from: not one per cause.
    assert len({row.question for row in rows}) > 400


def test_each_letter_means_one_bin_of_one_feature() -> None:
    letters = "".join(letters for _, letters in FEATURES)
    assert len(set(letters)) == len(letters)
    seen = Counter("".join(row.question for row in synthetic_rows("val", 1600, 9, "tiny")))
    assert set(seen) == set(letters)


def test_the_tiny_prompt_does_not_read_the_cause() -> None:
    # A healthy-looking change, the drive of one cause, rendered after the fact: the
    # features come from measurements alone.
    drive = simulate((7, 0), "C7")
    drive.speed[:] = 30.0
    assert tiny_prompt(drive)[0] == "B"


def test_the_simulators_answer_to_either_form() -> None:
    assert expert_answer("C7", "tiny") == r"\boxed{C7}"
    words, box = expert_answer("C7", "full").splitlines()
    assert words in render(simulate((7, 0), "C7"))
    assert box == r"\boxed{C7}"


if __name__ == "__main__":
    for name, text in golden_texts().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
