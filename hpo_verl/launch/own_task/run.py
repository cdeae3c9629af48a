"""Rows, recipe, training and result from Python."""

import json
from pathlib import Path

from data_prep.rows import main as make_rows
from hpo_verl.launch.train import train

FOLDER = Path(__file__).resolve().parent
PAIRS = [(a, b) for a in range(1, 16) for b in range(1, 16) if a != b]


def main() -> None:
    """Train on pairs of numbers up to 15, and say what came of it."""
    rows, data = FOLDER / "more.jsonl", FOLDER / "more"
    questions = [{"question": f"{a} {b}", "answer": str(max(a, b))} for a, b in PAIRS]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in questions))
    make_rows([str(rows), "--val-size", "40", "--out", str(data)])
    # As behind the command.
    settings = {"data.train_files": data / "train.parquet", "data.val_files": data / "val.parquet"}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    run = train(str(FOLDER / "recipe.yaml"), overrides)
    summary = json.loads((run / "summary.json").read_text())
    print(f"{summary['success_before']:.1%} before, {summary['success_after']:.1%} after: {run}")


if __name__ == "__main__":
    main()
