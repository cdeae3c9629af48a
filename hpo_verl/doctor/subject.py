"""What a doctor examines: a composed recipe and where it is to run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.launch.train import run_folder


@dataclass(frozen=True)
class Subject:
    """A recipe with overrides.

    Attributes:
        recipe: its name.
        overrides: Hydra overrides, as given.
        config: the composed and resolved configuration, without Hydra's own part.
        address: of a Ray cluster; None for a run on this machine.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: DictConfig
    address: str | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key; the default where it is absent or null."""
        value = OmegaConf.select(self.config, key)
        return default if value is None else value

    def command(self, name: str) -> str:
        """The same recipe and overrides with another command of `hpo-verl`."""
        return shlex.join(["hpo-verl", name, self.recipe, *self.overrides])

    @property
    def on_cpu(self) -> bool:
        """Whether the run uses no accelerator."""
        return self.get("trainer.device") == "cpu"

    @property
    def needs_vllm(self) -> bool:
        """Whether vLLM samples the responses."""
        return self.get("actor_rollout_ref.rollout.name") == "vllm"

    @property
    def run_folder(self) -> Path:
        """Where `hpo-verl train` would write."""
        return run_folder(self.recipe, self.overrides)

    @property
    def checkpoint_folder(self) -> Path:
        """Where verl would write checkpoints."""
        given = self.get("trainer.default_local_dir")
        return Path(given).expanduser() if given else self.run_folder / "checkpoints"
