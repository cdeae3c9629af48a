"""What the checks look at: a composed recipe and where it is to run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.model_folders import policy_folder
from hpo_verl.checks.model_size import KNOWN_MODELS, ModelSize, read_model_size
from hpo_verl.checks.rows import Sample, read_rows
from hpo_verl.config.prepare import Preparation, preparations
from hpo_verl.config.recipes import recipe_names
from hpo_verl.config.settings import data_files
from hpo_verl.errors import DataError


@dataclass(frozen=True)
class Subject:
    """A recipe with overrides.

    Attributes:
        recipe: its name.
        overrides: Hydra overrides, as given.
        config: the composed and resolved configuration, without Hydra's own part.
        run_folder: where the run writes.
        address: of the Ray cluster that the run joins; None for a Ray of its own.
        here: whether the run's processes, or some of them, run on this machine.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: DictConfig
    run_folder: Path
    address: str | None = None
    here: bool = True

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key; the default where it is absent or null."""
        value = OmegaConf.select(self.config, key)
        return default if value is None else value

    def command(self, name: str) -> str:
        """The same recipe and overrides with another command of `hpo-verl`."""
        return shlex.join(["hpo-verl", name, self.recipe, *self.overrides])

    def making(self, preparation: Preparation) -> str:
        """The command that makes what a preparation makes."""
        known = self.recipe in recipe_names()
        return self.command("prepare") if known else preparation.shown

    @property
    def on_cpu(self) -> bool:
        """Whether the run uses no accelerator."""
        return self.get("trainer.device") == "cpu"

    @property
    def needs_vllm(self) -> bool:
        """Whether vLLM samples the responses."""
        return self.get("actor_rollout_ref.rollout.name") == "vllm"

    @property
    def several_machines(self) -> bool:
        """Whether processes of the run may be on other machines."""
        return self.address is not None or self.get("trainer.nnodes", 1) > 1

    @property
    def checkpoint_folder(self) -> Path:
        """Where verl would write checkpoints."""
        given = self.get("trainer.default_local_dir")
        return Path(given).expanduser() if given else self.run_folder / "checkpoints"

    @property
    def policy_folder(self) -> Path:
        """Where the policy's files are, or will be."""
        return policy_folder(self.config)

    @property
    def data_files(self) -> list[tuple[str, Path]]:
        """Key and path of every data file."""
        return list(data_files(self.config))

    def maker(self, path: Path) -> Preparation | None:
        """The preparation that makes a file or folder; None if there is none."""
        makers = (p for p in preparations(self.config) if path.is_relative_to(p.output))
        return next(makers, None)

    @cached_property
    def size(self) -> ModelSize | None:
        """Dimensions of the policy; None if they are unknown."""
        try:
            return read_model_size(self.policy_folder)
        except DataError:
            # The check of the policy says why. What was not fetched yet may still be known.
            made = self.maker(self.policy_folder)
            repo = self.get("prepare.policy.arguments.repo") if made else None
            return KNOWN_MODELS.get(str(repo))

    @cached_property
    def rows(self) -> dict[Path, Sample]:
        """Every row of the data looked at, and some kept.

        Raises:
            DataError: a row is not in verl's schema.
        """
        return {path: read_rows(key, path) for key, path in self.data_files}
