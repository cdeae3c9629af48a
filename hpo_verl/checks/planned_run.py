"""What the checks look at: a recipe with overrides, and where it is to run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.finding import one_line
from hpo_verl.checks.model_size import ModelSize, read_model_size
from hpo_verl.checks.prepare import Preparation, preparations
from hpo_verl.checks.rows import Sample, read_rows
from hpo_verl.config.cluster import join, joined_address
from hpo_verl.config.recipes import (
    compose_recipe,
    is_file_name,
    read_overrides,
    recipe_file,
    recipe_names,
    run_folder,
    without_hydra,
)
from hpo_verl.config.settings import data_files, policy_folder
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.runs.checkpoints import FOLDER_NAME
from hpo_verl.runs.quiet import quiet_imports


@dataclass(frozen=True)
class PlannedRun:
    """A run that has not started.

    `composed` is the composed configuration, where the caller has it. Without `given_folder`,
    `hydra.run.dir` is the run's folder. Without `given_address`, configuration and environment
    name the Ray cluster, if any.
    """

    recipe: str
    overrides: tuple[str, ...]
    given_folder: Path | None = None
    given_address: str | None = None
    composed: DictConfig | None = None

    @cached_property
    def whole(self) -> DictConfig:
        """The composed configuration, Hydra's own part included."""
        if self.composed is not None:
            return self.composed
        with quiet_imports():
            return compose_recipe(self.recipe, self.overrides)

    @property
    def hydra_overrides(self) -> list[str]:
        """The overrides, with those paths quoted that Hydra would not read as text."""
        return read_overrides(self.overrides, recipe_file(self.recipe))

    @cached_property
    def run_folder(self) -> Path:
        """Where the run puts its files."""
        return self.given_folder or run_folder(self.whole)

    @cached_property
    def config(self) -> DictConfig:
        """What verl reads, resolved; without what starts a Ray where the run joins one."""
        config = without_hydra(self.whole)
        try:
            OmegaConf.resolve(config)
        except Exception as problem:
            raise ConfigError(one_line(problem)) from problem
        join(config)
        return config

    @property
    def address(self) -> str | None:
        """Address of the Ray cluster that the run joins; None for a Ray of its own."""
        return self.given_address or joined_address(self.config)

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key; the default where it is absent or null."""
        value = OmegaConf.select(self.config, key)
        return default if value is None else value

    @property
    def on_cpu(self) -> bool:
        """Whether the run uses no accelerator."""
        return self.get("trainer.device") == "cpu"

    @property
    def needs_vllm(self) -> bool:
        """Whether vLLM samples the responses."""
        return self.get("actor_rollout_ref.rollout.name") == "vllm"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.get("data.max_prompt_length") + self.get("data.max_response_length")

    @property
    def checkpoint_folder(self) -> Path:
        """Where verl would write checkpoints."""
        given = self.get("trainer.default_local_dir")
        return Path(given).expanduser() if given else self.run_folder / FOLDER_NAME

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

    def check_made(self, path: Path) -> None:
        """Raise a DataError where a file or folder is another than the recipe makes."""
        if (maker := self.maker(path)) and (fault := maker.look()[1]):
            raise DataError(f"prepare.{maker.name}: {fault}")

    def how_to_make(self, path: Path, otherwise: str) -> str:
        """How to get a right file or folder in the place of a missing or damaged one."""
        maker = self.maker(path)
        if maker is None:
            return otherwise
        command = maker.shown
        if is_file_name(self.recipe) or self.recipe in recipe_names():
            command = shlex.join(["hpo-verl", "prepare", self.recipe, *self.overrides])
        if maker.look() == (True, ""):
            return command
        return f"{otherwise}; or {maker.way_out}, then {command}"

    @cached_property
    def size(self) -> ModelSize | None:
        """Dimensions of the policy; None while its folder does not tell them."""
        try:
            return read_model_size(self.policy_folder)
        except DataError:
            # The check of the policy says why.
            return None

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer as verl reads it; whatever its library raises passes through."""
        with quiet_imports():
            from hpo_verl.verl_plugin.prompt_tokens import read_tokenizer

            return read_tokenizer(self.config, str(self.policy_folder))

    @cached_property
    def rows(self) -> dict[Path, Sample]:
        """The data files' rows, all of them in verl's schema, and some kept of each file."""
        return {path: read_rows(key, path) for key, path in self.data_files}
