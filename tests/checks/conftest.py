"""A small run that is right in every respect, and what to change in it."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composed_recipes import algorithm_file, composed
from omegaconf import OmegaConf, open_dict

from data_prep.countdown import __main__ as countdown
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.tiny import Schedule
from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.planned_run import PlannedRun

# The checks of data.
DATA_CHECKS = ("data files", "schema", "reward", "prompts")
PUZZLES = ("--prompt", "tiny", "--max-number", "9", "--max-target", "40")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Countdown data of 240 and 16 rows, and a policy that was hardly trained."""
    folder = tmp_path_factory.mktemp("made")
    sizes = ("--train-size", "240", "--val-size", "16")
    countdown.main(["--out", str(folder / "data"), *PUZZLES, *sizes])
    tiny_policy.make_policy(folder / "policy", schedule=Schedule(1, 1, 2))
    return folder


@pytest.fixture
def places(made):
    """Overrides that let the tiny recipe read what was made."""
    return (f"prepare.data.output={made / 'data'}", f"prepare.policy.output={made / 'policy'}")


@pytest.fixture
def planned(places, tmp_path, monkeypatch):
    """A function: changes of dotted keys -> a recipe as the doctor sees it."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def build(changes=None, recipe="countdown-tiny", hardware="cpu", address=None):
        extra = places if recipe == "countdown-tiny" else ()
        config = copy.deepcopy(composed(recipe, extra, hardware))
        with open_dict(config):
            config = OmegaConf.merge(config, algorithm_file("a_hpo"))
            for key, value in (changes or {}).items():
                OmegaConf.update(config, key, value, force_add=True)
        OmegaConf.resolve(config)
        folder = tmp_path / "run"
        return PlannedRun(recipe, (f"hydra.run.dir={folder}",), folder, address, composed=config)

    return build


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
        wanted = [check for check in CHECKS if check.name in DATA_CHECKS]
        return list(run_checks(planned(changes), wanted))

    return run
