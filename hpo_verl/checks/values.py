"""Whether every setting has a type, a range and a name that verl knows."""

from __future__ import annotations

import math
from typing import Any

from hydra.types import RunMode
from omegaconf import ListConfig, OmegaConf

from hpo_verl.checks.finding import Finding, error, ok
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.overrides import NO_SWEEP
from hpo_verl.config.recipes import verl_defaults
from hpo_verl.config.settings import ACTOR, MODEL, ROLLOUT, leaves
from hpo_verl.errors import ConfigError

MINI_BATCH = f"{ACTOR}.ppo_mini_batch_size"
# Dotted key -> (type, lowest, highest). Whether those not REQUIRED may be null is verl's business.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "data.train_batch_size": (int, 1, math.inf),
    "data.gen_batch_size": (int, 1, math.inf),
    "data.val_batch_size": (int, 0, math.inf),
    "data.train_max_samples": (int, -1, math.inf),
    "data.val_max_samples": (int, -1, math.inf),
    "data.dataloader_num_workers": (int, 0, 1024),
    "data.max_prompt_length": (int, 1, math.inf),
    "data.max_response_length": (int, 1, math.inf),
    f"{ACTOR}.optim.lr": (float, 0, 1),
    f"{ACTOR}.optim.weight_decay": (float, 0, math.inf),
    f"{ACTOR}.grad_clip": (float, 0, math.inf),
    MINI_BATCH: (int, 1, math.inf),
    f"{ACTOR}.ppo_epochs": (int, 1, math.inf),
    f"{ACTOR}.entropy_coeff": (float, 0, math.inf),
    f"{MODEL}.lora_rank": (int, 0, math.inf),
    f"{MODEL}.lora_alpha": (int, 1, math.inf),
    f"{ROLLOUT}.n": (int, 1, math.inf),
    f"{ROLLOUT}.temperature": (float, 0, 100),
    f"{ROLLOUT}.top_p": (float, 0, 1),
    f"{ROLLOUT}.max_num_seqs": (int, 1, math.inf),
    f"{ROLLOUT}.gpu_memory_utilization": (float, 0, 1),
    f"{ROLLOUT}.agent.num_workers": (int, 1, 1024),
    f"{ROLLOUT}.val_kwargs.n": (int, 1, math.inf),
    f"{ROLLOUT}.val_kwargs.temperature": (float, 0, 100),
    f"{ROLLOUT}.val_kwargs.top_p": (float, 0, 1),
    "trainer.n_gpus_per_node": (int, 1, 1024),
    "trainer.nnodes": (int, 1, 4096),
    "trainer.total_epochs": (int, 1, math.inf),
    "trainer.total_training_steps": (int, 1, math.inf),
    "trainer.save_freq": (int, -1, math.inf),
    "trainer.test_freq": (int, -1, math.inf),
    "trainer.max_actor_ckpt_to_keep": (int, 1, math.inf),
    "trainer.max_critic_ckpt_to_keep": (int, 1, math.inf),
    "reward.num_workers": (int, 1, 1024),
    "seed": (int, 0, 2**31 - 1),
}
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
_CONTENTS = ("model", "optimizer", "extra", "hf_model")
# Names that verl compares with those in its code, most of them after the start of Ray.
NAMES: dict[str, tuple[str, ...]] = {
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    # With a plus, verl takes the gradient of k2.
    f"{ACTOR}.kl_loss_type": (*_KL, *(f"{name}+" for name in _KL)),
    "algorithm.kl_penalty": (*_KL, *(f"{name}+" for name in _KL)),
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "data.truncation": ("error", "left", "right", "middle"),
    **{f"{part}.optim.lr_scheduler_type": ("constant", "cosine") for part in (ACTOR, "critic")},
    **{f"{part}.checkpoint.save_contents": _CONTENTS for part in (ACTOR, "critic")},
    **{f"{part}.checkpoint.load_contents": _CONTENTS for part in (ACTOR, "critic")},
}
# Sections of verl 0.8 that verl 0.9 composes and, but in its fully asynchronous trainer, never
# reads; and where verl's `migrate_legacy_reward_impl` moves their keys. The first that fits holds.
OLDER_KEYS = {
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward.reward_manager.module.name",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model": "reward.reward_model",
    "custom_reward_function": "reward.custom_reward_function",
    "sandbox_fusion": "reward.sandbox_fusion",
}
REQUIRED = (
    *("data.train_batch_size", "data.max_prompt_length", "data.max_response_length"),
    *(f"{ROLLOUT}.n", "trainer.n_gpus_per_node", "trainer.nnodes"),
)


