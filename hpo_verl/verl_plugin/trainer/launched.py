"""A trainer that tells the launcher what it does, and ends after its step when it is asked to."""

from __future__ import annotations

from typing import Any

from hpo_verl.runs.stop import LISTENING, REQUESTED, STOPPED, stage_message, stop_message
from hpo_verl.verl_plugin.trainer.reward_errors import run_folder


class Launched:
    """Mixed into a trainer of verl: writes `.stage` and heeds `.stop` of the run's folder."""

    config: Any
    global_steps: int
    total_training_steps: int
    _saved_step = -1

    def _say(self, stage: str) -> None:
        stage_message(run_folder(self.config.trainer.default_local_dir)).write(stage)

    def _say_in_step(self, stage: str) -> None:
        self._say(f"step {self.global_steps}: {stage}")

    def _setup(self) -> None:
        self._say("loading the policy and starting the rollout servers")
        super()._setup()  # type: ignore[misc]

    def on_init_end(self) -> None:
        """Say so, and that the agent loops come next."""
        self._say("sending the weights to the rollout servers")
        super().on_init_end()  # type: ignore[misc]
        self._say("starting the agent loops")

    def on_validate_begin(self) -> None:
        """Say so."""
        self._say_in_step("validating")
        super().on_validate_begin()  # type: ignore[misc]

    def on_train_begin(self) -> None:
        """Tell the launcher that a request will be heard."""
        super().on_train_begin()  # type: ignore[misc]
        self._stop = stop_message(run_folder(self.config.trainer.default_local_dir))
        self._stop.write(LISTENING)

    def on_sample_begin(self) -> None:
        """Say so."""
        self._say_in_step("sampling")
        super().on_sample_begin()  # type: ignore[misc]

    def on_sample_end(self) -> None:
        """Say what comes next."""
        super().on_sample_end()  # type: ignore[misc]
        self._say_in_step("updating")

    def _save_checkpoint(self) -> None:
        self._say_in_step("saving a checkpoint")
        super()._save_checkpoint()  # type: ignore[misc]
        self._saved_step = self.global_steps

    def on_step_end(self) -> None:
        """Where it was asked for, save and make this step the last; verl still logs it."""
        is_last_step = self.global_steps >= self.total_training_steps
        if not is_last_step and self._stop.read() == REQUESTED:
            if self._saved_step != self.global_steps:
                self._save_checkpoint()
            # verl's loop ends after this step, and its modes prepare no further one.
            self.total_training_steps = self.global_steps
            self._stop.write(STOPPED)
        self._say_in_step("sending the weights to the rollout servers")
        super().on_step_end()  # type: ignore[misc]
