"""Weights of verl's KL term, token by token: in the actor, in a recorded file, and refused."""

import re

import pytest
import torch
from composed_recipes import View, merged, with_algorithm
from policy_batches import actor_config, counts_of, make_batch
from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.ares import KL_WEIGHT
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.engine import replay
from hpo_verl.verl_plugin.validation import check_algorithm

COEFFICIENT = 0.5


def evaluated(weights, loss_mode="ares", mode="token-mean", kind="low_var_kl"):
    """Loss and largest gradient of a micro-batch that differs from the reference."""
    batch = make_batch()
    config = actor_config(
        mode, PolicyLossConfig(loss_mode=loss_mode), use_kl_loss=True, kl_loss_coef=COEFFICIENT,
        kl_loss_type=kind,
    )  # fmt: skip
    tensors = {**batch, "ref_log_prob": batch["log_prob"] + 0.4, KL_WEIGHT: weights}
    counts = counts_of(batch["response_mask"])
    loss, largest, found = replay.evaluate(
        tensors, {**replay.loss_settings_of(config), "counts": counts}
    )
    assert found is None
    return loss, largest


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("kind", ["kl", "low_var_kl", "k3+"])
def test_weights_of_one_are_verls_term_and_others_multiply_it(mode, kind):
    ones = torch.ones(8, 12)
    plain, _ = evaluated(ones, "vanilla", mode, kind)
    same, largest = evaluated(ones, mode=mode, kind=kind)
    none, of_policy = evaluated(0 * ones, mode=mode, kind=kind)
    double, _ = evaluated(2 * ones, mode=mode, kind=kind)
    assert same == pytest.approx(plain, rel=1e-5)
    assert double - same == pytest.approx(same - none, rel=1e-4)
    assert same != pytest.approx(none, rel=1e-3)
    assert largest != of_policy


def test_the_term_of_a_token_by_hand():
    # One token in 8 x 12 is weighed: k3 of 0.4 over the live tokens.
    batch, weights = make_batch(), torch.zeros(8, 12)
    weights[2, 0] = 1.0
    one, _ = evaluated(weights)
    none, _ = evaluated(0 * weights)
    k3 = torch.tensor(0.4).exp().item() - 0.4 - 1.0
    tokens = int(batch["response_mask"].sum())
    assert one - none == pytest.approx(COEFFICIENT * k3 / tokens, rel=1e-3)


def recipe(**actor):
    plain = with_algorithm("countdown3-1.5b", (), "8gpu", "ares")
    return View(merged(plain, {"actor_rollout_ref": {"actor": actor}}))


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        ({"use_kl_loss": False}, "use_kl_loss = false: policy_loss.loss_mode = 'ares' weighs that"),
        ({"kl_loss_coef": 0.0}, "kl_loss_coef = 0.0: policy_loss.loss_mode = 'ares' is weighed by"),
    ],
)
def test_weights_of_a_term_that_is_off_are_refused(actor, message):
    assert check_algorithm(recipe()) == []
    with pytest.raises(ConfigError, match=f"^{re.escape('actor_rollout_ref.actor.' + message)}"):
        check_algorithm(recipe(**actor))
