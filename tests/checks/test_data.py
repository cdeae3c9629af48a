"""Data that are not there, not in the schema, not scored, or too long."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import resolve_pattern
from findings import only

from hpo_verl.checks.rows import read_rows
from hpo_verl.errors import DataError


def write(path, rows, count):
    pq.write_table(pa.Table.from_pylist(rows).slice(0, count), path)
    return str(path)


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
    (other, *_) = examine(changes={"prepare.data.output": str(tmp_path / "data")})
    assert other.detail.endswith("train.parquet was not made by hpo-verl prepare")
    assert f", or move {tmp_path / 'data'} away, then hpo-verl prepare " in other.fix


def test_a_truncated_file(examine, rows, tmp_path):
    assert examine(rows)[0].status == "ok"
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    (finding, *_) = examine(changes={"data.train_files": str(file)})
    assert "train.parquet is not a complete parquet file" in finding.detail


@pytest.mark.parametrize("name", ["[t]", "*", "?", "a::b"])
def test_a_path_that_verl_takes_for_a_pattern_is_refused(name, examine, rows, tmp_path):
    for folder in ("x", name):
        file = tmp_path / folder / "train.parquet"
        file.parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), file)
    # The reader of verl, so that the refusal goes when its reason does.
    with pytest.raises((FileNotFoundError, AssertionError)):
        assert resolve_pattern(str(file), "") == [str(file)]
    (finding, *_) = examine(changes={"data.train_files": str(file)})
    assert finding.status == "error"
    assert f"{file} must hold no *, ?, [ ] or :: in its path" in finding.detail


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


def test_files_that_verl_cannot_read_as_one(examine, rows, tmp_path):
    for row in rows:
        row["reward_model"]["ground_truth"] = 3
    other = write(tmp_path / "numbers.parquet", rows, 240)
    (finding, *_) = examine(changes={"data.train_files": ["${data.val_files}", other]})
    assert finding.status == "error"
    assert finding.detail.startswith(f"data.train_files: {other} does not go with ")
    for row in rows:
        del row["extra_info"], row["reward_model"]
        row["reward_model"] = {"style": "rule", "ground_truth": None}
    # A column that is missing or empty is filled with null.
    less = write(tmp_path / "less.parquet", rows, 240)
    (finding, *_) = examine(changes={"data.train_files": [other, less]})
    assert finding.status == "ok"


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


def test_prompts_that_are_left_out_may_leave_too_few(examine, rows):
    changes = {"data.filter_overlong_prompts": True, "trainer.total_training_steps": 30}
    for row in rows[:177]:
        row["prompt"][0]["content"] = "1 2 3 = 4 " * 5
    few = only(examine(rows, changes), "prompts")
    assert few.status == "error"
    assert "data.train_files has 63 rows where the run needs 64" in few.detail
    assert only(examine(rows[1:], changes), "prompts").status == "error"
    rows[0]["prompt"] = rows[-1]["prompt"]
    assert only(examine(rows, changes), "prompts").status == "warning"
    none = only(examine(changes={**changes, "data.max_prompt_length": 1}), "prompts")
    assert "data.train_files has 0 rows where the run needs 64" in none.detail


def test_a_tokenizer_that_is_not_there(examine, tmp_path):
    assert only(examine(tokenizer=tmp_path / "no"), "prompts").status == "skipped"
    (tmp_path / "empty").mkdir()
    broken = only(examine(tokenizer=tmp_path / "empty"), "prompts")
    assert (broken.status, "cannot encode" in broken.detail) == ("error", True)


def test_a_prompt_that_the_chat_template_refuses_is_named(examine, rows):
    refusing = "{{ raise_exception('no tools here') if messages[0]['role'] == 'tool' else 'a' }}"
    rows[7]["prompt"][0]["role"] = "tool"
    finding = only(
        examine(rows, {"actor_rollout_ref.model.custom_chat_template": refusing}), "prompts"
    )
    assert finding.status == "error"
    # Of a file of 240 rows, 100 and those with the longest prompts are tried.
    assert "cannot encode train.parquet row 8: no tools here" in finding.detail
