"""Data that are not there, not in the schema, not scored, or too long."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpo_verl.doctor.data import check_data, read_sample, right_responses
from hpo_verl.errors import DataError


def only(findings, name):
    (finding,) = [f for f in findings if f.name == name]
    return finding


@pytest.fixture
def rows(made):
    return pq.read_table(made / "data" / "train.parquet").to_pylist()


@pytest.fixture
def examine(subject, made, tmp_path):
    """A function: rows of the training file and settings -> findings."""

    def run(rows=None, changes=None, tokenizer=made / "policy"):
        changes = dict(changes or {})
        if rows is not None:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
            changes["data.train_files"] = str(tmp_path / "train.parquet")
        return check_data(subject(changes), str(tokenizer) if tokenizer else None)

    return run


def test_the_small_data_are_right(examine):
    findings = examine()
    assert [(f.name, f.status) for f in findings] == [
        ("data files", "ok"),
        ("schema", "ok"),
        ("reward", "ok"),
        ("prompts", "ok"),
    ]
    assert "train.parquet (240 rows)" in findings[0].detail
    assert findings[1].detail.startswith("256 rows")
    assert findings[2].detail.startswith(
        "100 rows scored by pkg://hpo_verl.rewards.countdown: 0 to"
    )
    assert findings[2].detail.endswith("up to 1 for the known answer in all 100")
    assert "16 are permitted" in findings[3].detail


def test_missing_files_come_with_the_command_that_makes_them(examine, tmp_path):
    findings = examine(changes={"data.val_files": "/nowhere/val.parquet"})
    first, *others = findings
    assert first.status == "error"
    assert "data.val_files: /nowhere/val.parquet does not exist" in first.detail
    assert first.fix == f"hpo-verl prepare countdown-tiny hydra.run.dir={tmp_path / 'run'}"
    assert {f.status for f in others} == {"skipped"}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("data_source", "", "column 'data_source': '' is not a name"),
        ("reward_model", {"style": "rule", "ground_truth": None}, "has no ground_truth"),
        ("prompt", [], "is not a list of chat messages"),
        ("prompt", [{"role": "oracle", "content": "x"}], "needs a role, one of system, user"),
        ("prompt", [{"role": "user", "content": None}], "needs a text as its content"),
    ],
)
def test_a_row_out_of_the_schema_is_named(examine, rows, column, value, message):
    rows[76][column] = value
    findings = examine(rows)
    schema = only(findings, "schema")
    assert schema.status == "error"
    assert message in schema.detail
    assert "data.train_files: " in schema.detail
    assert "row 77, column" in schema.detail
    assert only(findings, "reward").status == only(findings, "prompts").status == "skipped"


def test_a_file_that_ends_early_inside(tmp_path, rows):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.train_files: .*cannot read on after row 0"):
        read_sample("data.train_files", path)


def test_rows_are_taken_evenly_and_the_longest_are_among_them(tmp_path, rows):
    long = copy.deepcopy(rows[0])
    long["prompt"][0]["content"] = "9" * 500
    path = tmp_path / "many.parquet"
    pq.write_table(pa.Table.from_pylist([*rows * 5, long, *rows * 5]), path)
    sample = read_sample("data.train_files", path)
    assert sample.rows == 2401
    assert sorted(sample.spread) == [i * 2401 // 100 for i in range(100)]
    assert len(sample.longest) == 100
    assert sample.longest[1200]["prompt"] == long["prompt"]


REWARDS = """
def fails(data_source, solution_str, ground_truth, extra_info=None):
    raise KeyError("target")

def infinite(**row):
    return {"score": float("inf")}

def text(**row):
    return "1.0"

def uneven(solution_str, **row):
    return {"score": 0.0} if "know" in solution_str else {"score": 1.0, "acc": 1.0}

def blind(**row):
    return 0.5

async def later(solution_str, extra_info, bonus, **row):
    assert "num_turns" in extra_info
    return bonus if "answer" in solution_str else 0.0
"""


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("fails", "error", "sampled row 1: 'target'"),
        ("infinite", "error", "the score inf is not a finite number"),
        ("text", "error", "the score '1.0' is not a finite number"),
        ("uneven", "error", "the keys it returns differ from row to row"),
        ("blind", "warning", "in 100 of 100 rows the known answer scores no better"),
        ("later", "ok", "up to 3 for the known answer in all 100"),
        ("absent", "error", "cannot be loaded"),
    ],
)
def test_reward_functions(examine, tmp_path, name, status, detail):
    (tmp_path / "rewards.py").write_text(REWARDS)
    custom = {"path": str(tmp_path / "rewards.py"), "name": name}
    if name == "later":
        custom["reward_kwargs"] = {"bonus": 3.0}
    finding = only(examine(changes={"reward.custom_reward_function": custom}), "reward")
    assert finding.status == status
    assert detail in finding.detail


def test_verls_own_reward_does_not_know_every_data_source(examine):
    finding = only(examine(changes={"reward.custom_reward_function.path": None}), "reward")
    assert finding.status == "error"
    assert "countdown" in finding.detail


def test_what_can_be_an_answer():
    row = {"reward_model": {"ground_truth": "C3"}, "extra_info": None}
    assert list(right_responses(row)) == ["C3", "<answer>C3</answer>", "\\boxed{C3}"]
    assert list(right_responses({"reward_model": {"ground_truth": {"target": 3}}})) == []


def test_rows_without_a_known_answer(examine, rows):
    for row in rows:
        row["extra_info"]["solution"] = None
    finding = only(examine(rows, {"data.val_files": "${data.train_files}"}), "reward")
    assert finding.status == "ok"
    assert "no right response is known" in finding.detail


def test_prompts_that_are_too_long(examine, rows):
    rows[100]["prompt"][0]["content"] = "1 2 3 = 4 " * 5
    prompts = only(examine(rows), "prompts")
    assert prompts.status == "error"
    assert prompts.detail.startswith("data.max_prompt_length=16: ")
    assert "train.parquet row 101" in prompts.detail
    needed = int(prompts.detail.split(": ")[1].split()[0])
    assert prompts.fix.startswith(f"data.max_prompt_length={needed} or more")
    assert only(examine(rows, {"data.max_prompt_length": needed}), "prompts").status == "ok"
    dropped = only(examine(rows, {"data.filter_overlong_prompts": True}), "prompts")
    assert dropped.status == "warning"


def test_a_tokenizer_that_is_not_there(examine, tmp_path):
    assert only(examine(tokenizer=None), "prompts").status == "skipped"
    broken = only(examine(tokenizer=tmp_path / "no"), "prompts")
    assert (broken.status, "cannot encode" in broken.detail) == ("error", True)
