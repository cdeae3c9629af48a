import re

import numpy as np
import pytest
import torch
from estimator_calls import call
from policy_batches import BOTH, actor_config, evaluate, make_batch
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.registry import LOSSES, OUR_LOSSES
from hpo_verl.core.settings import require_number
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.verl_plugin import losses as plugin
from hpo_verl.verl_plugin.config import SECTIONS

NAN = float("nan")
MHPOPolicyLossConfig = SECTIONS["mhpo"]

# ---------------------------------------------------------------- hand-derived numbers


def test_hpo_of_two_responses_by_hand():
    # Ratios 1.5 and 1 with A = 1, 0.5 with A = -1; clip 0.8 .. 1.2; three live tokens.
    batch = {
        "old_log_prob": torch.zeros(2, 2),
        "log_prob": torch.tensor([[1.5, 1.0], [0.5, 7.0]]).log(),
        "advantages": torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        "response_mask": torch.tensor([[True, True], [True, False]]),
    }
    loss, gradient, metrics = evaluate("hpo", batch)
    assert loss.item() == pytest.approx((-1.2 - 1.0 + 0.8) / 3, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1 / 3], [0.0, 0.0]]))
    assert metrics["actor/pg_clipfrac"] == pytest.approx(2 / 3)
    assert metrics["actor/ppo_kl"] == pytest.approx(-(np.log(1.5) + np.log(0.5)) / 3, rel=1e-5)
    assert metrics["actor/pg_clipfrac_lower"] == metrics["actor/log_ratio_bounded_fraction"] == 0


def test_mhpo_per_response_and_per_token_by_hand():
    # On-policy every token weighs 0.26506; A = 1 on one token, -1 on three.
    batch = {
        "old_log_prob": torch.zeros(2, 3),
        "log_prob": torch.zeros(2, 3),
        "advantages": torch.tensor([[1.0] * 3, [-1.0] * 3]),
        "response_mask": torch.tensor([[True, False, False], [True, True, True]]),
    }
    weight = 0.26506
    loss, gradient, _ = evaluate("mhpo", batch, "seq-mean-token-mean")
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    expected = torch.tensor([[-0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]) * weight
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)
    loss, _, _ = evaluate("mhpo", batch, "token-mean")
    assert loss.item() == pytest.approx((-1 + 3) / 4 * weight, rel=1e-4)


def test_asymmetric_clip_and_the_common_value():
    batch = make_batch(scale=1.0)
    wide = actor_config(clip_ratio_low=0.5, clip_ratio_high=2.0)
    assert evaluate("hpo", batch, config=wide)[0] != evaluate("hpo", batch)[0]
    common = actor_config(clip_ratio=0.37, clip_ratio_low=None, clip_ratio_high=None)
    both = actor_config(clip_ratio_low=0.37, clip_ratio_high=0.37)
    assert torch.equal(
        evaluate("hpo", batch, config=common)[1], evaluate("hpo", batch, config=both)[1]
    )


# ---------------------------------------------------------------- verl's own losses


def test_t1_alpha_one_is_verls_vanilla_without_its_second_clip():
    batch = make_batch(rows=64, width=64, scale=1.0)
    ours, theirs = evaluate("hpo", batch), evaluate("vanilla", batch)
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-12)
    for key in ("actor/pg_clipfrac", "actor/ppo_kl"):
        assert ours[2][key] == pytest.approx(theirs[2][key], rel=1e-5)


def test_grpo_token_mean_is_alpha_one_up_to_verls_float32_advantages():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (512, 1), generator=generator).float()
    uids, mask = np.arange(512) // 8, torch.ones(512, 1)
    ours = call("hpo", rewards, uids, {"hpo": {"alpha": 1.0}}, mask)
    theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards, mask, uids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.2e-7)
    assert not torch.equal(ours, theirs)
    # With the same advantages only the order of two products in the gradient differs.
    batch = make_batch(rows=512, width=8) | {"advantages": theirs.expand(512, 8)}
    loss, gradient, _ = evaluate("hpo", batch)
    of_verl, by_autograd, _ = evaluate("vanilla", batch)
    assert torch.equal(loss, of_verl)
    torch.testing.assert_close(gradient, by_autograd, rtol=2**-22, atol=0)


