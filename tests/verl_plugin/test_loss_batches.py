"""Masks, splits, types and extremes: the same for every loss of ours."""

import pytest
import torch
from policy_batches import BOTH, actor_config, counts_of, evaluate, make_batch, provided_to

from hpo_verl.errors import DataError

NAN, INF = float("nan"), float("inf")
KEYS = {
    "actor/pg_clipfrac",
    "actor/ppo_kl",
    "actor/pg_clipfrac_lower",
    "actor/log_ratio_bounded_fraction",
}


# ---------------------------------------------------------------- masks


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("which", ["log_prob", "old_log_prob", "advantages", "weights"])
def test_what_stands_at_masked_places_changes_nothing_bit_for_bit(name, mode, which, bad):
    batch = make_batch()
    weights = torch.full_like(batch["log_prob"], 0.7)
    clean = evaluate(name, batch, mode, weights=weights)
    dead = ~batch["response_mask"]
    if which == "weights":
        weights = weights.masked_fill(dead, bad)
    else:
        batch[which] = batch[which].masked_fill(dead, bad)
    dirty = evaluate(name, batch, mode, weights=weights)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert clean[2] == dirty[2]
    assert (dirty[1][dead] == 0).all()


@BOTH
def test_masked_equals_removed(name, mode):
    batch = make_batch()
    wide = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    narrow, padded = evaluate(name, batch, mode), evaluate(name, wide, mode)
    torch.testing.assert_close(narrow[0], padded[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(narrow[1], padded[1][:, :12], rtol=1e-6, atol=0)
    assert narrow[2] == pytest.approx(padded[2], rel=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_masks_of_zero_and_one_equal_bool_masks(name, mode, dtype):
    batch = make_batch()
    number = batch | {"response_mask": batch["response_mask"].to(dtype)}
    assert torch.equal(evaluate(name, batch, mode)[1], evaluate(name, number, mode)[1])
    with pytest.raises(DataError, match="response_mask must hold 0 and 1 only"):
        evaluate(name, batch | {"response_mask": batch["response_mask"] * 0.5}, mode)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["log_prob", "old_log_prob", "advantages"])
def test_a_live_value_that_is_not_finite_is_refused_by_name_and_place(name, mode, which, bad):
    batch = make_batch()
    batch[which][3, 0] = batch[which][5, 0] = bad
    live = int(batch["response_mask"].sum())
    message = rf"^{which}: 2 of {live} live values are not finite, the first at \(3, 0\)"
    with pytest.raises(DataError, match=message):
        evaluate(name, batch, mode)


@BOTH
def test_two_infinities_that_cancel_are_still_refused(name, mode):
    batch = make_batch()
    batch["log_prob"][0, 0] = batch["old_log_prob"][0, 0] = -INF
    with pytest.raises(DataError, match=r"^log_prob: 1 of"):
        evaluate(name, batch, mode)


@BOTH
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (4, 0)])
def test_an_empty_micro_batch_gives_zero_and_the_same_keys(name, mode, counts, shape):
    batch = {key: torch.full(shape, NAN) for key in ("old_log_prob", "log_prob", "advantages")}
    batch["response_mask"] = torch.zeros(shape, dtype=torch.bool)
    info = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 8} if counts else {}
    loss, gradient, metrics = evaluate(name, batch, mode, actor_config(mode, counts=info))
    assert loss.item() == 0.0
    assert gradient.shape == shape
    assert (gradient == 0).all()
    assert metrics == dict.fromkeys(KEYS, 0.0)
    assert set(evaluate(name, make_batch(), mode)[2]) == KEYS


@BOTH
def test_a_mini_batch_without_a_token_anywhere_gives_zero(name, mode):
    batch = make_batch() | {"response_mask": torch.zeros(8, 12, dtype=torch.bool)}
    config = actor_config(mode, counts=counts_of(batch["response_mask"]))
    assert evaluate(name, batch, mode, config)[0].item() == 0.0


def test_several_ranks_need_verls_counts():
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        evaluate("hpo", make_batch(), config=actor_config(counts={"dp_size": 2}))


def test_metric_keys_contain_no_word_that_selects_another_reduction():
    assert not [key for key in KEYS if "min" in key or "max" in key]


# ---------------------------------------------------------------- splits, types, order


