"""Data that are not there, not in the schema, not scored, or too long."""

import copy
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpo_verl.checks import data
from hpo_verl.checks.data import right_responses
from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.rows import read_rows
from hpo_verl.errors import DataError


def write(path, rows, count):
    pq.write_table(pa.Table.from_pylist(rows).slice(0, count), path)
    return str(path)


NAMES = ("data files", "schema", "reward", "prompts")


def only(findings, name):
    (finding,) = [f for f in findings if f.name == name]
    return finding


@pytest.fixture
def rows(made):
    return pq.read_table(made / "data" / "train.parquet").to_pylist()


@pytest.fixture
def examine(planned, made, tmp_path):
    """A function: rows of the training file and settings -> findings."""

    def run(rows=None, changes=None, tokenizer=made / "policy"):
        changes = dict(changes or {})
        if rows is not None:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
            changes["data.train_files"] = str(tmp_path / "train.parquet")
        changes["actor_rollout_ref.model.path"] = str(tokenizer)
        wanted = [check for check in CHECKS if check.name in NAMES]
        return list(run_checks(planned(changes), wanted))

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
        "100 rows scored by compute_score of pkg://hpo_verl.rewards.countdown: 0 to"
    )
    assert findings[2].detail.endswith("up to 1 for the known answer in all 100")
    assert "16 are permitted" in findings[3].detail


def test_missing_files_come_with_the_command_that_makes_them(examine, tmp_path):
    findings = examine(changes={"data.val_files": "/nowhere/val.parquet"})
    first, *others = findings
    assert first.status == "error"
    assert "data.val_files: /nowhere/val.parquet does not exist" in first.detail
    assert first.fix == "data.val_files=FILE with rows in verl's schema"
    assert {f.status for f in others} == {"skipped"}


def test_what_is_made_by_the_recipe_comes_with_the_command(examine, tmp_path):
    (missing, *_) = examine(changes={"prepare.data.output": str(tmp_path / "data")})
    assert missing.fix == f"hpo-verl prepare countdown-tiny hydra.run.dir={tmp_path / 'run'}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 and no more")
    (damaged, *_) = examine(changes={"prepare.data.output": str(tmp_path / "data")})
    assert "train.parquet is not a complete parquet file" in damaged.detail
    assert damaged.fix.startswith(f"remove {tmp_path / 'data'}, then hpo-verl prepare ")


def test_a_truncated_file(examine, rows, tmp_path):
    assert examine(rows)[0].status == "ok"
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    (finding, *_) = examine(changes={"data.train_files": str(file)})
    assert "train.parquet is not a complete parquet file" in finding.detail


def test_a_missing_column(examine, rows):
    (finding, *_) = examine([{"prompt": row["prompt"]} for row in rows])
    assert finding.status == "error"
    assert finding.detail.endswith("train.parquet has no column 'data_source'")


@pytest.mark.parametrize(
    ("twice", "column"),
    [
        (["prompt"], "prompt"),
        (["note", "note"], "note"),
        (["nested"], "nested.b"),
    ],
)
def test_a_column_that_is_there_twice_is_named(examine, rows, tmp_path, twice, column):
    table = pa.Table.from_pylist(rows)
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["b", "b"])
    for name in twice:
        value = struct if name == "nested" else pa.array(["x"])
        table = table.append_column(name, pa.concat_arrays([value] * len(rows)))
    pq.write_table(table, tmp_path / "twice.parquet")
    (finding, *_) = examine(changes={"data.train_files": str(tmp_path / "twice.parquet")})
    assert finding.status == "error"
    assert f"twice.parquet has the column '{column}' more than once" in finding.detail


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string()])
def test_every_kind_of_text_is_read(tmp_path, rows, kind):
    table = pa.Table.from_pylist(rows)
    place = table.schema.get_field_index("data_source")
    table = table.set_column(place, "data_source", table["data_source"].cast(kind))
    pq.write_table(table, tmp_path / "train.parquet")
    assert read_rows("data.train_files", tmp_path / "train.parquet").rows == len(rows)


def test_fewer_rows_than_a_batch(examine, rows, tmp_path):
    (finding, *_) = examine(rows[:63])
    assert finding.status == "error"
    assert "63 rows to train on are fewer than data.train_batch_size=64" in finding.detail
    # verl reads all files as one.
    files = [str(tmp_path / "train.parquet")] * 2
    assert examine(changes={"data.train_files": files})[0].status == "ok"
    (empty, *_) = examine(changes={"data.val_files": write(tmp_path / "none.parquet", rows, 0)})
    assert empty.detail == f"data.val_files: {tmp_path / 'none.parquet'} has no rows"


def test_a_prompt_that_is_a_text(examine, rows):
    for row in rows:
        row["prompt"] = "3 4 5 = 12"
    schema = only(examine(rows), "schema")
    assert schema.status == "error"
    assert "train.parquet: row 1, column 'prompt': is not a list of chat messages" in schema.detail
    assert schema.detail.endswith("but '3 4 5 = 12'")


@pytest.mark.parametrize("key", ["data.custom_cls.path", "data.prompt_key"])
def test_rows_that_verl_reads_in_another_way_are_not_judged(examine, key):
    schema, reward = examine(changes={key: "mine"})[1:3]
    assert (schema.status, f"{key}=mine" in schema.detail) == ("skipped", True)
    assert reward.status == "skipped"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("data_source", "", "column 'data_source': '' is not a name"),
        ("reward_model", {"style": "rule", "ground_truth": None}, "has no ground_truth"),
        ("extra_info", '{"index": 1}', "column 'extra_info': '{\"index\": 1}' is not a struct"),
        ("prompt", [], "is not a list of chat messages"),
        ("prompt", [{"role": "oracle", "content": "x"}], "needs a role, one of system, user"),
        ("prompt", [{"role": "user", "content": None}], "needs a text as its content"),
    ],
)
def test_a_row_out_of_the_schema_is_named(examine, rows, column, value, message):
    if column == "extra_info":
        rows = [{**row, column: None} for row in rows]
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
        read_rows("data.train_files", path)


