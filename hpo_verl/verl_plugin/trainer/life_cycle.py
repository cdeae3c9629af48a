"""What verl's trainer lacks so that a run can be stopped, killed and repeated.

- The launcher learns what the run is doing, and can end it after a step (`hpo_verl.runs.stop`).
- A run that is killed at any time goes on as if it had not been. verl 0.9.1 writes the files of
  a checkpoint in place, and the metrics of its step only afterwards. Here a checkpoint gets its
  seal (`hpo_verl.runs.checkpoints`) when those metrics are written, and older checkpoints are
  removed only then. verl's `checkpoint_callback_class` is called before that, not at all where
  saving fails, and belongs to the user.
- The same settings give the same numbers, on any number of ranks (`batches`).
- Too many rewards that fail end the run (`rollout.reward_guard`).
- A validation of several responses a prompt gives pass@k (`pass_at_k`), and each leaves some of
  its responses in the run's folder.
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
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import log_seqlen_unbalance

from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.runs import checkpoints
from hpo_verl.runs.files import write_atomically
from hpo_verl.runs.samples import SAMPLES, samples_file, samples_text
from hpo_verl.runs.stop import LISTENING, REQUESTED, STOPPED, stage_message, stop_message
from hpo_verl.verl_plugin.rollout.reward_guard import check_rewards, is_guarded
from hpo_verl.verl_plugin.trainer.batches import (
    columns_for_workers,
    deal_mini_batches,
    ordered_validation,
    sort_rows,
)
from hpo_verl.verl_plugin.trainer.pass_at_k import pass_at_k_metrics

METRICS_VARIABLE = "VERL_FILE_LOGGER_PATH"
ASYNC_KEY = "actor_rollout_ref.actor.checkpoint.async_save"
KL_NAME = "kl_coefficient.json"
KEPT = {"memory": "estimator_memory.json", "success_rates": "success_rates.json"}
"""What a trainer remembers by name, and its file in a checkpoint."""


def run_folder(default_local_dir: str) -> Path:
    """Folder of verl's metrics file, which `train` and `preflight` set; else the checkpoints'."""
    metrics = os.environ.get(METRICS_VARIABLE)
    return Path(metrics).parent if metrics else Path(default_local_dir)


@contextlib.contextmanager
def whole_or_not_at_all(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint whose writing fails; a full disk raises an EnvironmentCheckError."""
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


