"""What the trainer provides to an algorithm, stores for its loss, and logs of a step."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from algorithm_steps import ENTROPY, LENGTHS, MASK, config
from estimator_calls import call_with_report
from omegaconf import OmegaConf

from hpo_verl.algorithms.hapo import HAPOSettings, entropy_deviation
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine.step_guard import NO_ADVANTAGE
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep

HPO_KEYS = {
    "hpo/alpha", "hpo/positive_fraction", "hpo/negative_fraction",
    "hpo/zero_spread_group_fraction", "hpo/solve_rate", "hpo/response_length_positive",
    "hpo/response_length_negative", "hpo/advantage_mass_negative_over_positive",
    "hpo/advantage_mass_negative_over_positive_before_weighting",
}  # fmt: skip


# ---------------------------------------------------------------- statistics


def test_statistics_of_a_batch_with_an_adaptive_weight(step):
    _, metrics, fetched = step(config("a_hpo", hpo={"alpha_min": 0.1}))
    assert metrics == pytest.approx(
        {
            "hpo/alpha": 1 / 3,
            "hpo/positive_fraction": 1 / 6,
            "hpo/negative_fraction": 1 / 2,
            "hpo/zero_spread_group_fraction": 1 / 2,
            "hpo/solve_rate": 1 / 2,
            "hpo/response_length_positive": 2.0,
            "hpo/response_length_negative": 6.0,
            # 0.5 * 18 tokens against 1.5 * 2, weighted by a third.
            "hpo/advantage_mass_negative_over_positive": 1.0,
            "hpo/advantage_mass_negative_over_positive_before_weighting": 3.0,
        },
        rel=1e-5,
    )
    # The estimator hands over all that they are made of.
    assert fetched == []


def test_statistics_of_verls_own_estimator(step):
    _, metrics, fetched = step(config("grpo"), (1.0, 0, 0, 0, 1.0, 1.0, 0))
    assert metrics["hpo/alpha"] == 1.0
    assert metrics["hpo/positive_fraction"] == pytest.approx(1 / 6)
    assert metrics["hpo/negative_fraction"] == pytest.approx(1 / 2)
    assert metrics["hpo/zero_spread_group_fraction"] == pytest.approx(1 / 2)
    assert metrics["hpo/advantage_mass_negative_over_positive"] == pytest.approx(3.0, rel=1e-5)
    assert set(metrics) == HPO_KEYS
    assert fetched == [["uid", "response_mask", "rm_scores", "advantages"]]


@pytest.mark.parametrize("estimator", ["a_hpo", "grpo"])
def test_with_a_kl_penalty_the_estimator_saw_other_rewards_than_the_scores(step, estimator):
    _, metrics, fetched = step(config(estimator, use_kl_in_reward=True), penalty=0.125)
    # A reward stays above 0 only in the scores: the penalty of three tokens is .375.
    assert metrics["hpo/solve_rate"] == pytest.approx(1 / 2)
    # Nor does the penalty, which grows with the length, make a spread of equal scores.
    assert metrics["hpo/zero_spread_group_fraction"] == 1 / 2
    (fields,) = fetched
    assert "rm_scores" in fields
    assert ("token_level_rewards" in fields) == (estimator == "grpo")


def test_the_logged_weight_is_the_one_that_was_used(step):
    """The negatives of the advantages that the loss will see, over the unweighted ones."""
    trainer, metrics, _ = step(config("a_hpo"), (1.0, 1.0, 0, 0, 0, 1.0, 0))
    assert metrics["hpo/alpha"] == 1.0
    trainer, metrics, _ = step(
        config("a_hpo", hpo={"zero_advantage": "negative"}), (1.0,) + (0,) * 6
    )
    # One positive; three negatives, and two failures of the group of equal rewards.
    assert metrics["hpo/alpha"] == pytest.approx(1 / 5)
    assert metrics["hpo/negative_fraction"] == pytest.approx(5 / 6)
    advantages = trainer.store["advantages"].to_padded_tensor(0.0)
    assert advantages[1, 0].item() == pytest.approx(-0.5 / 5, rel=1e-5)


def test_what_an_estimator_reports_of_its_own_is_logged(step):
    settings = {
        f"{kind}_share_{end}": 1.0 for kind in ("response", "token") for end in ("start", "end")
    }
    _, metrics, fetched = step(config("d3s", "vanilla", d3s=settings))
    assert set(metrics) == HPO_KEYS | {"hpo/d3s_response_fraction", "hpo/d3s_token_fraction"}
    assert metrics["hpo/d3s_token_fraction"] == 1.0
    assert fetched == [["entropy"]]


# ---------------------------------------------------------------- parts of a step


def test_statistics_are_logged_of_the_last_part_which_saw_the_step(step):
    first, metrics, _ = step(config("a_hpo"), parts=(0, 2, ()))
    assert metrics == {"hpo/alpha": pytest.approx(1 / 3)}
    _, metrics, _ = step(config("a_hpo"), (1.0, 1.0, 1.0, 0, 0, 0, 0), parts=(1, 2, first._earlier))
    # 1 and 3 positives, 3 and 1 negatives, of 12 responses to four prompts.
    assert metrics["hpo/alpha"] == 1.0
    assert metrics["hpo/positive_fraction"] == pytest.approx(4 / 12)
    assert metrics["hpo/zero_spread_group_fraction"] == 1 / 2
    assert metrics["hpo/solve_rate"] == pytest.approx(6 / 12)
    # Successes of 2, and of 2, 4 and 6 tokens.
    assert metrics["hpo/response_length_positive"] == pytest.approx(14 / 4)
    assert set(metrics) == HPO_KEYS


def test_of_verls_own_estimator_every_part_is_logged(step):
    _, metrics, _ = step(config("grpo"), parts=(0, 2, ()))
    assert set(metrics) == HPO_KEYS


def test_token_fields_are_made_of_the_parts_of_a_step(step):
    first, _, _ = step(config("grpo", "hapo"), parts=(0, 2, ()))
    trainer, _, _ = step(config("grpo", "hapo"), parts=(1, 2, first._earlier))
    twice = entropy_deviation(torch.cat([ENTROPY] * 2), torch.cat([MASK] * 2), HAPOSettings())
    field = trainer.store["entropy_deviation"].to_padded_tensor(0.0)
    assert torch.equal(field, twice[7:])


def test_updates_are_counted_over_the_parts_of_a_step():
    class Verl:
        def _update_actor(self, batch, metrics):
            metrics[NO_ADVANTAGE] = 0.5
            return batch

    trainer = object.__new__(type("Mode", (AlgorithmStep, Verl), {}))
    trainer.config = OmegaConf.create(
        {"actor_rollout_ref": {
            "actor": {"ppo_mini_batch_size": 1, "ppo_epochs": 2}, "rollout": {"n": 4}}}
    )  # fmt: skip
    trainer.parameter_sync_step, trainer._counts = 2, Counter()
    logged = []
    for part in (0, 1, 0, 1):
        metrics, trainer.local_trigger_step = {}, part
        trainer._update_actor(SimpleNamespace(keys=["k"] * 8), metrics)
        logged.append(metrics)
    # Half of 2 mini-batches in 2 epochs, twice a step.
    assert logged == [{}, {"hpo/updates_without_advantage": 4}] * 2


def test_alpha_follows_the_progress_of_the_run(step):
    _, metrics, _ = step(config("hpo", hpo={"alpha": 0.2, "alpha_end": 0.4}), at=(3, 5))
    assert metrics["hpo/alpha"] == pytest.approx(0.3)


# ---------------------------------------------------------------- what is provided


@pytest.mark.parametrize(
    ("number", "steps", "progress"),
    [(1, 5, 0.0), (3, 5, 0.5), (5, 5, 1.0), (9, 5, 1.0), (1, 1, 0.0)],
)
def test_entropies_and_progress_are_provided_to_who_needs_them(step, number, steps, progress):
    trainer, _, fetched = step(config("d3s", "vanilla"), at=(number, steps))
    filled = torch.arange(8) < LENGTHS[:, None]
    assert torch.equal(trainer.provided["entropy"], ENTROPY * filled)
    assert trainer.provided["progress"] == progress
    assert fetched == [["entropy"]]
    trainer, _, _ = step(config("aepo_advantage", "vanilla"))
    assert trainer.provided["progress"] is None
    assert torch.equal(trainer.provided["entropy"], ENTROPY * filled)
    trainer, _, _ = step(config("grpo", "vanilla"))
    assert trainer.provided == {"entropy": None, "progress": None}


def test_old_log_probabilities_are_provided_to_who_needs_them(step):
    trainer, metrics, fetched = step(config("a3po", "vanilla"), at=(3, 5))
    assert fetched == [["old_log_probs"]]
    assert metrics["hpo/a3po_positive_scale"] == 1.5
    # Row 0, positive: of two tokens the one of higher entropy is the rarer one.
    advantages = trainer.store["advantages"].to_padded_tensor(0.0)
    rare = int(ENTROPY[0, :2].argmax())
    assert advantages[0, rare] == 1.5 * advantages[0, 1 - rare] > 0


def test_what_is_provided_is_gone_after_the_step_even_if_it_failed(step):
    with pytest.raises(Exception, match="token_share_end"):
        step(config("d3s", "vanilla", d3s={"token_share_end": 7}))
    assert extras.get("entropy") is None
    assert extras.get("report") is None


def test_rewards_by_name_are_provided_and_their_means_logged(step):
    named = {"rewards": ["format"], "thresholds": [0.75]}
    extra_fields = [{"reward_extra_info": {"format": float(row % 2)}} for row in range(6)]
    # A padding row has none.
    trainer, metrics, fetched = step(
        config("constrained_grpo", "vanilla", constrained=named),
        extra_fields=[*extra_fields, {}],
    )
    assert fetched == [["extra_fields"]]
    assert metrics["hpo/reward/format"] == 0.5
    assert metrics["hpo/constrained_excess/format"] == -0.25
    assert metrics["hpo/constrained_multiplier/format"] == 0.5
    assert trainer.memory["constrained_dual/format"] == pytest.approx(0.1 / 16)


@pytest.mark.parametrize("estimator", ["grpo", "hapo", "d3s"])
@pytest.mark.parametrize("changes", [{}, {"entropy_pivot": 0.3, "repo_compatible": True}])
def test_the_token_fields_of_a_loss_are_made_of_the_whole_batch(step, estimator, changes):
    # A rollout correction masked the last row but one meanwhile.
    mask = MASK.clone()
    mask[5] = False
    trainer, _, fetched = step(config(estimator, "hapo", changes), mask=mask)
    field = trainer.store["entropy_deviation"]
    assert field.offsets().diff().tolist() == LENGTHS.tolist()
    expected = entropy_deviation(ENTROPY, mask, HAPOSettings(**changes))
    assert torch.equal(field.to_padded_tensor(0.0), expected)
    assert (expected[5] == 0).all()
    assert len(fetched) == 1


def test_fields_that_the_estimator_gives_reach_the_loss_of_every_part(step):
    settings = config("epo", "epo", epo={"schedule": "constant"})
    memory = {"epo_entropy": 1.5, "epo_steps": 2.0}
    first, _, _ = step(settings, memory=memory, parts=(0, 2, ()))
    assert first.memory == memory
    last, metrics, fetched = step(settings, memory=memory, parts=(1, 2, first._earlier))
    assert fetched == [["entropy"]]
    field = last.store["entropy_history"]
    assert field.offsets().diff().tolist() == LENGTHS.tolist()
    assert torch.equal(field.to_padded_tensor(0.0), 1.5 * MASK)
    assert metrics["hpo/epo_entropy_history"] == 1.5
    # Both parts are of the step: the same entropies twice.
    mean = ENTROPY[MASK].double().mean().item()
    assert last.memory == {"epo_entropy": pytest.approx((3 + mean) / 3), "epo_steps": 3.0}


def test_the_estimators_of_the_helper_report_what_they_used():
    _, statistics = call_with_report("a_hpo", [1.0, 0.0], ["a", "a"])
    assert statistics == {}
