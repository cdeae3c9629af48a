"""A trainer that ends after its step, with a checkpoint, when the launcher asks it to."""

from __future__ import annotations

from typing import Any

from hpo_verl.launch.stop import LISTENING, REQUESTED, STOPPED, StopFile
from hpo_verl.verl_plugin.reward_errors import run_folder


class StopsOnRequest:
    """Mixed into a trainer of verl: listens to the run's `.stop` file."""

    config: Any
    global_steps: int
    total_training_steps: int
    _saved_step = -1

    def on_train_begin(self) -> None:
        """Tell the launcher that a request will be heard."""
        super().on_train_begin()  # type: ignore[misc]
        self._stop_file = StopFile(run_folder(self.config.trainer.default_local_dir))
        self._stop_file.write(LISTENING)

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()  # type: ignore[misc]
        self._saved_step = self.global_steps

    def on_step_end(self) -> None:
        """Where it was asked for, save and make this step the last; verl still logs it."""
        is_last_step = self.global_steps >= self.total_training_steps
        if not is_last_step and self._stop_file.read() == REQUESTED:
            if self._saved_step != self.global_steps:
                self._save_checkpoint()
            # verl's loop ends after this step, and its modes prepare no further one.
            self.total_training_steps = self.global_steps
            self._stop_file.write(STOPPED)
        super().on_step_end()  # type: ignore[misc]