@BOTH
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_splitting_a_mini_batch_changes_nothing(name, mode, parts, dp_size):
    batch = make_batch(rows=16)
    whole = evaluate(
        name, batch, mode, actor_config(mode, counts=counts_of(batch["response_mask"]))
    )
    config = actor_config(mode, counts=counts_of(batch["response_mask"], dp_size))
    # What belongs to the mini-batch is known to every piece; tokens have fields of their own.
    whole_batch = provided_to(name, config, batch)
    pieces = [
        evaluate(
            name,
            {key: value[rows] for key, value in batch.items()},
            mode,
            config,
            provided={
                key: value[rows] if isinstance(value, torch.Tensor) else value
                for key, value in whole_batch.items()
            },
        )
        for rows in torch.arange(16).chunk(parts)
    ]
    # FSDP averages over ranks, which the factor dp_size undoes.
    loss = sum(piece[0] for piece in pieces) / dp_size
    gradient = torch.cat([piece[1] for piece in pieces]) / dp_size
    torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-6, atol=1e-9)


@BOTH
def test_the_order_of_responses_does_not_matter(name, mode):
    batch = make_batch()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = evaluate(name, batch, mode)
    shuffled = evaluate(name, {key: value[order] for key, value in batch.items()}, mode)
    torch.testing.assert_close(shuffled[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(shuffled[1], plain[1][order], rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_float32(name, mode, dtype):
    batch = make_batch(dtype=dtype)
    wide = {key: v.float() if v.is_floating_point() else v for key, v in batch.items()}
    loss, gradient, _ = evaluate(name, batch, mode)
    expected = evaluate(name, wide, mode)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected[0])
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected[1].to(dtype))


@BOTH
def test_bfloat16_inputs_stay_within_their_own_rounding(name, mode):
    exact = make_batch(rows=64, width=64)
    rounded = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in exact.items()
    }
    reference, approximate = evaluate(name, exact, mode), evaluate(name, rounded, mode)
    # A log-probability below 2 in magnitude rounds by at most 2^-9, the ratio by twice that.
    weight = exact["advantages"].abs().mean().item()
    if mode == "seq-mean-token-sum":
        # The sum over a response of the mean length.
        weight *= exact["response_mask"].sum().item() / 64
    assert abs(reference[0] - approximate[0]) < 2**-7 * weight


@BOTH
def test_no_gradient_reaches_the_old_policy_or_the_advantages(name, mode):
    batch = make_batch()
    leaves = {key: batch[key].requires_grad_() for key in ("old_log_prob", "advantages")}
    weights = torch.ones(8, 12, requires_grad=True)
    evaluate(name, batch, mode, weights=weights)
    assert all(leaf.grad is None for leaf in [*leaves.values(), weights])


@BOTH
def test_rollout_weights_multiply_the_loss_of_every_token(name, mode):
    batch = make_batch()
    weights = torch.rand(8, 12, generator=torch.Generator().manual_seed(2)) + 0.5
    plain, weighted = evaluate(name, batch, mode), evaluate(name, batch, mode, weights=weights)
    torch.testing.assert_close(weighted[1], weights * plain[1], rtol=1e-6, atol=0)
    # Where every advantage is weighted alike, so is the loss.
    double = evaluate(name, batch, mode, weights=torch.full_like(weights, 2.0))
    torch.testing.assert_close(double[0], 2 * plain[0], rtol=1e-6, atol=0)
    assert weighted[2] == plain[2]


# ---------------------------------------------------------------- bound on the log-ratio


@BOTH
@pytest.mark.parametrize("drift", [25.0, -25.0, 100.0, -100.0, 1e4, -1e4])
def test_a_huge_drift_stays_finite_and_is_reported(name, mode, drift):
    batch = make_batch()
    batch["log_prob"][0, 0] += drift
    batch["advantages"][0] *= -1
    loss, gradient, metrics = evaluate(name, batch, mode)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] == 0
    share = 1 / int(batch["response_mask"].sum())
    assert metrics["actor/log_ratio_bounded_fraction"] == pytest.approx(share)


def test_below_the_bound_the_gradient_passes():
    batch = make_batch()
    batch["log_prob"][1, 0] = batch["old_log_prob"][1, 0] + 19.5
    _, gradient, metrics = evaluate("hpo", batch)
    assert gradient[1, 0] > 1e6
    assert metrics["actor/log_ratio_bounded_fraction"] == 0
