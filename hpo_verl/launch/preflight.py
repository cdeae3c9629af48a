"""Checks a configuration in the driver, before stock verl starts Ray.

As a Hydra callback (`hydra.callbacks` in the recipes) the checks of `hpo-verl train`
run under stock `python -m verl.trainer.main_ppo`; under `hpo-verl train` they have run
already. The callback also gives the run its folder, and fits what a recipe says of Ray
to the cluster that the run joins.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.checks.finding import raise_first_error
from hpo_verl.checks.list import run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config import cluster
from hpo_verl.config.environment import complete_environment
from hpo_verl.config.overrides import NO_SWEEP
from hpo_verl.config.recipes import without_hydra
from hpo_verl.errors import EXIT_BAD_INPUT, EXIT_FAILED, HpoVerlError
from hpo_verl.launch.resume import begin, logger_paths, place_checkpoints
from hpo_verl.runs.process import MARKER


def check(config: DictConfig) -> None:
    """Make every check that `hpo-verl train` makes, and print the warnings."""
    run = PlannedRun(
        str(OmegaConf.select(config, "hydra.job.config_name")),
        tuple(OmegaConf.select(config, "hydra.overrides.task") or ()),
        given_folder=Path(config.hydra.run.dir),
        composed=config,
    )
    for line in raise_first_error(run_checks(run)):
        print(line, file=sys.stderr)


class Preflight(Callback):
    """Checks the configuration and places the run's files in Hydra's output folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check, then point verl's loggers and checkpoints into the run folder."""
        launched = MARKER in os.environ
        try:
            # Before anything resolves what the recipe takes from it.
            complete_environment()
            cluster.join(config)
            if not launched:
                check(config)
            folder = Path(config.hydra.run.dir).absolute()
            place_checkpoints(config, folder)
            if not launched:
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
            raise SystemExit(error.exit_code) from error
        except Exception as error:
            # A defect of ours, after which nothing would have been checked.
            traceback.print_exc()
            raise SystemExit(EXIT_FAILED) from error
        os.environ.update(logger_paths(folder))
        cluster.forward_environment(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse several runs at once: Hydra would start each without `on_run_start`."""
        print(f"error: settings: {NO_SWEEP}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