@pytest.mark.parametrize("c", [1.1, 3.0])
def test_the_second_clip_is_that_of_verls_vanilla(c):
    batch = make_batch(rows=64, width=64, scale=1.0)
    config = actor_config(clip_ratio_c=c)
    ours, theirs = evaluate("hpo", batch, config=config), evaluate("vanilla", batch, config=config)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-12)
    for key in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower"):
        assert ours[2][key] == pytest.approx(theirs[2][key], rel=1e-5)
    assert ours[2]["actor/pg_clipfrac_lower"] > 0


def test_t2_t3_the_gradient_is_linear_in_the_weight():
    batch = make_batch()
    negative = batch["advantages"] < 0

    def gradient(alpha):
        weighted = torch.where(negative, alpha * batch["advantages"], batch["advantages"])
        return evaluate("hpo", batch | {"advantages": weighted})[1]

    assert (gradient(0.0)[negative] == 0).all()
    torch.testing.assert_close(gradient(0.3), 0.3 * gradient(1.0) + 0.7 * gradient(0.0))


def test_t5_the_mean_over_tokens_is_the_mean_length_normalisation():
    batch = make_batch()
    mask = batch["response_mask"]
    per_token = evaluate("hpo", batch)[0]
    ratio = (batch["log_prob"] - batch["old_log_prob"]).exp()
    token = -torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    mean_length = mask.sum() / len(mask)
    by_length = ((token * mask).sum(-1) / mean_length).mean()
    torch.testing.assert_close(per_token, by_length)
    per_response = ((token * mask).sum(-1) / mask.sum(-1)).mean()
    assert abs(per_token - per_response) > 1e-3


def test_t10_verls_sapo_has_slope_one_on_policy_for_any_temperature():
    batch = make_batch(scale=0.0)
    for tau in (0.5, 1.0, 1.05, 4.0):
        config = actor_config("seq-mean-token-mean", tau_pos=tau, tau_neg=tau)
        _, gradient, _ = evaluate("sapo", batch, "seq-mean-token-mean", config)
        mask = batch["response_mask"]
        expected = -batch["advantages"] * mask / mask.sum(-1, keepdim=True) / len(mask)
        torch.testing.assert_close(gradient, expected)


def test_t11_verls_gspo_gives_all_tokens_of_a_response_the_same_weight():
    batch = make_batch(scale=1e-5)
    config = actor_config("seq-mean-token-mean", clip_ratio_low=3e-4, clip_ratio_high=4e-4)
    _, gradient, _ = evaluate("gspo", batch, "seq-mean-token-mean", config)
    mask = batch["response_mask"]
    log_ratio = (batch["log_prob"] - batch["old_log_prob"]) * mask
    ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).exp()
    expected = -ratio * batch["advantages"] * mask / mask.sum(-1, keepdim=True) / len(mask)
    torch.testing.assert_close(gradient, expected)


def homogeneous(name):
    """Whether weighting the negatives' advantages weights their gradients, and theirs only."""
    corrections = RolloutCorrectionConfig(bypass_mode=True)
    policy_loss = PolicyLossConfig(
        loss_mode=name, dro_beta=0.1, clip_cov_ratio=0.3, clip_cov_lb=0.2, kl_cov_ratio=0.3,
        rollout_correction=corrections,
    )  # fmt: skip
    if name == "bapo":
        # Out of reach of equal sums, within reach of weighted ones.
        policy_loss = SECTIONS["bapo"](positive_share=0.6)
    mode = OUR_LOSSES[name].aggregations[0] if name in OUR_LOSSES else "token-mean"
    config = actor_config(mode, policy_loss)
    batch = make_batch(rows=16, width=16, scale=0.4)
    negative = batch["advantages"] < 0
    weight = torch.where(negative, 0.25, 1.0)

    def gradient(advantages):
        torch.manual_seed(0)
        return evaluate(name, batch | {"advantages": advantages}, mode, config)[1]

    weighted, plain = gradient(weight * batch["advantages"]), gradient(batch["advantages"])
    return torch.allclose(weighted, weight * plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", sorted(POLICY_LOSS_REGISTRY))
def test_t4_d4_the_records_say_which_loss_is_proportional_to_the_advantage(name):
    # Fields of the head are made of the advantages, too, but not in the loss.
    made_before = LOSSES[name].head_fields is not None
    assert homogeneous(name) == (LOSSES[name].proportional or made_before)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("name", "mode"),
    [("hpo", "seq-mean-token-mean"), ("hpo", "token-sum"), ("hpo", "seq-mean-token-sum"),
     ("mhpo", "seq-mean-token-sum"), ("mhpo", "token-sum")],
)  # fmt: skip
def test_another_aggregation_is_refused_by_both_names(name, mode):
    with pytest.raises(ConfigError, match=rf"loss_agg_mode = '{mode}'.*loss_mode = '{name}'"):
        evaluate(name, make_batch(), mode)


