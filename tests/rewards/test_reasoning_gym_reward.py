"""Rewards of reasoning-gym: its scorers' partial credits, and hostile text that never runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.rewards import reasoning_gym, third_party
from hpo_verl.rewards.guarded_function import GuardedFunction, RewardGuardSettings
from hpo_verl.rewards.reasoning_gym import FORMULAS, LITERALS, compute_score, load_scorer
from hpo_verl.rewards.result import MAX_RESPONSE_CHARACTERS

gym = load_scorer()
KEYS = {"score", "acc", "format", "reason"}


def question(task, **config):
    """The first entry of a task, and the ground truth of its row."""
    entry = gym.create_dataset(task, size=1, seed=1, **config)[0]
    return entry, repr({"task": task, "config": config, "entry": entry})


def score(answer, truth, **options):
    result = compute_score("r", f"so: <answer>{answer}</answer>", truth, **options)
    assert result.keys() == KEYS
    return result


@pytest.mark.parametrize("task", [*FORMULAS, *LITERALS, "chain_sum", "rearc", "tower_of_hanoi"])
def test_the_tasks_own_answer_is_right_and_another_is_not(task):
    entry, truth = question(task)
    right = {"score": 1.0, "acc": 1.0, "format": 1.0, "reason": "correct"}
    assert score(f"\n{entry['answer']} ", truth) == right
    assert score("no idea", truth)["score"] == 0


def test_partial_credit_is_no_reward_unless_it_is_asked_for():
    entry, truth = question("countdown")
    wrong = " + ".join(map(str, entry["metadata"]["numbers"]))
    assert score(wrong, truth) == {"score": 0.0, "acc": 0.0, "format": 1.0, "reason": "wrong"}
    assert score(wrong, truth, raw=True) == {**score(wrong, truth), "score": 0.05}
    assert score("1", truth, raw=True)["score"] == 0.05
    assert score("(", truth, raw=True)["score"] == 0.01
    entry, truth = question("chain_sum")
    longer = f"it is {entry['answer']}"
    assert score(longer, truth)["score"] == 0
    assert 0 < score(longer, truth, raw=True)["score"] < 1
    assert score(entry["answer"], truth, raw=True)["score"] == 1


def test_the_tasks_configuration_reaches_its_scorer():
    config = {"min_value": 1, "max_value": 6}
    entry, truth = question("puzzle24", **config)
    assert score(entry["answer"], truth)["score"] == 1
    assert score("8*3*1*1", truth)["score"] == 0
    assert score("8*3*1*1", question("puzzle24")[1])["score"] == 1


@pytest.mark.parametrize("task", [*FORMULAS, *LITERALS])
@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path({0!r}).touch()",
        "[__import__('pathlib').Path({0!r}).touch()]",
        "[open({0!r}, 'w')]",
        "open({0!r},'w')",
        "().__class__.__base__.__subclasses__()",
        "sympify('open({0!r}, chr(119))')",
        "(lambda: 1)()",
    ],
)
def test_no_answer_is_run_as_code(tmp_path, task, code):
    _, truth = question(task)
    target = tmp_path / "made"
    assert score(code.format(str(target)), truth)["score"] == 0
    assert not target.exists()


def test_every_scorer_that_runs_text_is_known():
    folder = Path(gym.__file__).parent
    runs = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex|literal_eval)\(")
    found = {
        str(path.relative_to(folder).with_suffix("")).replace("/", ".")
        for path in folder.rglob("*.py")
        if runs.search(path.read_text())
    }
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    known = {datasets[task][0].__module__ for task in (*FORMULAS, *LITERALS)}
    # What these run is their own text, and number_sorting's the answer of its entry.
    own = {
        *("code.codeio", "arithmetic.basic_arithmetic", "arithmetic.bitwise_arithmetic"),
        *("arithmetic.gsm_symbolic.generators_00_49", "arithmetic.gsm_symbolic.generators_50_99"),
        *("algorithmic.number_sorting", "logic.propositional_logic"),
    }
    assert {f"reasoning_gym.{name}" for name in found} == known | {
        f"reasoning_gym.{name}" for name in own
    }


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no_answer"),
        ("<answer>1", "no_answer"),
        ("x" * (MAX_RESPONSE_CHARACTERS + 1), "too_long"),
        (f"<answer>{'1' * 10_001}</answer>", "refused"),
        ("<answer>zz</answer>", "unreadable"),
        ("<answer>\x00\ud800</answer>", "unreadable"),
    ],
)
def test_hostile_responses_score_zero(response, reason):
    _, truth = question("prime_factorization")
    result = compute_score("r", response, truth)
    assert (result["score"], result["reason"]) == (0.0, reason)


def test_a_scorer_that_recurses_without_end_is_no_crash():
    _, truth = question("propositional_logic")
    assert score("(" * 9_000 + ")" * 900, truth)["score"] == 0


@pytest.mark.parametrize(
    "truth", ["", "4", "{}", None, {"task": "chain_sum"}, "[" * 9_000, "f()", repr({"task": "no"})]
)
def test_a_malformed_ground_truth_is_an_error(truth):
    with pytest.raises(DataError, match=r"r: ground_truth is .*; needed: what data_prep"):
        compute_score("r", "<answer>4</answer>", truth)
    with pytest.raises(DataError, match="r: solution_str is int"):
        compute_score("r", 4, question("chain_sum")[1])


def test_the_known_version_is_needed(monkeypatch):
    monkeypatch.setattr(third_party, "version", lambda package: "0.1.26")
    text = r"^reasoning-gym: 0\.1\.26; pip install reasoning-gym==0\.1\.25$"
    with pytest.raises(EnvironmentCheckError, match=text):
        load_scorer()
    monkeypatch.undo()
    monkeypatch.setitem(third_party.REQUIREMENTS, "math_verify", "no-such-package==1.0")
    with pytest.raises(EnvironmentCheckError, match=r"^no-such-package: not installed; pip"):
        third_party.load("math_verify")


def test_the_extra_has_the_known_versions():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["tasks"] == list(third_party.REQUIREMENTS.values())


def test_a_formula_that_takes_too_long_is_ended_and_the_next_is_scored():
    entry, truth = question("countdown")
    endless = "9**9**9**9"
    function = GuardedFunction(
        f"pkg://{reasoning_gym.__name__}", "compute_score", RewardGuardSettings(time_limit=5.0)
    )
    calls = [
        {"data_source": "r", "solution_str": f"<answer>{text}</answer>", "ground_truth": truth}
        for text in (endless, entry["answer"])
    ]
    try:
        (slow, problem), (right, fine) = function.score(calls)
    finally:
        function.close()
    assert (right["score"], fine) == (1.0, "")
    # Where the machine has no memory for it, it ends sooner.
    assert problem == "the reward did not return within 5 s" or slow["score"] == 0


def test_a_reward_imports_its_scorer_before_the_first_response(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def load_scorer():\n    raise RuntimeError('no scorer here')\n"
        "def compute_score(**row):\n    return 1.0\n"
    )
    guard = RewardGuardSettings()
    with pytest.raises(DataError, match=r"cannot be loaded: RuntimeError: no scorer here"):
        GuardedFunction(str(tmp_path / "mine.py"), "compute_score", guard)


def test_importing_the_reward_imports_no_scorer():
    import subprocess

    code = "import hpo_verl.rewards.reasoning_gym, hpo_verl.rewards.math_answer, sys; "
    code += "assert not {'sympy', 'reasoning_gym', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
