"""Scores of objectives on verl's engine: the same over micro-batches, shards and copies."""

import pytest
import torch
from engine_ranks import free_port, run_ranks, save_tiny_model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    save_tiny_model(folder)
    run_ranks("objectives_worker.py", folder, free_port(), free_port())
    names = ("alone0", "shards0", "shards1", "copies0", "copies1")
    # Written by the worker, in a folder of this test.
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}


def test_scores_do_not_depend_on_the_split(results):
    for layers in ("one", "all"):
        expected, _ = results["alone0"][layers, 8]
        assert set(expected) == {"mixed", "flat"}
        assert expected["mixed"][0] != 0
        for of_split in results.values():
            for key, found in of_split.items():
                if key[0] == layers:
                    for name, (score,) in found[0].items():
                        assert score == pytest.approx(expected[name][0], rel=1e-5), key


def test_the_scores_are_the_inner_products_of_the_gradients(results):
    """One objective is that of the update itself, so its gradient is known."""
    whole = results["alone0"]["all", 8][0]
    layer = results["alone0"]["one", 8][0]
    plain = results["alone0"]["plain"][1]
    square = sum(float(g.double().square().sum()) for g in plain.values())
    inside = sum(float(g.double().square().sum()) for n, g in plain.items() if ".layers.0." in n)
    assert 0 < inside < square
    # s_mixed + s_flat = |g_mixed + g_flat|^2, and s_mixed = |g_mixed|^2 + <g_mixed, g_flat>.
    for found, norm in ((whole, square), (layer, inside)):
        product = found["mixed"][0] - norm
        other = found["flat"][0] - product
        assert other > 0
        assert product**2 <= norm * other * (1 + 1e-9)


def test_the_update_is_that_without_a_comparison(results):
    for name, of_split in results.items():
        _, expected = of_split["plain"]
        scores, _ = of_split["plain"]
        assert scores == {}
        for key, (_, found) in of_split.items():
            assert set(found) == set(expected)
            for parameter, gradient in expected.items():
                torch.testing.assert_close(
                    found[parameter], gradient, rtol=1e-5, atol=1e-7, msg=f"{name} {key}"
                )