def check_settings(run: PlannedRun) -> Finding:
    """Type, range and name of the settings that a user changes most, and of every switch."""
    if OmegaConf.select(run.whole, "hydra.mode") == RunMode.MULTIRUN:
        raise ConfigError(NO_SWEEP)
    if OmegaConf.select(run.whole, "hydra.job.chdir"):
        text = "hydra.job.chdir=true: must be false; relative paths would be of the run's folder"
        raise ConfigError(text)
    _check_switches(run)
    for key, bounds in NUMBERS.items():
        value = run.get(key)
        if value is not None or key in REQUIRED:
            _check_number(key, value, *bounds)
    for key, known in NAMES.items():
        value = run.get(key, ListConfig([]))
        for name in value if isinstance(value, ListConfig) else [value]:
            if name not in known:
                raise ConfigError(f"{key}={name}: must be one of {', '.join(known)}")
    batch = run.get("data.train_batch_size")
    for key in (MINI_BATCH, "data.gen_batch_size"):
        if batch % run.get(key, batch):
            raise ConfigError(f"{key}={run.get(key)}: must divide data.train_batch_size={batch}")
    # Verl asserts it in a worker, without a word.
    actor, rollout = f"{ACTOR}.use_dynamic_bsz", f"{ROLLOUT}.log_prob_use_dynamic_bsz"
    if run.get(actor) != run.get(rollout):
        raise ConfigError(f"{rollout}={run.get(rollout)}: must be that of {actor}={run.get(actor)}")
    return ok("types, ranges and names of the settings that are changed most")


def _check_switches(run: PlannedRun) -> None:
    """Refuse a text where verl's own default is true or false: to Python, `no` is true.

    And a value in the place of a whole section, which verl finds in a worker.
    """
    known = dict(leaves(OmegaConf.to_container(verl_defaults(), resolve=True)))
    for key, value in leaves(OmegaConf.to_container(run.config)):
        if isinstance(value, str) and isinstance(known.get(key), bool):
            raise ConfigError(f"{key}={value!r}: must be true or false, and no text")
        is_section = key not in known and f"{key}.0" not in known
        if value is not None and is_section and any(k.startswith(f"{key}.") for k in known):
            raise ConfigError(f"{key}={value!r}: is a section; set one of its keys")


def check_older_keys(run: PlannedRun) -> Finding:
    """Whether a setting is given by a key that verl no longer reads."""
    for section in ("reward_model", "custom_reward_function", "sandbox_fusion"):
        node = OmegaConf.to_container(OmegaConf.create({section: run.get(section)}))
        for key, value in leaves(node):
            if value is None:
                continue
            old = next(old for old in OLDER_KEYS if key == old or key.startswith(f"{old}."))
            new = OLDER_KEYS[old] + key.removeprefix(old)
            return error(
                f"{key}={value}: verl 0.9 does not read this older key of {new}", f"write {new}"
            )
    return ok("none that verl no longer reads")


def _check_number(key: str, value: Any, kind: type, low: float, high: float) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole or (kind is float and isinstance(value, float))
    if not fits or not math.isfinite(value) or not low <= value <= high:
        word = "an integer" if kind is int else "a number"
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{key}={value!r}: must be {word} {bounds}")
