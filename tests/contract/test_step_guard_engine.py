"""The guard of updates with verl's own FSDP2 engine and Adam, on two ranks."""

import re

import pytest
import torch
from engine_ranks import free_port, run_ranks, save_tiny_model

from hpo_verl.algorithms.registry import ALGORITHMS
from hpo_verl.verl_plugin.engine.replay import first_found, load, report
from hpo_verl.verl_plugin.engine.step_guard import NO_ADVANTAGE, NOT_FINITE

LOSSES = {one.loss.name: None for one in ALGORITHMS.values()}
LOG_PROB = r"log_prob: 1 of \d live values are not finite, the first at \(1, 1\) \(nan\)"
ADVANTAGES = r"advantages: 1 of \d live values are not finite, the first at \(1, 1\) \(nan\)"
# Case, in the worker's order -> rank that found it, and what is named.
NAMED = {
    "advantages": (1, rf"micro-batch 1: {ADVANTAGES}"),
    "old_log_prob": (0, r"micro-batch 1: old_log_prob: 1 of 7 .* the first at \(1, 2\) \(inf\)"),
    "log_prob": (1, f"micro-batch 1: {LOG_PROB}"),
    "loss": (1, "micro-batch 0: loss: inf"),
    "gradient": (0, r"gradient of model.embed_tokens.weight: .* the last model.norm.weight"),
    **{
        f"{kind} {name}": (1, f"micro-batch 1: {text}")
        for name in LOSSES
        for kind, text in (("bad", ADVANTAGES), ("log_prob", LOG_PROB))
    },
}
MADE = [
    *("first", "finite again", "between", "an advantage on one rank", "no advantage, entropy"),
    *(f"good {name}" for name in LOSSES),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    save_tiny_model(folder)
    run_ranks("step_guard_worker.py", folder, free_port())
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    # Written by the worker, in a folder of this test.
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def files(folder):
    """The rank and the file of each update that was not finite, in order."""
    names = sorted(path.name for path in folder.glob("not_finite_*"))
    # Twenty, and that of the update that ended the run, the fifth after those of `NAMED`.
    numbers = [*range(1, 21), len(NAMED) + 5]
    assert [name[:15] for name in names] == [f"not_finite_{number:04d}" for number in numbers]
    return [(int(name[len("not_finite_0001_rank")]), folder / name) for name in names]


@pytest.mark.parametrize("case", NAMED)
def test_no_state_changes_where_anything_is_not_finite(ranks, case):
    for results in ranks:
        unchanged, metrics = results[case]
        assert unchanged
        # Those of the update itself are left out, on all ranks alike.
        assert metrics == {NOT_FINITE: [1.0], NO_ADVANTAGE: [0.0]}


@pytest.mark.parametrize("case", MADE)
def test_every_other_update_is_made(ranks, case):
    for results in ranks:
        unchanged, metrics = results[case]
        assert not unchanged
        assert (metrics[NOT_FINITE], metrics[NO_ADVANTAGE]) == ([0.0], [0.0])
        assert "actor/pg_loss" in metrics
        assert metrics["grad_norm"] < 10


def test_without_an_advantage_on_any_rank_no_state_changes(ranks):
    for results in ranks:
        unchanged, metrics = results["no advantage"]
        assert unchanged
        assert (metrics[NOT_FINITE], metrics[NO_ADVANTAGE]) == ([0.0], [1.0])
        assert metrics["grad_norm"] == 0.0


def test_verl_alone_moves_the_weights_without_an_advantage(ranks):
    """By Adam's momentum; what the guard is for."""
    for results in ranks:
        unchanged, metrics = results["unguarded"]
        assert not unchanged
        assert metrics["grad_norm"] == 0.0


def test_the_first_tensor_is_named_in_a_file_of_the_rank_that_found_it(files):
    for (rank, path), (case, (expected, text)) in zip(files[:-1], NAMED.items(), strict=False):
        assert rank == expected, case
        found = load(path)["found"]
        assert re.fullmatch(rf"{text}.* \(rank {rank} of 2\)", found), (case, found)


def test_a_replay_finds_the_same_again(files):
    for (_, path), (case, (_, text)) in zip(files[:-1], NAMED.items(), strict=False):
        batch = load(path)
        found = first_found(batch)
        if case == "gradient":
            assert found is None
            assert "arose in the model's backward pass" in "\n".join(report(path))
        else:
            assert re.match(text, found), case
            assert batch["found"].startswith(found)


def test_a_finite_update_starts_the_count_anew_and_three_in_a_row_end_the_run(ranks, files):
    for results in ranks:
        for case in ("row 1", "row 2", "new row 1", "new row 2"):
            assert results[case] == (True, {NOT_FINITE: [1.0], NO_ADVANTAGE: [0.0]})
        unchanged, metrics = results["new row 3"]
        assert unchanged
        message = metrics["error"]
        assert message.startswith("3 updates in a row were not finite (trainer.guard.max_not_")
        assert "micro-batch 1: advantages: 1 of 7 live values are not finite" in message
        assert message.endswith(f"mini-batch: {files[-1][1]}; see hpo-verl replay")