def test_the_refusal_lists_what_is_permitted():
    with pytest.raises(ConfigError, match=r"permits seq-mean-token-mean and token-mean only$"):
        evaluate("mhpo", make_batch(), "token-sum")


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_ratio_low": 1.5},
        {"clip_ratio_low": -0.1},
        {"clip_ratio_high": NAN},
        {"clip_ratio_c": 1.0},
        {"clip_ratio_c": None},
    ],
)
def test_a_clip_out_of_range_is_refused(changes):
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"^actor_rollout_ref\.actor\.{key} = "):
        evaluate("hpo", make_batch(), config=actor_config(**changes))


@BOTH
def test_a_missing_config_is_refused(name, mode):
    with pytest.raises(ConfigError, match=f"policy loss '{name}': verl's actor config is missing"):
        get_policy_loss_fn(name)(**make_batch(), loss_agg_mode=mode, config=None)


@pytest.mark.parametrize("which", ["log_prob", "old_log_prob", "advantages"])
def test_what_a_loss_sees_is_0_at_masked_tokens(which):
    batch = make_batch()
    batch[which][~batch["response_mask"]] = NAN
    tokens = plugin.prepare(**batch).tokens
    for values in (tokens.log_ratio, tokens.advantages, tokens.old_log_prob):
        assert (values[~tokens.mask] == 0).all()
        assert (values[tokens.mask] != 0).all()


@BOTH
@pytest.mark.parametrize("which", ["log_prob", "old_log_prob", "advantages"])
def test_shapes_must_agree(name, mode, which):
    batch = make_batch()
    batch[which] = batch[which][:, :-1]
    with pytest.raises(DataError, match=rf"^{which} \(8, 11\) must have the shape of"):
        evaluate(name, batch, mode)


def test_verls_own_settings_mean_mhpos_defaults():
    batch, mode = make_batch(), "seq-mean-token-mean"
    stock = evaluate("mhpo", batch, mode)
    typed = evaluate("mhpo", batch, mode, actor_config(mode, MHPOPolicyLossConfig()))
    assert torch.equal(stock[1], typed[1])


@pytest.mark.parametrize("name", ["c", "k_pos", "lambda_pos", "k_neg", "lambda_neg"])
def test_every_setting_of_mhpo_reaches_the_loss(name):
    batch, mode = make_batch(), "seq-mean-token-mean"
    changed = MHPOPolicyLossConfig(**{name: 1.23})
    assert not torch.equal(
        evaluate("mhpo", batch, mode)[1],
        evaluate("mhpo", batch, mode, actor_config(mode, changed))[1],
    )


@pytest.mark.parametrize("name", ["c", "k_pos", "lambda_pos", "k_neg", "lambda_neg"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, "1.5"])
def test_a_bad_setting_of_mhpo_is_refused_by_its_path(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"actor.policy_loss.{name} = {value!r}")):
        MHPOPolicyLossConfig(**{name: value})


def test_registering_twice_changes_nothing_and_a_taken_name_is_refused(monkeypatch):
    plugin.register(core_algos)
    assert get_policy_loss_fn("hpo") is plugin.LOSSES["hpo"]
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "mhpo", require_number)
    with pytest.raises(EnvironmentCheckError, match=r"'mhpo' is already registered by hpo_verl\."):
        plugin.register(core_algos)
