"""What responses are given as their beginning is looked at with the training file's rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpo_verl.checks.list import CHECKS, run_checks

FIRST = ("data files", "schema", "model", "remote code", "tokenizer")


@pytest.fixture
def look(planned, rows, tmp_path):
    """A function: an estimator, what to do to each row's expert, settings -> findings."""

    def run(estimator, expert=lambda text: text, **changes):
        for row in rows:
            row["extra_info"]["expert"] = expert(row["extra_info"]["expert"])
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
        settings = {f"algorithm.{estimator}.{key}": value for key, value in changes.items()}
        settings["data.train_files"] = str(tmp_path / "train.parquet")
        settings["algorithm.adv_estimator"] = estimator
        wanted = [check for check in CHECKS if check.name in (*FIRST, "openings")]
        return [one for one in run_checks(planned(settings), wanted) if one.name == "openings"]

    return run


def test_without_any_nothing_is_said(look):
    assert look("a_hpo") == look("grpo") == []


def test_answers_that_fit(look):
    (finding,) = look("ahpo")
    assert finding.status == "ok"
    assert finding.detail.startswith("extra_info.expert of 100 of 100 sampled rows: up to ")


@pytest.mark.parametrize(
    ("expert", "status", "words"),
    [
        (lambda text: "7" * 30, "error", "data.max_response_length=24: extra_info.expert of 100"),
        (lambda text: text if "*" in text else "7" * 30, "warning", "are too long, and not given"),
    ],
)
def test_answers_that_do_not(look, expert, status, words):
    (finding,) = look("ahpo", expert)
    assert finding.status == status
    assert words in finding.detail
    assert finding.fix == "data.max_response_length=31 or more"


def test_rows_that_an_older_version_prepared(look, tmp_path):
    (finding,) = look("ahpo", lambda text: None)
    path = tmp_path / "train.parquet"
    assert finding.line == (
        f"openings: no sampled row of {path} has a text extra_info.expert, a response to give; "
        f"move {tmp_path} away if an older version prepared it, and it is prepared anew; or add "
        "that text"
    )
    assert finding.status == "error"


def test_prefixes(look):
    findings = look("apo", modes=["<r>", "7" * 30])
    assert [one.status for one in findings] == ["ok", "error"]
    assert findings[0].detail == "'<r>': up to 4 tokens"
    assert findings[1].fix == "data.max_response_length=31 or more"
