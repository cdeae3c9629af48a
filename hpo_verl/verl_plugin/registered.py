"""Tells what verl's registries hold, and whether that is what the recipes name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from hpo_verl.algorithms.registry import OUR_ESTIMATORS, OUR_LOSSES
from hpo_verl.verl_plugin.advantages import OUR_MODES

OUR_AGENT_LOOPS = (
    *("seeded_single_turn_agent", "seeded_tool_agent", "tool_rounds_agent"),
    "branching_tool_agent",
)


def absent_names() -> list[str]:
    """Our names that verl's registries lack, or hold from another package, and which of the two."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    absent = []
    for kind, registry, names in (
        ("advantage estimator", ADV_ESTIMATOR_REGISTRY, OUR_ESTIMATORS),
        ("policy loss", POLICY_LOSS_REGISTRY, OUR_LOSSES),
        ("trainer mode", TRAINER_REGISTRY, OUR_MODES),
        ("rollout", RolloutReplicaRegistry._registry, ("hf",)),
        ("agent loop", _agent_loop_registry, OUR_AGENT_LOOPS),
    ):
        for name in names:
            if name not in registry:
                absent.append(f"{kind} {name!r}: not registered")
            elif not (origin := _origin(registry[name])).startswith("hpo_verl."):
                absent.append(f"{kind} {name!r}: registered by {origin}")
    return absent


def _origin(entry: Any) -> str:
    """Module of a function, a class, what a `partial` wraps, or an entry of an agent loop."""
    return (
        entry["_target_"] if isinstance(entry, dict) else getattr(entry, "func", entry).__module__
    )


def selected(config: DictConfig) -> list[tuple[str, str, list[str]]]:
    """What verl's whole configuration, resolved, selects by name from verl's registries.

    Returns:
        Key, name, and the names that are registered, as far as verl could import what they need.
    """
    from verl.checkpoint_engine import CheckpointEngineRegistry
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.utils.tracking import Tracking
    from verl.workers.engine import EngineRegistry
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    registries: dict[str, Iterable[Any]] = {
        "algorithm.adv_estimator": ADV_ESTIMATOR_REGISTRY,
        f"{actor}.policy_loss.loss_mode": POLICY_LOSS_REGISTRY,
        "trainer.v1.trainer_mode": TRAINER_REGISTRY,
        # An old name of wandb, which verl still takes.
        "trainer.logger": [*Tracking.supported_backend, "tracking"],
        f"{actor}.strategy": EngineRegistry._engines["language_model"],
        f"{rollout}.name": RolloutReplicaRegistry._registry,
    }
    if not OmegaConf.select(config, f"{rollout}.checkpoint_engine.custom_backend_module"):
        engines = CheckpointEngineRegistry._registry
        registries[f"{rollout}.checkpoint_engine.backend"] = engines
    if OmegaConf.select(config, "reward.reward_manager.source") == "register":
        registries["reward.reward_manager.name"] = REWARD_MANAGER
    if not OmegaConf.select(config, f"{rollout}.agent.agent_loop_config_path"):
        # The file that this key names would register more.
        registries[f"{rollout}.agent.default_agent_loop"] = _agent_loop_registry
    return [
        (key, str(name), sorted(map(str, registry)))
        for key, registry in registries.items()
        for name in _values(config, key)
    ]


def _values(config: DictConfig, key: str) -> list[Any]:
    """What a key holds: the entries of a list, one value, or nothing."""
    value = OmegaConf.select(config, key)
    if isinstance(value, ListConfig):
        return list(value)
    return [] if value is None else [value]
