"""Whether the settings are legal together, and whether a run would learn anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from hpo_verl.doctor.finding import Finding, attempt, error, ok, warning
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import HpoVerlError
from hpo_verl.launch import checks
from hpo_verl.launch.checkpoints import TRACKER
from hpo_verl.launch.quiet import quiet_imports

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
# Every other estimator of verl and of ours compares the responses to one prompt. (spo: 2509.13232)
WITHOUT_GROUPS = ("gae", "reinforce_plus_plus", "remax", "spo")


def check_configuration(subject: Subject) -> list[Finding]:
    """Types and ranges, the algorithm's combinations, verl's own validation, and learning."""
    settings = attempt("settings", lambda: _numbers(subject), "correct the override")
    if settings.status == "error":
        return [settings]
    return [settings, *_with_verl(subject), check_learnable(subject), check_lengths(subject)]


def _numbers(subject: Subject) -> str:
    checks.check_numbers(subject.config)
    return "types and ranges of the settings that are changed most"


def _with_verl(subject: Subject) -> list[Finding]:
    """What needs verl: the estimator, loss and aggregation together, and verl's dataclasses."""
    fix = "see hpo_verl/algorithms/README.md for what goes together"
    try:
        with quiet_imports():
            from hpo_verl.verl_plugin.checks import check_algorithm
            from hpo_verl.verl_plugin.preflight import check_with_verl

            remarks = check_algorithm(subject.config)
    except HpoVerlError as problem:
        return [error("algorithm", str(problem), fix)]
    policy_loss = subject.get(f"{ACTOR}.policy_loss.loss_mode")
    together = (
        f"estimator {subject.get('algorithm.adv_estimator')}, loss {policy_loss}, "
        f"{subject.get(f'{ACTOR}.loss_agg_mode')}"
    )
    algorithm = (
        warning("algorithm", "; ".join(remarks), fix) if remarks else ok("algorithm", together)
    )

    def validate() -> str:
        with quiet_imports():
            check_with_verl(subject.config)
        return "verl's own validation passes"

    return [algorithm, attempt("verl's checks", validate, "correct the override it names")]


def check_learnable(subject: Subject) -> Finding:
    """Whether any update would change the policy."""
    problems = list(_obstacles(subject))
    if problems:
        return error(
            "learning",
            "; ".join(text for text, _ in problems),
            "; ".join(dict.fromkeys(fix for _, fix in problems)),
        )
    steps, batch = planned_steps(subject), subject.get("data.train_batch_size")
    updates = batch // subject.get(f"{ACTOR}.ppo_mini_batch_size")
    return ok(
        "learning",
        f"{steps if steps is not None else 'an unknown number of'} steps of {batch} prompts x "
        f"{subject.get(f'{ROLLOUT}.n')} responses, {updates} updates each",
    )


def _obstacles(subject: Subject) -> Iterator[tuple[str, str]]:
    """Text and fix of everything that keeps the policy as it is."""
    estimator, n = subject.get("algorithm.adv_estimator"), subject.get(f"{ROLLOUT}.n", 1)
    if estimator not in WITHOUT_GROUPS:
        if n < 2:
            yield (
                f"{ROLLOUT}.n={n}: the estimator {estimator} compares the responses to one prompt",
                f"{ROLLOUT}.n=8",
            )
        for key in _greedy(subject):
            yield (
                f"{key}: sampling is greedy, so the responses to one prompt are equal",
                f"{ROLLOUT}.temperature=1.0 {ROLLOUT}.top_k=-1",
            )
    for key in (f"{ACTOR}.optim.lr", f"{ACTOR}.grad_clip"):
        if subject.get(key) == 0:
            yield f"{key}=0: no update changes the policy", f"a {key} above 0"
    steps = planned_steps(subject)
    if steps is None:
        return
    if steps < 1:
        yield (
            "trainer.total_epochs and the training data give 0 steps: the data hold fewer "
            f"than data.train_batch_size={subject.get('data.train_batch_size')} rows",
            "a smaller data.train_batch_size or more data",
        )
    warmup = subject.get("trainer.critic_warmup", 0)
    if warmup > steps >= 1:
        yield (
            f"trainer.critic_warmup={warmup}: the policy is first updated after it, and the run "
            f"has {steps} steps",
            "trainer.critic_warmup=0",
        )
    done = steps_done(subject)
    if done is not None and done >= steps >= 1:
        yield (
            f"{subject.checkpoint_folder}: its checkpoint is of step {done} of {steps}, so no "
            "step is left",
            "a larger trainer.total_training_steps, or trainer.resume_mode=disable",
        )


def _greedy(subject: Subject) -> Iterator[str]:
    for key, greedy in (("temperature", 0), ("top_k", 1), ("top_p", 0)):
        value = subject.get(f"{ROLLOUT}.{key}")
        if value == greedy:
            yield f"{ROLLOUT}.{key}={value}"


def planned_steps(subject: Subject) -> int | None:
    """Steps of the run; None where that depends on data that are not there."""
    given = subject.get("trainer.total_training_steps")
    if given is not None:
        return given
    rows = 0
    for key, path in checks.data_files(subject.config):
        if key == "data.train_files":
            if not path.is_file():
                return None
            rows += _rows(path)
    return rows // subject.get("data.train_batch_size") * subject.get("trainer.total_epochs", 1)


def _rows(path: Path) -> int:
    try:
        return pq.ParquetFile(path).metadata.num_rows
    except Exception:
        # A broken file is the finding of another check.
        return 0


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
