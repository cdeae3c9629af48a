"""verl's own training loop ends after the step in which it is asked to, with a checkpoint."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base

from hpo_verl.runs.stop import LISTENING, REQUESTED, STOPPED, stage_message, stop_message
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle

STEPS = 4
LOGGERS = ["Tracking", "ValidationGenerationsLogger", "DapoFilteredRewardTableLogger", "tqdm"]
UNTOUCHED = [
    *("_reissue_inflight_prompts", "_shutdown_dump_executor", "_start_profiling"),
    *("_stop_profiling", "_compute_metrics"),
]


class Silent:
    """In place of verl's loggers."""

    def __init__(self, *args, **kwargs):
        self.logger = {}

    def log(self, *args, **kwargs):
        pass

    init = set_step = update = close = log


class Loop(trainer_base.PPOTrainer):
    """verl's loop around steps that only tell what happens."""

    def __init__(self, config):
        self.config = config
        self.happened, self.stages = [], []
        self.global_steps = 0
        self.steps_per_epoch = self.total_training_steps = STEPS

    def listen(self, ask_in_step, file):
        self.ask_in_step = ask_in_step
        self.file, self.before = file, file.read()
        self.stage = stage_message(file.path.parent)

    def on_train_begin(self):
        assert self.file.read() == self.before

    def step(self, metrics, timing_raw):
        assert self.file.read() == (LISTENING if self.before is not None else None)
        self.on_sample_begin()
        self.stages.append(self.stage.read())
        self.on_sample_end()
        self.stages.append(self.stage.read())
        self.happened.append(f"step {self.global_steps}")
        if self.global_steps == self.ask_in_step:
            self.file.write(REQUESTED)
        return SimpleNamespace(keys=[], partition_id="train")

    def _save_checkpoint(self):
        self.stages.append(self.stage.read())
        self.happened.append(f"save {self.global_steps}")

    def on_step_end(self):
        self.happened.append(f"weights {self.global_steps} of {self.total_training_steps}")

    def on_sample_end(self):
        pass

    def _consume_sync_metrics(self):
        return {}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    for name in LOGGERS:
        monkeypatch.setattr(trainer_base, name, Silent)
    monkeypatch.setattr(trainer_base, "SkipManager", Silent())
    monkeypatch.setattr(trainer_base.tq, "kv_clear", lambda **_: None)
    for name in UNTOUCHED:
        monkeypatch.setattr(Loop, name, lambda self, *_, **__: None)

    def run(ask_in_step, save_freq, launcher=True, steps=STEPS):
        config = OmegaConf.create(
            {
                "trainer": {
                    "project_name": "p",
                    "experiment_name": "e",
                    "logger": [],
                    "val_before_train": False,
                    "total_epochs": 1,
                    "test_freq": -1,
                    "save_freq": save_freq,
                    "default_local_dir": str(tmp_path / "checkpoints"),
                },
                "global_profiler": {"steps": None},
                "actor_rollout_ref": {"actor": {}},
            }
        )
        file = stop_message(tmp_path)
        if launcher:
            file.create()
            stage_message(tmp_path).create()
        # Nothing is written here that could be sealed.
        unsealed = {"seal_checkpoint": lambda trainer: None}
        trainer = type("Trainer", (LifeCycle, Loop), unsealed)(config)
        trainer.total_training_steps = steps
        trainer.listen(ask_in_step, file)
        trainer.fit(None)
        run.stages = trainer.stages
        return trainer.happened, file.read()

    return run


def test_without_a_request_nothing_changes(run):
    happened, state = run(ask_in_step=None, save_freq=2)
    assert happened == [
        *("step 1", "weights 1 of 4"),
        *("step 2", "save 2", "weights 2 of 4"),
        *("step 3", "weights 3 of 4"),
        *("step 4", "save 4", "weights 4 of 4"),
    ]
    assert state == LISTENING


def test_verl_ends_with_its_epochs_and_saves_nothing_though_there_are_prompts(run):
    """What `hpo_verl.checks.configuration.check_steps` refuses, whatever draws the prompts."""
    happened, _ = run(ask_in_step=None, save_freq=100, steps=9)
    assert happened[-2:] == ["step 4", "weights 4 of 9"]


def test_the_launcher_learns_what_the_trainer_does(run):
    run(ask_in_step=None, save_freq=3)
    assert run.stages == [
        *("step 1: sampling", "step 1: updating", "step 2: sampling", "step 2: updating"),
        *("step 3: sampling", "step 3: updating", "step 3: saving a checkpoint"),
        *("step 4: sampling", "step 4: updating", "step 4: saving a checkpoint"),
    ]


def test_without_a_launcher_and_with_a_folder_that_is_not_there_it_trains(run, monkeypatch):
    """Stock verl with our trainer mode: its checkpoint folder comes with the first checkpoint."""
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH")
    happened, state = run(ask_in_step=None, save_freq=-1, launcher=False)
    assert happened[-1] == "weights 4 of 4"
    assert state is None


@pytest.mark.parametrize("save_freq", [100, -1])
def test_a_request_ends_the_run_after_its_step_with_a_checkpoint(run, save_freq):
    happened, state = run(ask_in_step=2, save_freq=save_freq)
    # The weights go to the server as after every step; verl's modes see that it is the last.
    assert happened == ["step 1", "weights 1 of 4", "step 2", "save 2", "weights 2 of 2"]
    assert state == STOPPED


def test_a_checkpoint_of_the_same_step_is_not_saved_twice(run):
    happened, state = run(ask_in_step=2, save_freq=2)
    assert happened == ["step 1", "weights 1 of 4", "step 2", "save 2", "weights 2 of 2"]
    assert state == STOPPED


def test_in_the_last_step_there_is_nothing_to_stop(run):
    happened, state = run(ask_in_step=4, save_freq=100)
    assert happened[-3:] == ["step 4", "save 4", "weights 4 of 4"]
    assert state == REQUESTED


@pytest.mark.parametrize("mode", ["hpo_sync", "hpo_colocate_async", "hpo_separate_async"])
def test_every_mode_listens(mode):
    assert issubclass(get_trainer_cls(mode), LifeCycle)
