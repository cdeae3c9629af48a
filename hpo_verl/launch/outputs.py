"""What a finished run leaves for its user: summary, picture and policy; `hpo-verl export`."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from data_prep.command import check_output, staging
from hpo_verl.checks.finding import one_line
from hpo_verl.checks.storage import nearest_existing
from hpo_verl.config.overrides import overridden_key, without_run_folder
from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.installed import package_versions
from hpo_verl.launch.manifest import CONFIG_NAME
from hpo_verl.launch.resume import METRICS_NAME
from hpo_verl.runs.checkpoints import FOLDER_NAME, SEAL, TRACKER, holds_checkpoints, step_folders
from hpo_verl.runs.files import write_atomically
from hpo_verl.runs.metrics import MetricsFile, measured
from hpo_verl.runs.quiet import quiet_imports

STEPS_KEY = "trainer.total_training_steps"
SUMMARY_NAME, CURVE_NAME, POLICY_NAME = "summary.json", "curve.png", "policy"
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#666666"
SIGNS = (("positive", GREEN), ("negative", ORANGE))


def shown_results(folder: Path, recipe: str, overrides: Sequence[str]) -> Iterator[str]:
    """What the user is told of a finished run: success rates, files, and a longer run."""
    summary = json.loads((folder / SUMMARY_NAME).read_text())
    before, after = summary["success_before"], summary["success_after"]
    of = measured(summary["validated_on"])
    rates = {"before": before, "after": after}
    known = [f"{rate:.1%} {when}" for when, rate in rates.items() if rate is not None]
    if known:
        yield f"success on held-out prompts{of}: {', '.join(known)}"
    if chances := summary["pass_at_k"]:
        shown = ", ".join(f"pass@{k} {chance:.1%}" for k, chance in chances.items())
        yield f"by the last validation: {shown}"
    yield f"picture: {folder / CURVE_NAME}"
    if (folder / POLICY_NAME).is_dir():
        yield f"policy:  {folder / POLICY_NAME}"
    kept = [text for text in without_run_folder(overrides) if overridden_key(text) != STEPS_KEY]
    steps = f"{STEPS_KEY}={5 * summary['steps']}"
    yield f"a longer run: hpo-verl train {shlex.join([recipe, *kept, steps])}"


def algorithm_name(config: DictConfig) -> str:
    """Name of the record with an estimator of ours, its loss and its aggregation.

    Otherwise estimator and, where it adds something, loss: `grpo`, `a_hpo+gspo`.
    """
    from hpo_verl.algorithms.registry import ALGORITHMS

    actor = config.actor_rollout_ref.actor
    estimator = str(config.algorithm.adv_estimator)
    loss = str(actor.policy_loss.loss_mode)
    selected = (estimator, loss, str(actor.get("loss_agg_mode")))
    for record in ALGORITHMS.values():
        ours = record.estimator.advantage is not None
        if ours and selected == (record.estimator.name, record.loss.name, record.loss_agg_mode):
            return record.name
    plain = loss in ("vanilla", estimator) or (loss == "hpo" and estimator.endswith("hpo"))
    return estimator if plain else f"{estimator}+{loss}"


def write_summary(
    folder: Path, config: DictConfig, metrics: MetricsFile, seconds: float
) -> dict[str, Any]:
    """Write `summary.json` and return what it holds; success rates are fractions, or null.

    `seconds` is the wall time from the start of verl's process.
    """
    steps, success = metrics.success()
    summary = {
        "algorithm": algorithm_name(config),
        "steps": metrics.rows[-1][0] if metrics.rows else 0,
        "seconds": round(seconds, 1),
        "success_before": success[0] if success and steps[0] == 0 else None,
        "success_after": success[-1] if success and steps[-1] > 0 else None,
        # Of the last validation; none where it had one response a prompt.
        "pass_at_k": {str(k): chances[-1] for k, (_, chances) in metrics.pass_at_k().items()},
        "validated_on": metrics.sources(),
        "versions": package_versions(),
        "seed": OmegaConf.select(config, "seed"),
    }
    write_atomically(folder / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    return summary


def draw_curve(folder: Path, metrics: MetricsFile, title: str) -> Path:
    """Draw `curve.png`: over steps, success and what explains it, as far as it was measured.

    That is pass@k, alpha, the signs of the advantages, length by sign, and entropy.
    """
    # Half a second that no run needs before its end.
    from matplotlib.figure import Figure

    held_out = f"held-out prompts{measured(metrics.sources())}"
    chances = [
        (f"pass@{k}", series, GREY, {"linestyle": style})
        for (k, series), style in zip(
            ((k, series) for k, series in metrics.pass_at_k().items() if k > 1),
            ("--", ":"),
            strict=False,
        )
    ]
    panels = {
        "success rate": [
            ("training batch", metrics.series("hpo/solve_rate"), BLUE, {"alpha": 0.5}),
            (held_out, metrics.success(), BLUE, {"marker": "o"}),
            *chances,
        ],
        "alpha": [("alpha", metrics.series("hpo/alpha"), PURPLE, {})],
        "share of responses": [
            (f"{sign} advantages", metrics.series(f"hpo/{sign}_fraction"), colour, {})
            for sign, colour in SIGNS
        ],
        "tokens": [
            (f"{sign} advantages", metrics.series(f"hpo/response_length_{sign}"), colour, {})
            for sign, colour in SIGNS
        ],
        "entropy": [("of a token", metrics.series("actor/entropy"), PURPLE, {})],
    }
    known = {
        label: lines
        for label, lines in panels.items()
        if any(steps for _, (steps, _), _, _ in lines) or label == "success rate"
    }
    figure = Figure(figsize=(7, 1 + 2 * len(known)), layout="constrained")
    rows = figure.subplots(len(known), 1, sharex=True, squeeze=False).flatten()
    for axes, (label, lines) in zip(rows, known.items(), strict=True):
        for name, series, colour, style in lines:
            axes.plot(*series, color=colour, label=name, **style)
        for text in axes.legend(loc="best", frameon=False).get_texts():
            text.set_parse_math(False)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label == "alpha":
            axes.set_ylim(-0.05, 1.05)
    rows[0].set_title(title, parse_math=False)
    rows[-1].set_xlabel("step")
    path, picture = folder / CURVE_NAME, io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(picture, dpi=150)
    write_atomically(path, picture.getvalue())
    return path


def _checkpoints_of(source: Path) -> Path:
    """Where checkpoints lie: in a folder, below it, or where a run's `config.yaml` says."""
    config = source / CONFIG_NAME
    places = [source, source / FOLDER_NAME]
    if config.is_file():
        try:
            named = OmegaConf.select(OmegaConf.load(config), "trainer.default_local_dir")
        except Exception as error:
            raise DataError(f"{config} cannot be read ({one_line(error)})") from error
        places += [Path(str(named)).expanduser()] if named else []
    for place in places:
        if holds_checkpoints(place):
            return place
    shown = " or ".join(map(str, dict.fromkeys(places)))
    raise DataError(f"{source}: no checkpoint (global_step_N) in {shown}")


