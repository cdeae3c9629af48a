"""Packing a mini-batch, and splitting it over micro-batches and ranks, changes nothing.

The packed path is that of a GPU, flash attention and its cross-entropy, with these two replaced
by the stand-in of `helpers/flash_attn_cpu`; what it is compared with is verl's padded one.
"""

import pytest
import torch
from engine_ranks import free_port, run_ranks, save_tiny_model

from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.core.statistics import token_means

SPLITS = [
    *((1, 1), (1, 2), (1, 8), (1, "tokens")),
    *((2, 2), (2, 4), (2, 8), (2, "tokens")),
]
OURS = [(name, mode) for name, loss in OUR_LOSSES.items() for mode in loss.aggregations]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    save_tiny_model(folder)
    run_ranks("engine_split_worker.py", folder, free_port(), free_port())
    return folder


@pytest.fixture(scope="module")
def results(folder):
    # Written by the worker, in a folder of this test.
    return {
        ranks: torch.load(folder / f"{name}.pt", weights_only=False)
        for ranks, name in ((0, "padded"), ("0, flash", "unpadded"), (1, "one"), (2, "two"))
    }


@pytest.mark.parametrize(("name", "mode"), OURS)
@pytest.mark.parametrize(("ranks", "parts"), SPLITS)
def test_gradients_and_statistics_equal_those_of_one_padded_piece(
    results, name, mode, ranks, parts
):
    gradients, sums, _ = results[0][name, mode, 1]
    split_gradients, split_sums, _ = results[ranks][name, mode, parts]
    assert set(gradients) == set(split_gradients)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 0
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            split_gradients[key], gradient, rtol=1e-6, atol=1e-6 * largest, msg=key
        )
    assert token_means(split_sums) == pytest.approx(token_means(sums), rel=1e-6)


def test_the_statistics_are_those_of_the_batch(results):
    # Rows 1, 3, 7 are positive, 0, 2, 4, 6 negative; row 5 is padding; a third lose a token.
    _, sums, _ = results[0]["hpo", "token-mean", 1]
    lengths = [2 + (5 * row) % 7 - (row % 3 == 0) for row in range(8)]
    assert sums["tokens_positive"] == sum(lengths[row] for row in (1, 3, 7))
    assert sums["tokens_negative"] == sum(lengths[row] for row in (0, 2, 4, 6))
    assert sums["gradient_positive"] > 0 < sums["gradient_negative"]


def test_the_clip_bounds_of_bapo_are_those_of_the_whole_mini_batch(results):
    _, _, bounds = results[0]["bapo", "token-mean", 1]
    assert bounds == {
        "actor/bapo_low": [0.6],
        "actor/bapo_high": [pytest.approx(bounds["actor/bapo_high"][0])],
        "actor/bapo_positive_share": [pytest.approx(0.77, abs=0.01)],
    }
    # Found on the way: neither the first nor the last.
    assert 1.0 < bounds["actor/bapo_high"][0] < 3.0
    for ranks, parts in SPLITS:
        split = results[ranks]["bapo", "token-mean", parts][2]
        assert split["actor/bapo_high"] == bounds["actor/bapo_high"]
        assert split["actor/bapo_low"] == bounds["actor/bapo_low"]
        share = bounds["actor/bapo_positive_share"][0]
        assert split["actor/bapo_positive_share"] == [pytest.approx(share, rel=1e-5)]
    assert results[0]["hpo", "token-mean", 1][2] == {}


def test_capo_leaves_out_the_same_tokens_whatever_the_split(results):
    """Tied weights: Adam's moments are those of head and embedding, sharded over the ranks."""
    expected = results[0]["capo", "seq-mean-token-mean", 1][2]
    assert set(expected) == {f"actor/curvature_{one}" for one in ("masked", "hessian", "fisher")}
    assert 0.1 < expected["actor/curvature_masked"][0] < 0.9
    for ranks, parts in SPLITS:
        split = results[ranks]["capo", "seq-mean-token-mean", parts][2]
        for key, values in expected.items():
            assert split[key] == pytest.approx(values, rel=1e-4), key


def test_machines_with_a_copy_each_have_the_gradients_of_one(folder, results):
    """`fsdp_size` below the number of ranks, as in hardware=2x8gpu."""
    expected, _, _ = results[0]["hpo", "token-mean", 1]
    norm = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt()
    for rank in (0, 1):
        names, shape, gradients, found = torch.load(folder / f"copies{rank}.pt", weights_only=False)
        assert (names, shape) == (("ddp", "fsdp"), (2, 1))
        assert set(gradients) == set(expected)
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-7, msg=key)
        assert found == pytest.approx(norm.item(), rel=1e-5)


def test_log_probabilities_and_entropies_equal_the_padded_ones(results):
    assert set(results[0]["outputs"]) == {"log_probs", "entropy"}
    for ranks, rows in (("0, flash", range(8)), (1, range(8)), (2, range(4))):
        for name, expected in results[0]["outputs"].items():
            # The last place predicts what follows the response, which nobody asks for.
            packed = [row[:-1] for row in results[ranks]["outputs"][name]]
            padded = [expected[row][:-1] for row in rows]
            torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6, msg=name)


def test_the_packed_path_went_through_flash_attention(results):
    assert results[0]["calls"] == {}
    assert set(results["0, flash"]["calls"]) == {"flash_attn_varlen_func"}
    for ranks in (1, 2):
        # Whole micro-batches, and those of a single sequence, which transformers does not pack.
        assert results[ranks]["calls"]["flash_attn_varlen_func"] > 0
        assert results[ranks]["calls"]["flash_attn_func"] > 0
