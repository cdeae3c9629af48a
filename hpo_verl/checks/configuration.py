"""Whether the settings are legal together, and whether a run would learn anything."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pyarrow.parquet as pq

from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.packages import MODULES
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.values import MINI_BATCH
from hpo_verl.config.overrides import nearest
from hpo_verl.config.settings import ACTOR, ROLLOUT
from hpo_verl.runs.checkpoints import TRACKER
from hpo_verl.runs.quiet import quiet_imports

# Estimators of verl that compare the responses to one prompt, and of which there is no record.
GROUP_RELATIVE = (
    *("grpo_vectorized", "grpo_passk", "gdpo", "rloo_vectorized", "gpg"),
    *("reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
)
REF = "actor_rollout_ref.ref"


def check_recipe(run: PlannedRun) -> Finding:
    """Whether the recipe composes and resolves."""
    if run.on_cpu:
        # Before verl is imported.
        os.environ["VERL_PLATFORM"] = "cpu"
    return ok("it composes")


def check_names(run: PlannedRun) -> Finding:
    """Whether verl knows the estimator, loss, trainer mode, reward manager and rollout."""
    with quiet_imports():
        from hpo_verl.verl_plugin.registered import selected

        chosen = selected(run.config)
    unknown = [
        f"{key}={name}: not registered with verl; {nearest(name, known)}"
        for key, name, known in chosen
        # What verl knows and could not import here is the finding of another check.
        if name not in known and name not in MODULES.get(key, ())
    ]
    if unknown:
        fix = "correct the override, or load the package that registers it"
        return error("; ".join(unknown), fix)
    return ok(", ".join(f"{key.rsplit('.', 1)[-1]} {name}" for key, name, _ in chosen))


def check_algorithm(run: PlannedRun) -> Finding:
    """Whether estimator, loss and aggregation go together, with their settings."""
    with quiet_imports():
        from hpo_verl.verl_plugin import run_validation, validation

    remarks = validation.check_algorithm(run.config)
    validation.check_trainer_mode(run.config)
    run_validation.check_sampling(run.config)
    if remarks:
        return warning("; ".join(remarks), "see docs/pages/algorithms.md")
    return ok(
        f"estimator {run.get('algorithm.adv_estimator')}, "
        f"loss {run.get(f'{ACTOR}.policy_loss.loss_mode')}, {run.get(f'{ACTOR}.loss_agg_mode')}"
    )


def check_with_verl(run: PlannedRun) -> Finding:
    """What verl's own validation says, and the sections of the guards."""
    with quiet_imports():
        from hpo_verl.verl_plugin import run_validation

        run_validation.check_guards(run.config)
        run_validation.check_with_verl(run.config)
    return ok("verl's own validation passes")


def check_learnable(run: PlannedRun) -> list[Finding]:
    """Whether an update would change the policy."""
    batch, n = run.get("data.train_batch_size"), run.get(f"{ROLLOUT}.n")
    updates = batch // run.get(MINI_BATCH, batch)
    fine = ok(f"a step is {batch} prompts x {n} responses, {updates} updates")
    return list(_obstacles(run)) or [fine]


def _obstacles(run: PlannedRun) -> Iterator[Finding]:
    """Everything that keeps the policy as it is."""
    estimator, n = run.get("algorithm.adv_estimator"), run.get(f"{ROLLOUT}.n")
    greedy = [
        f"{ROLLOUT}.{key}={value}"
        for key, one in (("temperature", 0), ("top_k", 1), ("top_p", 0))
        if (value := run.get(f"{ROLLOUT}.{key}")) == one
    ]
    if (n < 2 or greedy) and is_group_relative(estimator):
        if n < 2:
            text = f"{ROLLOUT}.n={n}: the estimator {estimator} compares the responses to one"
            yield error(f"{text} prompt", f"{ROLLOUT}.n=8")
        for setting in greedy:
            text = f"{setting}: sampling is greedy, so the responses to one prompt are equal"
            yield error(text, f"{ROLLOUT}.temperature=1.0 {ROLLOUT}.top_k=-1")
    for key in (f"{ACTOR}.optim.lr", f"{ACTOR}.grad_clip"):
        if run.get(key) == 0:
            yield error(f"{key}=0: no update changes the policy", f"a {key} above 0")


def is_group_relative(estimator: str) -> bool:
    """Whether an estimator compares the responses to one prompt; False where nobody knows."""
    if estimator in GROUP_RELATIVE:
        return True
    from hpo_verl.algorithms.registry import ESTIMATORS

    record = ESTIMATORS.get(estimator)
    return record is not None and record.compares and record.history is None


