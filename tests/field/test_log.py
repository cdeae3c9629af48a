"""The log of public reports: every row has a source and a result, and its test is there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (HERE / "README.md").read_text().splitlines()
    if re.match(r"\| \d", line)
]


def test_every_row_has_a_source_and_a_result_and_its_test_is_there():
    assert len(ROWS) >= 60
    numbers = set()
    for source, report, tried, result in ROWS:
        number, owner = source.split(". ", 1)
        assert re.search(r"[\w-]+/[\w.-]+", owner), source
        assert report, source
        assert re.search(r"\b(right|mended|open)\b", result), source
        assert number not in numbers
        numbers.add(number)
        for name in re.findall(r"`([\w/]+\.py)`", tried):
            text = (HERE.parent / name if "/" in name else HERE / name).read_text()
            # Tests beside this one name the row.
            assert "/" in name or re.search(rf"\({number}, |Row {number}\.", text), source
