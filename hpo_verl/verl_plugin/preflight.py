"""Checks a configuration in the driver, before verl starts Ray.

As a Hydra callback (`hydra.callbacks` in the recipes) the same checks run under
stock `python -m verl.trainer.main_ppo`; it also gives the run its folder, and
fits what a recipe says of Ray to the cluster that the run joins.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.algorithms.catalog import ESTIMATOR_SECTIONS
from hpo_verl.errors import ConfigError, HpoVerlError
from hpo_verl.launch import checks, cluster
from hpo_verl.launch.prepare import check_made
from hpo_verl.launch.process import MARKER
from hpo_verl.launch.recipes import without_hydra
from hpo_verl.launch.resume import begin

EXIT_BAD_INPUT, EXIT_DEFECT = 2, 1
# Sections that verl turns into dataclasses, some of them only inside a worker.
TYPED_SECTIONS = (
    "algorithm",
    "actor_rollout_ref.actor",
    "actor_rollout_ref.rollout",
)


def check(config: DictConfig) -> None:
    """Check everything that can be known before Ray starts.

    Args:
        config: the composed configuration, without Hydra's own part.

    Raises:
        HpoVerlError: names the key or file, its value and what is permitted.
    """
    checks.check_all(config)
    check_made(config)
    check_with_verl(config)


def check_with_verl(config: DictConfig) -> None:
    """Check the algorithm's settings and what verl's own validation sees.

    Raises:
        ConfigError: names the section and verl's complaint.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from hpo_verl.verl_plugin.checks import check_algorithm, check_trainer_mode
    from hpo_verl.verl_plugin.reward_guard import guard_settings
    from hpo_verl.verl_plugin.step_guard import step_guard_settings
    from hpo_verl.verl_plugin.weight_update import weight_update_timeout

    check_algorithm(config)
    check_trainer_mode(config)
    guard_settings(config)
    step_guard_settings(config)
    weight_update_timeout(config.actor_rollout_ref.rollout)
    mode = config.trainer.v1.trainer_mode
    if mode not in TRAINER_REGISTRY:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode!r}: must be one of {', '.join(TRAINER_REGISTRY)}"
        )
    check_trainer_mode(config)
    for section in TYPED_SECTIONS:
        values: Any = OmegaConf.to_container(OmegaConf.select(config, section), resolve=True)
        # verl passes these on to our estimators untyped.
        for ours in ESTIMATOR_SECTIONS.values():
            values.pop(ours, None)
        try:
            omega_conf_to_dataclass(DictConfig(values))
        except Exception as error:
            raise ConfigError(f"{section}: {_innermost(error)}") from error
    try:
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses the configuration: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    """The message of the error behind Hydra's instantiation error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


class Preflight(Callback):
    """Checks the configuration and places the run's files in Hydra's output folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check, then point verl's loggers and checkpoints into the run folder."""
        try:
            cluster.join(config)
            if cluster.joins_cluster(config):
                cluster.check_absolute(without_hydra(config), str(config.hydra.run.dir))
            check(without_hydra(config))
            folder = Path(config.hydra.run.dir).absolute()
            checks.check_run_folder(folder)
            with open_dict(config):
                if not config.trainer.default_local_dir:
                    config.trainer.default_local_dir = str(folder / "checkpoints")
            if MARKER not in os.environ:
                # Under `hpo-verl train` the run is recorded already.
                folder.mkdir(parents=True, exist_ok=True)
                plain = without_hydra(config)
                if begin(plain, folder, sys.argv, resume=False, announce=print):
                    with open_dict(config):
                        config.trainer.update(
                            resume_mode=plain.trainer.resume_mode,
                            resume_from_path=plain.trainer.resume_from_path,
                        )
        except HpoVerlError as error:
            print(f"error: {error}", file=sys.stderr)
            # Hydra turns a callback's exceptions into warnings; this is none.
            raise SystemExit(EXIT_BAD_INPUT) from error
        except Exception as error:
            # A defect of ours, after which nothing would have been checked.
            traceback.print_exc()
            raise SystemExit(EXIT_DEFECT) from error
        os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(folder / "metrics.jsonl"))
        os.environ.setdefault("TENSORBOARD_DIR", str(folder / "tensorboard"))
        cluster.forward_environment(config)