def check_steps(run: PlannedRun) -> Finding:
    """Whether the run has a step in which the policy is updated."""
    steps, done, possible = planned_steps(run), steps_done(run), steps_of_data(run)
    if steps is None:
        return skipped("trainer.total_training_steps is not set; the data say how many")
    if possible is not None and 0 < possible < steps:
        # verl's loop ends there, and neither saves nor validates as it does after its last step.
        # It counts an epoch's steps by the rows, also for a sampler without end, as SPO's is.
        epochs = run.get("trainer.total_epochs")
        text = f"trainer.total_training_steps={steps}: trainer.total_epochs={epochs} over the data"
        fix = f"trainer.total_training_steps={possible}, or more epochs or data"
        return error(f"{text} give {possible} steps", fix)
    if (warmup := run.get("trainer.critic_warmup", 0)) > steps:
        text = f"trainer.critic_warmup={warmup}: the policy is first updated after it, and the run"
        return error(f"{text} has {steps} steps", "trainer.critic_warmup=0")
    if done and done >= steps:
        text = f"{run.checkpoint_folder}: its checkpoint is of step {done} of {steps}, so no step"
        fix = "a larger trainer.total_training_steps, or trainer.resume_mode=disable"
        return error(f"{text} is left", fix)
    return ok(f"{steps} steps")


def planned_steps(run: PlannedRun) -> int | None:
    """Steps of the run; None where that depends on data that are not there."""
    return run.get("trainer.total_training_steps") or steps_of_data(run)


def steps_of_data(run: PlannedRun) -> int | None:
    """Steps of `trainer.total_epochs` over the training data; None where these are not there."""
    if run.get("data.custom_cls.path"):
        # How many rows a dataset of one's own has, only it knows.
        return None
    files = [path for key, path in run.data_files if key == "data.train_files"]
    try:
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    except (OSError, ValueError):
        # The check of the files says why.
        return None
    per_epoch = trained_rows(run, rows) // run.get("data.train_batch_size")
    return per_epoch * run.get("trainer.total_epochs", 1)


def rows_needed(run: PlannedRun) -> int:
    """Rows that the training data must have, so that the epochs give all steps."""
    epochs = run.get("trainer.total_epochs", 1)
    steps = run.get("trainer.total_training_steps", epochs)
    return run.get("data.train_batch_size") * math.ceil(steps / epochs)


def trained_rows(run: PlannedRun, rows: int) -> int:
    """Rows that verl trains on, of so many in the files."""
    most = run.get("data.train_max_samples", -1)
    return min(rows, most) if most > 0 else rows


def check_records(run: PlannedRun) -> list[Finding]:
    """Whether the run leaves what summary, picture, policy and `--resume` need."""
    loggers = run.get("trainer.logger", [])
    found = []
    if run.get("trainer.val_only", False):
        text = "trainer.val_only=true: verl validates and ends, without a step and a policy"
        found.append(warning(text, "trainer.val_only=false"))
    if "file" not in ([loggers] if isinstance(loggers, str) else loggers):
        text = f"trainer.logger={loggers}: without file there are no metrics, summary and picture"
        found.append(warning(text, "add file"))
    if run.get("trainer.save_freq", -1) < 1:
        text = "trainer.save_freq: no checkpoint is saved, and no policy"
        found.append(warning(text, "trainer.save_freq=N"))
    if run.get("trainer.test_freq", -1) < 1:
        text = "trainer.test_freq: nothing is validated during and after training"
        found.append(warning(text, "trainer.test_freq=N"))
    return found or [ok("metrics, checkpoints and validations")]


def steps_done(run: PlannedRun) -> int:
    """Step of the checkpoint that the run would continue from; 0 without one."""
    try:
        text = (run.checkpoint_folder / TRACKER).read_text(errors="replace").strip()
    except OSError:
        text = ""
    found = run.get("trainer.resume_mode") == "auto" and text.isdecimal()
    return int(text) if found else 0


def check_lengths(run: PlannedRun) -> Finding:
    """Whether one response fits into what a card or a micro-batch may hold."""
    prompt, response = run.get("data.max_prompt_length"), run.get("data.max_response_length")
    shown = f"{prompt} + {response} = {run.longest} tokens"
    limits = {}
    with_reference = run.get(f"{ACTOR}.use_kl_loss") or run.get("algorithm.use_kl_in_reward")
    split = run.get(f"{ACTOR}.ulysses_sequence_parallel_size", 1)
    for part, name, dynamic in (
        (ACTOR, "ppo_max_token_len_per_gpu", "use_dynamic_bsz"),
        (ROLLOUT, "log_prob_max_token_len_per_gpu", "log_prob_use_dynamic_bsz"),
        (REF, "log_prob_max_token_len_per_gpu", "log_prob_use_dynamic_bsz"),
    ):
        used = part != REF or with_reference
        if used and run.get(f"{part}.{dynamic}") and (limit := run.get(f"{part}.{name}")):
            limits[f"{part}.{name}"] = (limit * split, "more")
    limits[f"{ROLLOUT}.max_model_len"] = (run.get(f"{ROLLOUT}.max_model_len"), "null")
    for key, (limit, other) in limits.items():
        if limit is not None and limit < run.longest:
            text = f"{key}={limit}: a prompt and its response may have {shown}"
            return error(text, f"{key}={run.longest} or {other}")
    return ok(f"{shown} at most")
