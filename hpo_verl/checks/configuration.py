"""Whether the settings are legal together, and whether a run would learn anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from hpo_verl.checks.finding import Finding, attempt, error, ok, skipped, warning
from hpo_verl.checks.imports import MODULES
from hpo_verl.checks.subject import Subject
from hpo_verl.config.recipes import nearest
from hpo_verl.errors import ConfigError
from hpo_verl.runs.checkpoints import TRACKER
from hpo_verl.runs.quiet import quiet_imports

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
# Estimators of verl that compare the responses to one prompt.
GROUP_RELATIVE = (
    *("grpo", "grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "opo", "gpg"),
    *("reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
)
# Dotted key -> (type, lowest, highest). Whether those not REQUIRED may be null is verl's business.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "data.train_batch_size": (int, 1, math.inf),
    "data.max_prompt_length": (int, 1, math.inf),
    "data.max_response_length": (int, 1, math.inf),
    "actor_rollout_ref.actor.optim.lr": (float, 0, 1),
    "actor_rollout_ref.actor.optim.weight_decay": (float, 0, math.inf),
    "actor_rollout_ref.actor.grad_clip": (float, 0, math.inf),
    "actor_rollout_ref.actor.ppo_mini_batch_size": (int, 1, math.inf),
    "actor_rollout_ref.actor.ppo_epochs": (int, 1, math.inf),
    "actor_rollout_ref.actor.entropy_coeff": (float, 0, math.inf),
    "actor_rollout_ref.rollout.n": (int, 1, math.inf),
    "actor_rollout_ref.rollout.temperature": (float, 0, 100),
    "actor_rollout_ref.rollout.top_p": (float, 0, 1),
    "actor_rollout_ref.rollout.max_num_seqs": (int, 1, math.inf),
    "trainer.n_gpus_per_node": (int, 1, 1024),
    "trainer.nnodes": (int, 1, 4096),
    "trainer.total_epochs": (int, 1, math.inf),
    "trainer.total_training_steps": (int, 1, math.inf),
    "trainer.save_freq": (int, -1, math.inf),
    "trainer.test_freq": (int, -1, math.inf),
    "reward.num_workers": (int, 1, 1024),
    "seed": (int, 0, 2**31 - 1),
}
REQUIRED = (
    *("data.train_batch_size", "data.max_prompt_length", "data.max_response_length"),
    *("actor_rollout_ref.rollout.n", "trainer.n_gpus_per_node", "trainer.nnodes"),
)
MINI_BATCH = f"{ACTOR}.ppo_mini_batch_size"


def check_settings(subject: Subject) -> Finding:
    """Type and range of the settings that a user changes most."""

    def look() -> str:
        for key, bounds in NUMBERS.items():
            value = subject.get(key)
            if value is not None or key in REQUIRED:
                _check_number(key, value, *bounds)
        batch, mini = subject.get("data.train_batch_size"), subject.get(MINI_BATCH)
        if mini is not None and (mini > batch or batch % mini):
            raise ConfigError(f"{MINI_BATCH}={mini}: must divide data.train_batch_size={batch}")
        return "types and ranges of the settings that are changed most"

    return attempt("settings", look, "correct the override")


def _check_number(key: str, value: Any, kind: type, low: float, high: float) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if kind is int else whole or isinstance(value, float)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        word = "an integer" if kind is int else "a number"
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{key}={value!r}: must be {word} {bounds}")


def check_names(subject: Subject) -> Finding:
    """Whether verl knows the estimator, loss, trainer mode, reward manager and rollout."""
    with quiet_imports():
        from hpo_verl.verl_plugin.registered import selected

        chosen = selected(subject.config)
    # What verl knows and could not import here is the finding of another check.
    unknown = [
        (key, name, known)
        for key, name, known in chosen
        if name not in known and name not in MODULES.get(key, ())
    ]
    if unknown:
        return error(
            "names",
            "; ".join(
                f"{key}={name}: not registered with verl; {nearest(name, known)}"
                for key, name, known in unknown
            ),
            "correct the override, or load the package that registers it",
        )
    return ok("names", ", ".join(f"{key.rsplit('.', 1)[-1]} {name}" for key, name, _ in chosen))


def check_algorithm(subject: Subject) -> Finding:
    """Whether estimator, loss and aggregation go together, with their settings."""
    with quiet_imports():
        from hpo_verl.verl_plugin import validation as checks

    remarks: list[str] = []

    def look() -> str:
        remarks.extend(checks.check_algorithm(subject.config))
        checks.check_trainer_mode(subject.config)
        return (
            f"estimator {subject.get('algorithm.adv_estimator')}, "
            f"loss {subject.get(f'{ACTOR}.policy_loss.loss_mode')}, "
            f"{subject.get(f'{ACTOR}.loss_agg_mode')}"
        )

    fix = "see docs/pages/algorithms.md for what goes together"
    found = attempt("algorithm", look, fix)
    return warning("algorithm", "; ".join(remarks), fix) if remarks and found.ok else found


def check_with_verl(subject: Subject) -> Finding:
    """What verl's own validation says, and the sections of the guards."""
    with quiet_imports():
        from hpo_verl.verl_plugin import validation as checks

    def look() -> str:
        with quiet_imports():
            checks.check_guards(subject.config)
            checks.check_with_verl(subject.config)
        return "verl's own validation passes"

    return attempt("verl's checks", look, "correct the override it names")


