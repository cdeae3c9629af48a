"""The run's own reward function is tried on rows before the run."""

from types import SimpleNamespace

import pytest
from findings import only

from hpo_verl.checks import data
from hpo_verl.checks.data import right_responses

REWARDS = """
def fails(data_source, solution_str, ground_truth, extra_info=None):
    raise KeyError("target")

def infinite(**row):
    return {"score": float("inf")}

def text(**row):
    return "1.0"

def nothing(**row):
    pass

def numpy(**row):
    import numpy
    return {"score": numpy.float32(0.5), "acc": numpy.bool_(True), "parts": numpy.arange(2)}

def array(**row):
    import numpy
    return numpy.zeros(1)

def uneven(solution_str, **row):
    return {"score": 0.0} if "know" in solution_str else {"score": 1.0, "acc": 1.0}

def blind(**row):
    return 0.5

def texts(solution_str, **row):
    return {"score": 0.0, "pred": "none" if "know" in solution_str else 1}

def absent(solution_str, **row):
    return {"score": float("answer" in solution_str), "pred": None if "box" in solution_str else 1}

def pair(solution_str, **row):
    return {"score": float("answer" in solution_str), "parts": [0.0, float(len(solution_str))]}

def ragged(solution_str, **row):
    return {"score": float("answer" in solution_str), "parts": [0.0] * (len(solution_str) % 3 + 1)}

def voted(solution_str, **row):
    return {**pair(solution_str), "pred": "4"}

def struct(**row):
    return {"score": 0.0, "info": {"a": 1}}

async def later(solution_str, extra_info, bonus, **row):
    assert "num_turns" in extra_info
    return bonus if "answer" in solution_str else 0.0
"""


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("fails", "error", "fails on train.parquet row 1: KeyError: 'target'"),
        ("infinite", "error", "fails on train.parquet row 1: ValueError: the reward is inf"),
        ("nothing", "error", "TypeError: the reward is of type NoneType, not a number"),
        ("numpy", "warning", "in 100 of 100 rows the known answer scores no better"),
        ("array", "error", "train.parquet row 1: TypeError: the reward is of type ndarray, not a"),
        ("text", "error", "TypeError: the reward is of type str, not a number"),
        ("uneven", "error", "the keys it returns differ from row to row"),
        ("texts", "error", "'pred' is a text in some rows and a number in others"),
        ("absent", "ok", "up to 1 for the known answer in all 100"),
        ("struct", "error", "TypeError: the reward's 'info' is of type dict, not a number, a text"),
        ("pair", "ok", "up to 1 for the known answer in all 100"),
        ("pair several", "ok", "up to 1 for the known answer in all 100"),
        ("ragged", "ok", "up to 1 for the known answer in all 100"),
        ("ragged several", "error", "'parts' is a list of 3 in some rows and a list of 2 in"),
        ("voted", "ok", "up to 1 for the known answer in all 100"),
        ("voted several", "error", "'parts' is a list: with actor_rollout_ref.rollout.val_kwargs"),
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
    name, _, several = name.partition(" ")
    custom = {"path": str(tmp_path / "rewards.py"), "name": name}
    if name == "later":
        custom["reward_kwargs"] = {"bonus": 3.0}
    changes = {"reward.custom_reward_function": custom, data.VALIDATED: 2 if several else 1}
    finding = only(examine(changes=changes), "reward")
    assert finding.status == status
    assert detail in finding.detail


@pytest.mark.parametrize("read", ["pred", "acc"])
def test_a_number_that_the_algorithm_reads_is_missed_before_the_run(examine, tmp_path, read):
    (tmp_path / "rewards.py").write_text(REWARDS)
    finding = only(
        examine(
            changes={
                "reward.custom_reward_function": {
                    "path": str(tmp_path / "rewards.py"), "name": "voted",
                },
                "algorithm.adv_estimator": "constrained_grpo",
                "algorithm.hpo": None,
                "algorithm.constrained": {"rewards": [read], "thresholds": [0.5]},
            }
        ),
        "reward",
    )  # fmt: skip
    assert finding.status == "error"
    assert (
        f"returns no number '{read}', which algorithm.adv_estimator=constrained_grpo reads; it "
        "returns score"
    ) in finding.detail


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
        ("rare", "guarded", "warning", "sampled rows, first on train.parquet row "),
        ("rare", "naive", "error", "fails on train.parquet row "),
        ("often", "guarded", "error", "fails on train.parquet row "),
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
