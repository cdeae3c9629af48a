"""The command that writes tasks of reasoning-gym, and how recipes call it."""

import importlib
import json

import pyarrow.parquet as pq
import pytest

from data_prep import reasoning_gym as made
from data_prep import rows as rows_of
from data_prep.command import run
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import preparations
from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.rewards import math_answer
from hpo_verl.rewards.reasoning_gym import compute_score


def command(*arguments):
    """Run the command in this process and return its exit code."""
    try:
        return run(made.main, [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def rows(out, split):
    return pq.read_table(out / f"{split}.parquet").to_pylist()


def test_generated_files(tmp_path, capsys):
    arguments = ["--name", "chain_sum", "--train-size", 20, "--val-size", 5, "--seed", 3]
    arguments += ["--config", '{"max_terms": 2, "max_digits": 1}']
    assert command(*arguments, "--out", tmp_path / "a") == 0
    assert "train.parquet: 20 questions" in capsys.readouterr().out
    questions = set()
    for split, size in (("train", 20), ("val", 5)):
        table = rows(tmp_path / "a", split)
        assert len(table) == size
        for index, row in enumerate(table):
            info, truth = row["extra_info"], row["reward_model"]["ground_truth"]
            assert row["data_source"] == "reasoning_gym_chain_sum"
            assert (info["split"], info["index"]) == (split, index)
            system, user = row["prompt"]
            assert (system["role"], user["role"]) == ("system", "user")
            assert "<answer>" in system["content"]
            questions.add(user["content"])
            response = f"<answer>{info['solution']}</answer>"
            assert compute_score("r", response, truth, info)["score"] == 1
            assert compute_score("r", "<answer>x</answer>", truth, info)["score"] == 0
    assert len(questions) == 25
    assert command(*arguments, "--out", tmp_path / "b") == 0
    for split in ("train", "val"):
        first, second = ((tmp_path / d / f"{split}.parquet").read_bytes() for d in "ab")
        assert first == second
    manifest = json.loads((tmp_path / "a" / "prepared.json").read_text())
    assert manifest["name"] == "chain_sum"
    assert manifest["task"] == "reasoning_gym_chain_sum"


def test_a_number_of_the_question_says_how_hard_it_is(tmp_path, capsys):
    arguments = ["--name", "chain_sum", "--train-size", 6, "--val-size", 2, "--out"]
    assert command(*arguments, tmp_path / "a", "--difficulty", "num_terms") == 0
    for row in rows(tmp_path / "a", "train"):
        terms = row["prompt"][1]["content"].split(": ")[-1].count(" ") // 2 + 1
        assert row["extra_info"]["difficulty"] == terms
    assert command(*arguments, tmp_path / "b", "--difficulty", "num_term") == 2
    assert "chain_sum: question 1: difficulty: no number 'num_term'; did you mean num_terms" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "b").exists()


def test_a_task_without_a_single_answer(tmp_path):
    assert (
        command("--name", "graph_color", "--train-size", 2, "--val-size", 1, "--out", tmp_path) == 0
    )
    assert {row["extra_info"]["solution"] for row in rows(tmp_path, "train")} == {""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "chan_sum"], "no task 'chan_sum' in reasoning-gym; did you mean chain_sum or"),
        (["--name", "#"], "no task '#' in reasoning-gym; available: ab, acre, "),
        (["--config", "{"], "config: '{' is not JSON"),
        (["--config", "[1]"], "config: '[1]' is not a JSON object"),
        (
            ["--config", '{"max_term": 2}'],
            "chain_sum has no setting 'max_term'; did you mean max_t",
        ),
        (["--config", '{"seed": 2}'], "chain_sum has no setting 'seed'"),
        (["--config", '{"max_terms": 1}'], "config: chain_sum refuses it: max_terms must be >="),
        (["--config", '{"max_terms": "x"}'], "config: chain_sum refuses it: '>='"),
        (["--name", "codeio"], "codeio makes its questions by running programs"),
        (["--name", "composite"], "config: composite refuses it: Must specify at least one"),
        (["--train-size", "0"], "argument --train-size: '0' is not an integer from 1 to 1000000"),
        (
            ["--config", '{"max_terms": 2, "max_digits": 1}', "--val-size", 500],
            "chain_sum: 600 questions wanted, but only ",
        ),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    given = ["--name", "chain_sum", "--train-size", 100, *arguments, "--out", tmp_path / "d"]
    assert command(*given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_task_whose_own_answer_scores_nothing_is_refused(tmp_path, monkeypatch):
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    monkeypatch.setattr(ChainSumDataset, "score_answer", lambda *_: 0.5)
    importlib.import_module("hpo_verl.rewards.reasoning_gym")._scorer.cache_clear()
    with pytest.raises(DataError, match="chain_sum: question 1: its own answer scores 0: "):
        made.main(["--name", "chain_sum", "--out", str(tmp_path / "d")])
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_rewards_anything_is_refused(tmp_path):
    text = r"^game_of_life_halting: question \d+: an answer without sense \(\?\) scores 1$"
    with pytest.raises(DataError, match=text):
        made.main(["--name", "game_of_life_halting", "--out", str(tmp_path / "d")])
    assert list(tmp_path.iterdir()) == []


def test_entries_with_numpys_texts_are_kept(tmp_path):
    sizes = ["--train-size", 2, "--val-size", 1]
    assert command("--name", "knights_knaves", *sizes, "--out", tmp_path) == 0


def test_what_reasoning_gym_raises_is_one_line(tmp_path, monkeypatch):
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    def broken(self, index):
        raise KeyError(index)

    monkeypatch.setattr(ChainSumDataset, "__getitem__", broken)
    with pytest.raises(DataError, match=r"chain_sum: .* fails after 0 questions: KeyError: 0"):
        made.main(["--name", "chain_sum", "--out", str(tmp_path / "d")])


def test_a_recipe_names_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    task = ["task=reasoning_gym", "prepare.data.arguments.name=leg_counting"]
    config = without_hydra(compose_recipe("countdown3-1.5b", task))
    found = next(one for one in preparations(config) if one.name == "data")
    assert found.output == tmp_path / "reasoning_gym-leg_counting-0"
    assert found.arguments["--name"] == "leg_counting"
    for setting, text in (
        ("name=leg_countin", "prepare.data: name: no task 'leg_countin' in reasoning-gym; did you"),
        ("config='{\"legs\": 1}'", "prepare.data: config: leg_counting has no setting 'legs'"),
    ):
        wrong = [*task, f"prepare.data.arguments.{setting}"]
        bad = without_hydra(compose_recipe("countdown3-1.5b", wrong))
        with pytest.raises(ConfigError, match=text):
            list(preparations(bad))
    monkeypatch.setattr(made, "load_scorer", _absent)
    assert len(list(preparations(bad))) == 2


def _absent():
    raise EnvironmentCheckError("reasoning-gym: not installed; pip install reasoning-gym==0.1.25")


def test_the_package_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(made, "load_scorer", _absent)
    assert command("--name", "chain_sum", "--out", tmp_path / "d") == 2
    text = "error: reasoning-gym: not installed; pip install reasoning-gym==0.1.25\n"
    assert capsys.readouterr().err == text


def test_answers_of_ones_own_data_need_no_preparation():
    files = [f"data.{split}_files=/data/{split}.parquet" for split in ("train", "val")]
    planned = PlannedRun("countdown3-1.5b", ("task=math_answer", *files))
    assert [one.name for one in preparations(planned.config)] == ["policy"]
    own = PlannedRun("countdown3-1.5b", ("task=math_answer", "prepare.data.arguments.source=a.csv"))
    made_by = next(one for one in preparations(own.config) if one.name == "data")
    assert made_by.arguments["--source"] == "a.csv"
    assert made_by.arguments["--system"].endswith(r"within \boxed{}.")


def test_rows_for_the_reward_of_mathematics(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i}+{i}?", "answer": f"Twice {i}.\n#### {2 * i}"}) + "\n"
            for i in range(20)
        )
    )
    assert run(rows_of.main, [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "d")]) == 0
    for row in rows(tmp_path / "d", "train"):
        truth = row["reward_model"]["ground_truth"]
        twice = 2 * int(row["prompt"][0]["content"].partition("+")[0])
        assert math_answer.compute_score("a", rf"\boxed{{{twice}}}", truth)["score"] == 1
        assert math_answer.compute_score("a", rf"\boxed{{{twice + 1}}}", truth)["score"] == 0
