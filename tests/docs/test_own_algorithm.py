"""The page on one's own algorithm, followed to the letter in a copy of the repository."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "own-algorithm.md"
PAPER = "[2601.00001](https://arxiv.org/abs/2601.00001)"
ROW = f"| `mine` | {PAPER} | `grpo` | `mine` | `token-mean` | `mine.py` |\n"
RECORDS = "tests/algorithms/test_records.py"


def test_three_files_one_word_and_one_row_pass_the_shared_tests(tmp_path):
    for folder in ("hpo_verl", "recipes/algo", "docs/pages", "tests/algorithms", "tests/helpers"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    files = re.findall(r' title="(\S+)"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert len(files) == 3
    for name, text in files:
        (tmp_path / name).write_text(textwrap.dedent(text))
    registry = tmp_path / "hpo_verl" / "algorithms" / "registry.py"
    registry.write_text(registry.read_text().replace("MODULES = (", 'MODULES = ("mine", '))
    table = tmp_path / "docs" / "pages" / "algorithms.md"
    table.write_text(table.read_text().replace("|---|\n", f"|---|\n{ROW}", 1))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "tests/algorithms/test_mine.py", RECORDS],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    for test in ("slopes_are_those_of_the_equation_by_autograd", "the_recipe_selects_what"):
        assert re.search(rf"{test}.*\[mine\] PASSED", run.stdout)