def _last_checkpoint(source: Path) -> Path:
    """The newest whole checkpoint of a folder; of a run's, the newest that it had reached.

    Another start of the same experiment may have continued in the same folder.
    """
    folder = _checkpoints_of(source)
    tracker = folder / TRACKER
    noted = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    metrics = MetricsFile(source / METRICS_NAME)
    try:
        metrics.read_new()
    except Exception as error:
        raise DataError(f"{metrics.path} cannot be read ({one_line(error)})") from error
    last = metrics.rows[-1][0] if metrics.rows else None
    found = step_folders(folder)
    for step, path in found:
        whole = (path / SEAL).is_file() or noted == str(step)
        if whole and (last is None or step <= last):
            return path
    there = ", ".join(path.name for _, path in found) or "none"
    reached = "" if last is None else f" up to step {last}, the run's last"
    raise DataError(f"{folder} holds no whole checkpoint{reached}; there are: {there}")


def checkpoint_folder(source: Path) -> Path:
    """The folder with the actor's shards that a path means.

    Args:
        source: a run's folder, a checkpoints folder (both mean the last checkpoint),
            a `global_step_N` folder, or its `actor` folder.

    Raises:
        DataError: there is no checkpoint; names the folder and what it lacks.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    for folder in (source, source / "actor"):
        if (folder / "fsdp_config.json").is_file():
            return folder
    actor = _last_checkpoint(source) / "actor"
    if not (actor / "fsdp_config.json").is_file():
        raise DataError(f"{actor.parent} is no FSDP checkpoint: it has no actor/fsdp_config.json")
    return actor


def _shard_files(checkpoint: Path) -> list[Path]:
    """The model shards of all ranks."""
    settings = checkpoint / "fsdp_config.json"
    try:
        ranks = int(json.loads(settings.read_text())["world_size"])
        if ranks < 1:
            raise ValueError(f"world_size is {ranks}")
    except Exception as error:
        raise DataError(f"{settings} does not say how many ranks saved it") from error
    files = []
    for file in chain(
        [checkpoint / "huggingface" / "config.json"],
        (checkpoint / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)),
    ):
        if not file.is_file():
            raise DataError(f"{file} is missing; {settings.name} says {ranks} ranks")
        files.append(file)
    return files[1:]


def export(source: Path, target: Path) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder, in bfloat16.

    The source is that of `checkpoint_folder`, whose result is returned.

    Raises:
        DataError: no checkpoint, an incomplete one, or one that holds more than tensors; the
            target cannot be written.
        EnvironmentCheckError: the target exists; the disk or the memory is too small.
    """
    checkpoint = checkpoint_folder(source)
    shards = _shard_files(checkpoint)
    target = target.absolute()
    if target.exists():
        raise EnvironmentCheckError(f"{target} exists already; choose another folder")
    check_output(target)
    with quiet_imports():
        from hpo_verl.verl_plugin import merge

    disk, memory = merge.needed_bytes(shards)
    for what, free, needed in (
        (f"{target}: disk", shutil.disk_usage(nearest_existing(target)).free, disk),
        (f"{checkpoint}: memory", psutil.virtual_memory().available, memory),
    ):
        if free < needed:
            raise EnvironmentCheckError(f"{what}: {free >> 20} MiB free; need {needed >> 20} MiB")
    with staging(target.parent) as temporary:
        partial = temporary / POLICY_NAME
        partial.mkdir()
        merge.merge(checkpoint, partial)
        os.replace(partial, target)
    return checkpoint


def make_policy(folder: Path, announce: Callable[[str], None]) -> Path | None:
    """Make `policy/` of a finished run, of its last checkpoint; an older one is removed.

    No error here fails the run, whose checkpoint can be exported later: `announce` is told why, and
    the command that makes it. Returns the folder, or None where none was made.
    """
    target = folder / POLICY_NAME
    shutil.rmtree(target, ignore_errors=True)
    try:
        _checkpoints_of(folder)
    except DataError:
        return None
    try:
        export(folder, target)
    except Exception as error:
        later = shlex.join(["hpo-verl", "export", str(folder), "--out", POLICY_NAME])
        announce(f"no {POLICY_NAME}/: {error}; later: {later}")
        return None
    return target
