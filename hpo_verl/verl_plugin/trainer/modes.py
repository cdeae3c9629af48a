"""Trainer modes `hpo_sync`, `hpo_colocate_async` and `hpo_separate_async`.

Each is verl's mode of the same name without the prefix, with `hpo/*` in the metrics of every step.
Beyond the metrics, a run can be stopped, killed and repeated (`life_cycle`), updates that are not
finite are made known (`step_guard`), algorithms get what verl does not pass on (`algorithm_step`,
`prompt_history`), prompts come in stages and get responses by value (`prompts`), or are
asked again with a hint (`hints`), and how sessions branched is logged (`branching`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from hpo_verl.verl_plugin.advantages import OUR_MODES
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.trainer.branching import Branching
from hpo_verl.verl_plugin.trainer.hints import Hints
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle
from hpo_verl.verl_plugin.trainer.prompts import Curriculum, Knapsack


@cache
def register(trainers: Any) -> None:
    """Register the trainer modes with verl; a second call changes nothing."""
    for name in OUR_MODES:
        parent_mode = name.removeprefix("hpo_")
        parent = trainers.get_trainer_cls(parent_mode)
        members = {"parent_mode": parent_mode, "__module__": __name__}
        bases = (LifeCycle, AlgorithmStep, Branching, Hints, Knapsack, Curriculum, parent)
        trainers.register_trainer(name)(type(f"HPO{parent.__name__}", bases, members))
