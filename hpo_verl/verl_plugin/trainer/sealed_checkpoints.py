"""What a trainer needs so that a run can be killed at any time and go on as if it had not.

verl 0.9.1 writes rank files, the data loader's state and a tracker file in place, and the
metrics of a step only after its checkpoint; a new start empties the metrics file. It counts the
checkpoints to keep in memory, from zero at every start, and removes the last one before the
next is finished where one is to be kept. Here a checkpoint gets its seal
(`hpo_verl.runs.checkpoints`) after the metrics of its step are written, older ones are
removed only then, and metrics go on in the same file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.runs import checkpoints
from hpo_verl.runs.files import write_atomically

METRICS_VARIABLE = "VERL_FILE_LOGGER_PATH"
ASYNC_KEY = "actor_rollout_ref.actor.checkpoint.async_save"
KL_NAME = "kl_coefficient.json"


@contextlib.contextmanager
def whole_or_not_at_all(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint whose writing fails, and say so where the disk is full.

    Raises:
        EnvironmentCheckError: the disk is full; names where.
    """
    try:
        yield
    except Exception as error:
        folder = checkpoint.parent
        full = folder.is_dir() and checkpoints.full_disk(error, folder)
        checkpoints.remove(checkpoint)
        if not full:
            raise
        raise EnvironmentCheckError(
            f"{folder}: the disk is full, so {checkpoint.name} was not saved; complete checkpoints "
            "are as they were: make room, then go on with --resume"
        ) from error


class SealedCheckpoints:
    """Mixed into a trainer of verl: seals checkpoints, and goes on exactly where one ends."""

    config: DictConfig
    global_steps: int
    logger: Any
    train_dataloader: Any
    train_dataloader_it: Any
    _checkpoints_kept: int | None
    _unsealed: Path | None = None
    _metrics_path: str | None = None

    def __init__(self, config: DictConfig) -> None:
        if OmegaConf.select(config, ASYNC_KEY):
            raise ConfigError(
                f"{ASYNC_KEY}=true: must be false, since a checkpoint gets its checksums when it "
                "is saved, and then nothing may still be written"
            )
        trainer = config.trainer
        kept = trainer.get("max_actor_ckpt_to_keep")
        if trainer.get("remove_previous_ckpt_in_save"):
            kept = 1
        # verl keeps all for what is no positive number.
        self._checkpoints_kept = kept if isinstance(kept, int) and kept > 0 else None
        with open_dict(config):
            trainer.max_actor_ckpt_to_keep = None
            trainer.max_critic_ckpt_to_keep = None
            trainer.remove_previous_ckpt_in_save = False
        super().__init__(config)  # type: ignore[call-arg]

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()  # type: ignore[misc]
        controller = getattr(self, "kl_ctrl_in_reward", None)
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if trainer.resume_mode == "resume_path":
            folder = Path(trainer.resume_from_path)
        if controller is not None and (folder / KL_NAME).is_file():
            controller.value = json.loads((folder / KL_NAME).read_text())

    def fit(self, agent_loop_manager: Any) -> None:
        """Train to the end, with the metrics of earlier starts kept."""
        trainer = self.config.trainer
        if self.global_steps > 0 and not trainer.get("val_only", False):
            with open_dict(self.config):
                # It would be of a step that has its metrics already.
                trainer.val_before_train = False
            self._metrics_path = os.environ.get(METRICS_VARIABLE)
            if self._metrics_path is not None:
                # verl's logger empties the file that it opens.
                os.environ[METRICS_VARIABLE] = os.devnull
        super().fit(agent_loop_manager)  # type: ignore[misc]
        self.seal_checkpoint()

    def _fetch_one_gen_batch(self) -> Any:
        """Fetch a batch; a checkpoint holds the seed that its DataLoader's workers were given."""
        self._seed_workers()
        if self.train_dataloader_it is None:
            # After the last batch of an epoch it is of no use, and verl makes another.
            self.train_dataloader_it = iter(self.train_dataloader)
            self._seed_workers()
        return super()._fetch_one_gen_batch()  # type: ignore[misc]

    def _seed_workers(self) -> None:
        seed = self.config.data.get("seed")
        if seed is not None:
            # verl would have it drawn from a generator that nothing has seeded.
            generator = torch.Generator().manual_seed(seed + self.global_steps)
            self.train_dataloader.generator = generator

    def on_train_begin(self) -> None:
        """Give verl's file logger the run's file again, to add to it."""
        file_logger = self._file_logger()
        if self._metrics_path is not None:
            os.environ[METRICS_VARIABLE] = self._metrics_path
            if file_logger is not None:
                file_logger.finish()
                file_logger.fp = open(self._metrics_path, "ab", buffering=0)  # noqa: SIM115
        super().on_train_begin()  # type: ignore[misc]

    def on_step_begin(self) -> None:
        """Seal the last step's checkpoint, now that its metrics are written."""
        self.seal_checkpoint()
        super().on_step_begin()  # type: ignore[misc]

    def _file_logger(self) -> Any:
        return self.logger.logger.get("file")

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir).absolute()
        checkpoint = folder / f"global_step_{self.global_steps}"
        # An earlier start may have left a part of it.
        checkpoints.remove(checkpoint)
        with whole_or_not_at_all(checkpoint):
            super()._save_checkpoint()  # type: ignore[misc]
            controller = getattr(self, "kl_ctrl_in_reward", None)
            if controller is not None:
                write_atomically(checkpoint / KL_NAME, json.dumps(controller.value))
        self._unsealed = checkpoint

    def seal_checkpoint(self) -> None:
        """Seal the checkpoint that was saved last; the metrics of its step must be written."""
        checkpoint, self._unsealed = self._unsealed, None
        if checkpoint is None:
            return
        with whole_or_not_at_all(checkpoint):
            file_logger = self._file_logger()
            if file_logger is not None:
                os.fsync(file_logger.fp.fileno())
            checkpoints.seal(checkpoint)
        if self._checkpoints_kept is not None:
            checkpoints.keep_newest(checkpoint.parent, self._checkpoints_kept)