def test_rows_are_taken_evenly_and_the_longest_are_among_them(tmp_path, rows):
    long = copy.deepcopy(rows[0])
    long["prompt"][0]["content"] = "9" * 500
    path = tmp_path / "many.parquet"
    pq.write_table(pa.Table.from_pylist([*rows * 5, long, *rows * 5]), path)
    sample = read_rows("data.train_files", path)
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

def texts(solution_str, **row):
    return {"score": 0.0, "pred": "none" if "know" in solution_str else 1}

def absent(solution_str, **row):
    return {"score": float("answer" in solution_str), "pred": None if "box" in solution_str else 1}

def struct(**row):
    return {"score": 0.0, "info": {"a": 1}}

async def later(solution_str, extra_info, bonus, **row):
    assert "num_turns" in extra_info
    return bonus if "answer" in solution_str else 0.0
"""


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("fails", "error", "fails on sampled row 1: KeyError: 'target'"),
        ("infinite", "error", "fails on sampled row 1: ValueError: the reward is inf"),
        ("text", "error", "TypeError: the reward is of type str, not a number"),
        ("uneven", "error", "the keys it returns differ from row to row"),
        ("texts", "error", "'pred' is a text in some rows and a number in others"),
        ("absent", "ok", "up to 1 for the known answer in all 100"),
        ("struct", "error", "TypeError: the reward's 'info' is of type dict, not a number, a text"),
        ("blind", "warning", "in 100 of 100 rows the known answer scores no better"),
        ("later", "ok", "up to 3 for the known answer in all 100"),
        (
            "abset",
            "error",
            "cannot be loaded: AttributeError: no function 'abset'; it offers fails, ",
        ),
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


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("def compute_score(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("a = 1\nb = c\n", "NameError: name 'c' is not defined (line 2)"),
        ("import nothing_such\n", "ModuleNotFoundError: No module named 'nothing_such' (line 1)"),
        ("x = 1\n", "no function 'compute_score'; it offers no function"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (line 1)"),
    ],
)
def test_a_reward_file_that_cannot_be_loaded(examine, tmp_path, code, detail):
    (tmp_path / "mine.py").write_text(code)
    custom = {"path": str(tmp_path / "mine.py"), "name": "compute_score"}
    finding = only(examine(changes={"reward.custom_reward_function": custom}), "reward")
    assert finding.status == "error"
    assert detail in finding.detail
    assert str(tmp_path / "mine.py") in finding.detail


ODD = """
import time

def hangs(**row):
    time.sleep(3600)

def rare(extra_info, **row):
    if extra_info["index"] % 20 == 0:
        raise ValueError("no")
    return 0.0

def often(extra_info, **row):
    if extra_info["index"] % 4 == 0:
        raise ValueError("no")
    return 0.0
"""


@pytest.mark.parametrize(
    ("name", "manager", "status", "detail"),
    [
        ("hangs", "guarded", "error", "the reward did not return within 0.5 s"),
        ("rare", "guarded", "warning", "sampled rows, first on row "),
        ("rare", "naive", "error", "fails on sampled row "),
        ("often", "guarded", "error", "fails on sampled row "),
    ],
)
def test_a_reward_that_fails_now_and_then(examine, tmp_path, name, manager, status, detail):
    (tmp_path / "odd.py").write_text(ODD)
    changes = {
        "reward.custom_reward_function": {"path": str(tmp_path / "odd.py"), "name": name},
        "reward.reward_manager.name": manager,
        "reward.guard.time_limit": 0.5,
    }
    finding = only(examine(changes=changes), "reward")
    assert finding.status == status
    assert detail in finding.detail


def test_a_slow_reward_is_tried_on_fewer_rows(examine, monkeypatch):
    times = iter(range(1000))
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(times)))
    # The clock is asked once before the first row and once before each further one.
    rows = int(data.SCORING_SECONDS) + 1
    assert only(examine(), "reward").detail.startswith(f"{rows} rows scored by")


@pytest.mark.parametrize(
    "changes",
    [
        {"reward.reward_model.enable": True},
        {"reward.sandbox_fusion.url": "http://127.0.0.1:1"},
        {"reward.reward_manager.source": "importlib"},
    ],
)
def test_what_is_not_scored_by_a_plain_function_is_not_judged(examine, changes):
    assert only(examine(changes=changes), "reward").status == "skipped"


def test_verls_own_reward_does_not_know_every_data_source(examine):
    finding = only(examine(changes={"reward.custom_reward_function.path": None}), "reward")
    assert finding.status == "error"
    assert "countdown" in finding.detail


def test_what_can_be_an_answer():
    row = {"reward_model": {"ground_truth": "C3"}, "extra_info": None}
    assert list(right_responses(row)) == ["C3", "<answer>C3</answer>", "\\boxed{C3}"]
    assert "3" in right_responses({"reward_model": {"ground_truth": 3}})
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
    assert only(examine(tokenizer=tmp_path / "no"), "prompts").status == "skipped"
    (tmp_path / "empty").mkdir()
    broken = only(examine(tokenizer=tmp_path / "empty"), "prompts")
    assert (broken.status, "cannot encode" in broken.detail) == ("error", True)
