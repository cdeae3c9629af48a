"""Results of the lab without a run."""

import math
from itertools import product

import pandas as pd

from hpo_verl.config.studies import CROSSED, read_study_file, regimes
from hpo_verl.report.studies import Result

STEPS = 4
RIGHT_LENGTH = 10.0


def made_up_result(cell, success, status="finished", tuning=False, **columns):
    """A result with the given learning curve, one measurement per step; more columns by name."""
    steps = len(success)
    rows = pd.DataFrame({"step": range(steps), "success": success}, dtype=float)
    for name in ("alpha", "solve_rate", "entropy", "response_length"):
        rows[name] = [math.nan, *(0.5 + 0.1 * i for i in range(1, steps))]
    rows["response_length_right"] = [math.nan] + [RIGHT_LENGTH] * (steps - 1)
    ratio = 1.0 if cell["wrong_length"] is None else 0.9 * cell["wrong_length"]
    rows["response_length_wrong"] = ratio * rows["response_length_right"]
    rows["responses_sampled"] = [math.nan, *(512.0 * i for i in range(1, steps))]
    for name, values in columns.items():
        rows[name] = values
    environment = {
        "commit": "abc", "versions": '{"torch": "2"}', "machine": "test", "finished": "now"
    }  # fmt: skip
    facts = {
        "cell": cell, "tuning": tuning, "status": status, "seconds": 36.0,
        "warm_start_success": success[0], "environment": environment,
    }  # fmt: skip
    return Result(facts, rows)


def made_up_cells(study, variants=None, seeds=range(5), **changes):
    """Cells of a study: its file's values, except where a change names other ones by dotted key."""
    overrides = [f"{key}={_written(value)}" for key, value in changes.items()]
    values = read_study_file(study, overrides)
    for seed, regime, name in product(seeds, regimes(values), variants or values["variants"]):
        known = values["variants"].get(name, {"algorithm": name})
        yield {
            "study": study,
            **{key: regime[key] for key in CROSSED},
            "variant": name,
            "algorithm": known["algorithm"],
            "settings": known.get("settings", {}),
            "seed": seed,
            "training": {
                key.removeprefix("training."): value
                for key, value in regime.items()
                if key.startswith("training.")
            },
            "evaluation": values["evaluation"],
            "policy": values["policy"],
        }


def made_up_results(study, gain, variants=None, seeds=range(5), **changes):
    """Success rises by `gain(cell)` per step from 0.1, and differs by 0.01 from seed to seed."""
    tuning_seeds = read_study_file(study)["tuning_seeds"]
    return [
        made_up_result(
            cell,
            [0.1 + 0.01 * cell["seed"] + gain(cell) * step for step in range(STEPS + 1)],
            tuning=cell["seed"] < tuning_seeds,
        )
        for cell in made_up_cells(study, variants, seeds, **changes)
    ]


def _written(value):
    return "null" if value is None else str(value).replace("None", "null").replace(" ", "")
