"""D3S as verl calls it: selection, denominators, and checks."""

import re

import pytest
import torch
from estimator_calls import call, call_with_report
from omegaconf import OmegaConf
from policy_batches import actor_config, counts_of, evaluate, make_batch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpo_verl.algorithms.registry import LOSSES
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

NAN = float("nan")
OFF = {
    "response_share_start": 1.0, "response_share_end": 1.0,
    "token_share_start": 1.0, "token_share_end": 1.0,
}  # fmt: skip


def estimate(rewards, uids, entropy, progress=0.0, mask=None, **settings):
    provided = {"entropy": torch.tensor(entropy), "progress": progress}
    return call_with_report("d3s", rewards, uids, {"d3s": OFF | settings}, mask, provided)


# ---------------------------------------------------------------- estimator


def test_by_hand():
    # Group a: A = 1.5, -.5, -.5, -.5; group b has equal rewards: 0. Half of six responses,
    # k = 1: 1.5 and two of -.5 (variance .889; k = 2 takes a 0: .722).
    # |A| H of their tokens: .15, .3, .45 | .45, .05, .1 | .1, .2, .05; three of nine.
    rewards = torch.zeros(6, 3)
    rewards[:, 2] = torch.tensor([1.0, 0, 0, 0, 0.7, 0.7])
    entropy = [
        [0.1, 0.2, 0.3], [0.9, 0.1, 0.2], [0.2, 0.4, 0.1], [5, 5, 5], [5, 5, 5], [5, 5, 5],
    ]  # fmt: skip
    advantages, reported = estimate(
        rewards, list("aaaabb"), entropy, response_share_start=0.5, token_share_start=1 / 3
    )
    expected = torch.zeros(6, 3)
    expected[0, 1:] = 1.5
    expected[1, 0] = -0.5
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=0)
    assert reported == {
        "d3s_response_fraction": 0.5,
        "d3s_token_fraction": pytest.approx(3 / 18),
    }


def test_shares_of_one_are_hpo_with_weight_one_to_the_bit():
    rewards, uids = [1.0, 0.0, 0.3, 0.7, 0.7, 0.2], list("aaabbb")
    ours, _ = estimate(rewards, uids, [[1.0] * 4] * 6)
    assert torch.equal(ours, call("hpo", rewards, uids, {"hpo": {"alpha": 1.0}}))


def test_the_schedule_follows_the_progress():
    settings = {"response_share_start": 0.5, "token_share_start": 0.25}
    kept = [
        estimate([1.0, 0.0, 0.2, 0.4], ["a"] * 4, [[1.0] * 4] * 4, p, **settings)[1]
        for p in (0.0, 0.5, 1.0)
    ]
    assert [r["d3s_response_fraction"] for r in kept] == [0.5, 0.75, 1.0]
    assert [r["d3s_token_fraction"] for r in kept] == [0.125, 0.5, 1.0]


def test_entropies_are_checked_at_live_tokens_only():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    entropy = torch.rand(2, 4).masked_fill(mask == 0, NAN).tolist()
    assert estimate([1.0, 0.0], ["a", "a"], entropy, mask=mask)[0].isfinite().all()
    entropy[1][1] = NAN
    with pytest.raises(DataError, match=r"^entropy: 1 of 5 live .* the first at \(1, 1\)"):
        estimate([1.0, 0.0], ["a", "a"], entropy, mask=mask)
    with pytest.raises(DataError, match=r"^entropy \(2, 3\) must have the shape of response_mask"):
        estimate([1.0, 0.0], ["a", "a"], [[1.0] * 3] * 2)


def test_without_a_trainer_of_ours_the_estimator_says_which_to_use():
    with pytest.raises(ConfigError, match=r"'d3s' needs entropy .*trainer_mode must be hpo_sync"):
        get_adv_estimator_fn("d3s")(
            token_level_rewards=torch.zeros(1, 1), response_mask=torch.ones(1, 1), index=["a"]
        )


# ---------------------------------------------------------------- the loss and its denominator


ACCEPTED = [
    (name, mode)
    for name, loss in LOSSES.items()
    if not loss.caveat and name != "bypass_mode"
    for mode in loss.aggregations or ("token-mean", "seq-mean-token-mean")
]


@pytest.mark.parametrize(("loss_mode", "mode"), ACCEPTED)
def test_dropped_tokens_add_nothing_and_the_kept_ones_weigh_as_before(loss_mode, mode):
    """The gradient is that of the full batch, with 0 at what was dropped: same denominator."""
    batch = make_batch(rows=16, width=16)
    dropped = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) < 0.7
    dropped[2:5] = True
    config = actor_config(mode, counts=counts_of(batch["response_mask"]))
    _, full, _ = evaluate(loss_mode, batch, mode, config)
    selected = batch | {"advantages": batch["advantages"].masked_fill(dropped, 0.0)}
    _, gradient, _ = evaluate(loss_mode, selected, mode, config)
    assert (gradient[dropped] == 0).all()
    assert (gradient != 0).any()
    torch.testing.assert_close(gradient[~dropped], full[~dropped], rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- checks


def config(loss_mode="vanilla", mode="hpo_sync", **algorithm):
    loss = LOSSES.get(loss_mode)
    loss_agg_mode = (*(loss.aggregations if loss else ()), "token-mean")[0]
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "d3s", "d3s": {}, **algorithm},
            "actor_rollout_ref": {
                "actor": {
                    "policy_loss": {"loss_mode": loss_mode},
                    "loss_agg_mode": loss_agg_mode,
                    "clip_ratio_low": 0.2,
                    "clip_ratio_high": 0.2,
                    "clip_ratio_c": 3.0,
                }
            },
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"d3s": {"token_share_end": 2}}, "algorithm.d3s.token_share_end = 2: must be a number in"),
        ({"d3s": {"tokens": 0.5}}, "algorithm.d3s.tokens = 0.5: unknown setting"),
        ({"norm_adv_by_std_in_grpo": 1}, "algorithm.norm_adv_by_std_in_grpo = 1: must be true"),
        ({"rollout_correction": {"bypass_mode": True}}, "bypass_mode = True: skips the pass"),
        ({"adv_estimator": "grpo", "d3s": OFF}, "algorithm.adv_estimator = 'grpo' ignores it"),
        ({"adv_estimator": "a_hpo", "d3s": OFF}, "ignores it; use d3s"),
    ],
)
def test_what_cannot_be_meant_is_refused(algorithm, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(config(**algorithm))


@pytest.mark.parametrize("loss_mode", [name for name, loss in LOSSES.items() if loss.caveat])
def test_losses_that_an_advantage_of_zero_does_not_silence_are_refused(loss_mode):
    with pytest.raises(ConfigError, match=f"'d3s' with policy_loss.loss_mode = '{loss_mode}'"):
        check_algorithm(config(loss_mode))


def test_other_losses_pass_or_are_warned_about():
    assert check_algorithm(config("gspo")) == []
    (warning,) = check_algorithm(config("someone_elses"))
    assert "unknown here" in warning


@pytest.mark.parametrize("mode", ["hpo_sync", "hpo_colocate_async", "hpo_separate_async"])
def test_the_trainer_mode_must_be_ours(mode):
    check_trainer_mode(config(mode=mode))
    with pytest.raises(ConfigError, match=r"trainer_mode = 'sync': .*'d3s' needs hpo_sync or"):
        check_trainer_mode(config(mode="sync"))
    check_trainer_mode(config(mode="sync", adv_estimator="grpo"))