class LifeCycle:
    """Mixed into a trainer of verl, as the first of its bases."""

    actor_rollout_wg: Any
    config: DictConfig
    global_steps: int
    logger: Any
    tokenizer: Any
    total_training_steps: int
    train_dataloader: Any
    train_dataloader_it: Any
    _metrics_path: str | None = None
    _names_in_step: tuple[int, int] = (-1, 0)
    _saved_step = -1
    _unsealed: Path | None = None

    def __init__(self, config: DictConfig) -> None:
        if OmegaConf.select(config, ASYNC_KEY):
            raise ConfigError(
                f"{ASYNC_KEY}=true: must be false, since a checkpoint gets its checksums when it "
                "is saved, and then nothing may still be written"
            )
        trainer = config.trainer
        only_last = trainer.get("remove_previous_ckpt_in_save")
        kept = 1 if only_last else trainer.get("max_actor_ckpt_to_keep")
        # As for verl, a number that is not positive keeps all. verl itself would count from zero
        # at every start, and remove the last one before the next is whole.
        self._checkpoints_kept = kept if isinstance(kept, int) and kept > 0 else None
        with open_dict(config):
            trainer.max_actor_ckpt_to_keep = None
            trainer.max_critic_ckpt_to_keep = None
            trainer.remove_previous_ckpt_in_save = False
        self._folder = run_folder(trainer.default_local_dir)
        self._columns: dict[str, list[str]] = {}
        super().__init__(config)  # type: ignore[call-arg]

    # ------------------------------------------------------------------ start

    def _say(self, stage: str) -> None:
        stage_message(self._folder).write(stage)

    def _say_in_step(self, stage: str) -> None:
        self._say(f"step {self.global_steps}: {stage}")

    def _setup(self) -> None:
        self._say("loading the policy and starting the rollout servers")
        super()._setup()  # type: ignore[misc]

    def _build_replay_buffer(self) -> Any:
        """Set how often the buffer looks for responses (seconds; 2 in verl, without a setting)."""
        buffer = super()._build_replay_buffer()  # type: ignore[misc]
        interval = self.config.trainer.v1.sampler.get("poll_interval")
        if interval is not None:
            buffer.poll_interval = float(interval)
        return buffer

    def _load_checkpoint(self) -> None:
        """Restore an adaptive KL coefficient too, which verl forgets, and what is kept here."""
        super()._load_checkpoint()  # type: ignore[misc]
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if trainer.resume_mode == "resume_path":
            folder = Path(trainer.resume_from_path)
        controller = getattr(self, "kl_ctrl_in_reward", None)
        if controller is not None and (folder / KL_NAME).is_file():
            controller.value = json.loads((folder / KL_NAME).read_text())
        for name, file in KEPT.items():
            if (folder / file).is_file():
                setattr(self, name, json.loads((folder / file).read_text()))

    def on_init_end(self) -> None:
        """Here verl sends the weights to the rollout servers."""
        self._say("sending the weights to the rollout servers")
        super().on_init_end()  # type: ignore[misc]
        self._say("starting the agent loops")

    def fit(self, agent_loop_manager: Any) -> None:
        """Train to the end; a run that goes on keeps the metrics of its earlier starts."""
        trainer = self.config.trainer
        if self.global_steps > 0 and not trainer.get("val_only", False):
            with open_dict(self.config):
                # That step has its metrics already.
                trainer.val_before_train = False
            self._metrics_path = os.environ.get(METRICS_VARIABLE)
            if self._metrics_path is not None:
                # verl's logger empties the file that it opens.
                os.environ[METRICS_VARIABLE] = os.devnull
        super().fit(agent_loop_manager)  # type: ignore[misc]
        self.seal_checkpoint()

    def on_train_begin(self) -> None:
        """Go on in the metrics file, which verl has opened by now, and heed the launcher."""
        file_logger = self.logger.logger.get("file")
        if self._metrics_path is not None:
            os.environ[METRICS_VARIABLE] = self._metrics_path
            if file_logger is not None:
                file_logger.finish()
                file_logger.fp = open(self._metrics_path, "ab", buffering=0)  # noqa: SIM115
        super().on_train_begin()  # type: ignore[misc]
        stop_message(self._folder).write(LISTENING)

    # ------------------------------------------------------------------ step

    def on_step_begin(self) -> None:
        """Seal the checkpoint of the step before, whose metrics verl has written by now."""
        self.seal_checkpoint()
        super().on_step_begin()  # type: ignore[misc]

    def _fetch_one_gen_batch(self) -> Any:
        """Fetch prompts; names and workers' seed follow from the step; in verl they are random."""
        self._seed_workers()
        if self.train_dataloader_it is None:
            # verl makes an iterator only here, and another one after the last batch of an epoch.
            self.train_dataloader_it = iter(self.train_dataloader)
            self._seed_workers()
        batch = super()._fetch_one_gen_batch()  # type: ignore[misc]
        step, named = self._names_in_step
        if step != self.global_steps:
            named = 0
        self._names_in_step = (self.global_steps, named + len(batch))
        names = [f"{self.global_steps:08d}-{named + row:08d}" for row in range(len(batch))]
        tu.assign_non_tensor_stack(batch, "uid", names)
        return batch

    def _seed_workers(self) -> None:
        seed = self.config.data.get("seed")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + self.global_steps)
            self.train_dataloader.generator = generator

    def on_sample_begin(self) -> None:
        """Here verl waits for responses."""
        self._say_in_step("sampling")
        super().on_sample_begin()  # type: ignore[misc]

    def on_sample_end(self) -> None:
        """Here verl has the step's responses."""
        super().on_sample_end()  # type: ignore[misc]
        self._say_in_step("updating")

    def _balance_batch(
        self,
        batch: Any,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = True,
    ) -> Any:
        """Sort the responses, and deal every mini-batch to the ranks by itself.

        verl deals the whole batch, in the order in which responses finished. It also pads here.
        """
        if is_guarded(self.config):
            check_rewards(
                batch, self.config, self.tokenizer, self.global_steps, self._folder, metrics
            )
        sort_rows(batch)
        trainer = self.config.trainer
        multiple = self._get_required_batch_multiple(1)  # type: ignore[attr-defined]
        if trainer.nnodes * trainer.n_gpus_per_node == 1 and len(batch.keys) % multiple == 0:
            # Nothing to deal or to fill up, and verl's search for it takes 0.1 s.
            return batch
        batch = super()._balance_batch(batch, metrics, logging_prefix)  # type: ignore[misc]
        sort_rows(batch)
        actor = self.config.actor_rollout_ref
        lengths = [tag["seq_len"] for tag in batch.tags]
        shares = deal_mini_batches(
            lengths,
            mini_batch_size=actor.actor.ppo_mini_batch_size * actor.rollout.n,
            ranks=max(self.actor_rollout_wg._dispatch_info["actor"]) + 1,
        )
        batch.reorder([row for share in shares for row in share])
        metrics.update(log_seqlen_unbalance(lengths, shares, logging_prefix))
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return self._with_columns("_compute_old_log_prob", batch, metrics)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return self._with_columns("_update_actor", batch, metrics)

    def _with_columns(self, name: str, batch: Any, metrics: dict[str, Any]) -> Any:
        """Let workers fetch only what they read of a batch; in verl they fetch all columns."""
        if name not in self._columns:
            self._columns[name] = columns_for_workers(batch)
        batch.fields = self._columns[name]
        batch = getattr(super(), name)(batch, metrics)
        batch.fields = None
        return batch

    def on_step_end(self) -> None:
        """Here verl sends the weights. After a request to stop, this step is the last.

        verl's loop ends, and prepares no step, where `global_steps` is `total_training_steps`.
        """
        stop = stop_message(self._folder)
        if self.global_steps < self.total_training_steps and stop.read() == REQUESTED:
            if self._saved_step != self.global_steps:
                self._save_checkpoint()
            self.total_training_steps = self.global_steps
            stop.write(STOPPED)
        self._say_in_step("sending the weights to the rollout servers")
        super().on_step_end()  # type: ignore[misc]

    def on_validate_begin(self) -> None:
        """Here verl is about to validate."""
        self._say_in_step("validating")
        super().on_validate_begin()  # type: ignore[misc]

    def _val_metrics_update(
        self,
        data_sources: Any,
        sample_uids: Any,
        reward_extra_infos_dict: Any,
        sample_turns: Any,
        expected_acc_counts: Any = None,
    ) -> dict[str, float]:
        """Add pass@k to the metrics of a validation, which do not depend on who finished first."""
        data_sources, sample_uids, reward_extra_infos_dict = ordered_validation(
            data_sources, sample_uids, reward_extra_infos_dict
        )
        metrics = super()._val_metrics_update(  # type: ignore[misc]
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts
        )
        return metrics | pass_at_k_metrics(
            data_sources, sample_uids, reward_extra_infos_dict, expected_acc_counts
        )

    def _maybe_log_val_generations(
        self, inputs: list[str], outputs: list[str], scores: list[float]
    ) -> None:
        """Write some of a validation's responses into the run's folder, always to equal prompts."""
        super()._maybe_log_val_generations(inputs, outputs, scores)  # type: ignore[misc]
        rows = sorted(zip(inputs, outputs, scores, strict=True), key=lambda row: row[0])
        if not rows:
            return
        count = max(SAMPLES, self.config.trainer.log_val_generations)
        rows = rows[:: max(1, len(rows) // count)]
        file = samples_file(self._folder, self.global_steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, samples_text(self.global_steps, rows[:count], scores))

    # ------------------------------------------------------------------ checkpoint

    def _save_checkpoint(self) -> None:
        """Remove what verl writes, which it does in place, unless all of it is written."""
        self._say_in_step("saving a checkpoint")
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
        self._saved_step = self.global_steps

    def seal_checkpoint(self) -> None:
        """Seal the checkpoint that was saved last; the metrics of its step must be written."""
        checkpoint, self._unsealed = self._unsealed, None
        if checkpoint is None:
            return
        with whole_or_not_at_all(checkpoint):
            # Only now: the validation after the step may have changed it.
            for name, file in KEPT.items():
                if kept := getattr(self, name, None):
                    write_atomically(checkpoint / file, json.dumps(kept))
            file_logger = self.logger.logger.get("file")
            if file_logger is not None:
                os.fsync(file_logger.fp.fileno())
            checkpoints.seal(checkpoint)
        if self._checkpoints_kept is not None:
            checkpoints.keep_newest(checkpoint.parent, self._checkpoints_kept)