def check_learnable(subject: Subject) -> Finding:
    """Whether an update would change the policy."""
    problems = list(_obstacles(subject))
    if problems:
        return _joined("learning", problems)
    batch, n = subject.get("data.train_batch_size"), subject.get(f"{ROLLOUT}.n")
    updates = batch // subject.get(MINI_BATCH, batch)
    return ok("learning", f"a step is {batch} prompts x {n} responses, {updates} updates")


def _joined(name: str, problems: list[tuple[str, str]]) -> Finding:
    return error(
        name,
        "; ".join(text for text, _ in problems),
        "; ".join(dict.fromkeys(fix for _, fix in problems)),
    )


def _compares_responses(estimator: str) -> bool:
    """Whether an estimator compares the responses to one prompt."""
    if estimator in GROUP_RELATIVE:
        return True
    from hpo_verl.algorithms.registry import OUR_ESTIMATORS

    ours = OUR_ESTIMATORS.get(estimator)
    return ours is not None and ours.history is None


def _obstacles(subject: Subject) -> Iterator[tuple[str, str]]:
    """Text and fix of everything that keeps the policy as it is."""
    estimator, n = subject.get("algorithm.adv_estimator"), subject.get(f"{ROLLOUT}.n", 1)
    greedy = list(_greedy(subject))
    # Only then, since the records load torch.
    if (n < 2 or greedy) and _compares_responses(estimator):
        if n < 2:
            yield (
                f"{ROLLOUT}.n={n}: the estimator {estimator} compares the responses to one prompt",
                f"{ROLLOUT}.n=8",
            )
        for key in greedy:
            yield (
                f"{key}: sampling is greedy, so the responses to one prompt are equal",
                f"{ROLLOUT}.temperature=1.0 {ROLLOUT}.top_k=-1",
            )
    for key in (f"{ACTOR}.optim.lr", f"{ACTOR}.grad_clip"):
        if subject.get(key) == 0:
            yield f"{key}=0: no update changes the policy", f"a {key} above 0"


def _greedy(subject: Subject) -> Iterator[str]:
    for key, greedy in (("temperature", 0), ("top_k", 1), ("top_p", 0)):
        value = subject.get(f"{ROLLOUT}.{key}")
        if value == greedy:
            yield f"{ROLLOUT}.{key}={value}"


def check_steps(subject: Subject) -> Finding:
    """Whether the run has a step in which the policy is updated."""
    steps = planned_steps(subject)
    if steps is None:
        return skipped("steps", "trainer.total_training_steps is not set; the data say how many")
    problems = []
    warmup = subject.get("trainer.critic_warmup", 0)
    if warmup > steps:
        problems.append(
            (
                f"trainer.critic_warmup={warmup}: the policy is first updated after it, and the "
                f"run has {steps} steps",
                "trainer.critic_warmup=0",
            )
        )
    done = steps_done(subject)
    if done is not None and done >= steps:
        problems.append(
            (
                f"{subject.checkpoint_folder}: its checkpoint is of step {done} of {steps}, so no "
                "step is left",
                "a larger trainer.total_training_steps, or trainer.resume_mode=disable",
            )
        )
    return _joined("steps", problems) if problems else ok("steps", f"{steps} steps")


def planned_steps(subject: Subject) -> int | None:
    """Steps of the run; None where that depends on data that are not there."""
    given = subject.get("trainer.total_training_steps")
    if given is not None:
        return given
    files = [path for key, path in subject.data_files if key == "data.train_files"]
    try:
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    except (OSError, ValueError):
        # The check of the files says why.
        return None
    return rows // subject.get("data.train_batch_size") * subject.get("trainer.total_epochs", 1)


def steps_done(subject: Subject) -> int | None:
    """Step of the checkpoint that the run would go on from; None without one."""
    if subject.get("trainer.resume_mode") != "auto":
        return None
    tracker = subject.checkpoint_folder / TRACKER
    try:
        text = tracker.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def check_lengths(subject: Subject) -> Finding:
    """Whether one response fits into what a card or a micro-batch may hold."""
    prompt, response = (
        subject.get("data.max_prompt_length"),
        subject.get("data.max_response_length"),
    )
    longest = prompt + response
    shown = f"{prompt} + {response} = {longest} tokens"
    key = f"{ACTOR}.ppo_max_token_len_per_gpu"
    limit = subject.get(key, 0) * subject.get(f"{ACTOR}.ulysses_sequence_parallel_size", 1)
    if subject.get(f"{ACTOR}.use_dynamic_bsz", False) and limit < longest:
        return error(
            "lengths",
            f"{key}={limit}: a prompt and its response may have {shown}",
            f"{key}={longest} or more",
        )
    key = f"{ROLLOUT}.max_model_len"
    limit = subject.get(key)
    if limit is not None and limit < longest:
        return error(
            "lengths",
            f"{key}={limit}: a prompt and its response may have {shown}",
            f"{key}={longest}, or null",
        )
    return ok("lengths", f"{shown} at most")
