"""What a finished run leaves for its user: a summary and a picture; the policy: `export`."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.installed import package_versions
from hpo_verl.launch.export import POLICY_NAME
from hpo_verl.runs.files import write_atomically
from hpo_verl.runs.metrics import MetricsFile

SUMMARY_NAME, CURVE_NAME = "summary.json", "curve.png"
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def shown_results(folder: Path, recipe: str, overrides: Sequence[str]) -> Iterator[str]:
    """What the user is told of a finished run: success rates, files, and a longer run."""
    summary = json.loads((folder / SUMMARY_NAME).read_text())
    before, after = summary["success_before"], summary["success_after"]
    if before is not None and after is not None:
        yield f"success on held-out puzzles: {before:.1%} before, {after:.1%} after"
    yield f"picture: {folder / CURVE_NAME}"
    if (folder / POLICY_NAME).is_dir():
        yield f"policy:  {folder / POLICY_NAME}"
    changed = ("total_training_steps", "hydra.run.dir")
    kept = [text for text in overrides if not any(key in text for key in changed)]
    steps = f"trainer.total_training_steps={5 * summary['steps']}"
    yield f"a longer run: hpo-verl train {shlex.join([recipe, *kept, steps])}"


def algorithm_name(config: DictConfig) -> str:
    """Estimator and, where it adds something, loss: `a_hpo`, `grpo`, `a_hpo+gspo`."""
    estimator = str(config.algorithm.adv_estimator)
    loss = str(config.actor_rollout_ref.actor.policy_loss.loss_mode)
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
        "success_after": success[-1] if len(success) > 1 else None,
        "versions": package_versions(),
        "seed": OmegaConf.select(config, "seed"),
    }
    write_atomically(folder / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    return summary


def draw_curve(folder: Path, metrics: MetricsFile, title: str) -> Path:
    """Draw `curve.png`: success rate, alpha and the signs of the advantages over steps."""
    # Half a second that no run needs before its end.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(*metrics.series("hpo/solve_rate"), color=BLUE, alpha=0.5, label="training batch")
    top.plot(*metrics.success(), color=BLUE, marker="o", label="held-out puzzles")
    top.set_ylabel("success rate")
    top.set_title(title)
    middle.plot(*metrics.series("hpo/alpha"), color=PURPLE, label="alpha")
    middle.set_ylabel("alpha")
    middle.set_ylim(-0.05, 1.05)
    for sign, colour in (("positive", GREEN), ("negative", ORANGE)):
        steps, share = metrics.series(f"hpo/{sign}_fraction")
        bottom.plot(steps, share, color=colour, label=f"{sign} advantages")
    bottom.set_ylabel("share of responses")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.legend(loc="best", frameon=False)
        axes.grid(alpha=0.3)
    path, picture = folder / CURVE_NAME, io.BytesIO()
    figure.savefig(picture, dpi=150)
    write_atomically(path, picture.getvalue())
    return path
