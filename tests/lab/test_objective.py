"""Algorithms by their recipes, on verl's registries: what arrives, and what is refused."""

from dataclasses import replace

import pytest
import torch
from lab_policies import IN_LAB

from hpo_verl.algorithms.registry import ALGORITHMS, OUR_ESTIMATORS
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.tasks import find_task

ACTOR = "actor_rollout_ref.actor"


def read(name, changes=None, length=24):
    task = replace(find_task("countdown3"), max_response_length=length)
    return read_objective(task, name, changes)


@pytest.mark.parametrize("name", IN_LAB)
def test_every_algorithm_is_read_from_its_recipe(name):
    objective, record = read(name), ALGORITHMS[name]
    assert objective.actor.loss_agg_mode == record.loss_agg_mode
    assert (objective.estimator, objective.loss) == (record.estimator, record.loss)


def test_what_the_lab_does_not_sample_is_refused_by_name():
    for name in (name for name, one in OUR_ESTIMATORS.items() if one.openings):
        with pytest.raises(ConfigError, match=r"the lab's task has no opening$"):
            read(name)


# A group with one success in four: A-HPO's alpha is 1/3 where its lower bound permits.
REWARDS, GROUP = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
LIVE = torch.ones(4, 2, dtype=torch.bool)


def alpha_of(name, changes=None):
    _, statistics, _ = read(name, changes).advantages(REWARDS, GROUP, LIVE, {})
    return statistics["alpha"]


def test_the_recipes_settings_arrive():
    assert alpha_of("a_hpo") == pytest.approx(1 / 3)
    assert alpha_of("a_hpo", {"algorithm.hpo.alpha_min": 0.5}) == 0.5
    assert alpha_of("hpo") == 0.6
    assert alpha_of("hpo", {"algorithm.hpo.alpha": 0.2}) == 0.2
    assert alpha_of("grpo") == 1.0
    assert read("dapo").section.filter_groups.enable
    assert not read("grpo").section.filter_groups.enable
    assert read("dr_grpo").actor.loss_scale_factor == 24
    assert len(read("spo").history(7).values()) == 7
    assert read("grpo").history(7) is None
    assert read("hapo").needs_entropy
    assert not read("grpo").needs_entropy


def test_a_batch_is_described():
    _, statistics, _ = read("a_hpo").advantages(REWARDS, GROUP, LIVE, {})
    assert statistics["positive_fraction"] == 0.25
    assert statistics["negative_fraction"] == 0.75
    assert statistics["solve_rate"] == 0.25
    assert statistics["zero_spread_group_fraction"] == 0.0
    assert statistics["response_length_positive"] == 2.0


def test_dr_grpo_does_not_divide_by_the_deviation():
    advantages, _, _ = read("dr_grpo").advantages(REWARDS, GROUP, LIVE[:, :1], {})
    torch.testing.assert_close(advantages.flatten(), torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_what_an_estimator_remembers_is_kept_for_the_next_step():
    objective, memory = read("a_hpo", {"algorithm.hpo.ema": 0.75}), {"alpha": 1.0}
    _, statistics, _ = objective.advantages(REWARDS, GROUP, LIVE, {"memory": memory})
    # One of four succeeds.
    assert memory == {"alpha": statistics["alpha"]} == {"alpha": pytest.approx(0.75 + 0.25 / 3)}


def test_a_weight_stands_in_front_of_another_estimator():
    mask = torch.ones_like(LIVE)
    objective = read("hapo", {"+algorithm.hpo.alpha": 0.5})
    weighted, statistics, _ = objective.advantages(REWARDS, GROUP, mask, {})
    plain, _, _ = read("hapo").advantages(REWARDS, GROUP, mask, {})
    assert torch.equal(weighted, torch.where(plain < 0, plain / 2, plain))
    assert statistics["alpha"] == 0.5


def test_token_fields_are_made_of_the_whole_batch():
    objective = read("hapo", {f"{ACTOR}.policy_loss.entropy_pivot": 0.5})
    mask = torch.ones(1, 3, dtype=torch.bool)
    (deviation,) = objective.token_fields(torch.tensor([[0.5, 1.0, 2.0]]), mask).values()
    torch.testing.assert_close(deviation, torch.tensor([[-1.0, 0.0, 1.0]]))
    assert read("grpo").token_fields(torch.ones(1, 3), mask) == {}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hppo", {}, "unknown algorithm 'hppo': did you mean hpo"),
        ("hpo", {"algorithm.hpo.alfa": 0.2}, "did you mean algorithm.hpo.alpha"),
        ("grpo", {"algorithm.hpo.alpha": 0.2}, "unknown setting 'algorithm.hpo.alpha'"),
        ("hpo", {"algorithm.hpo.alpha": 2.0}, "algorithm.hpo.alpha = 2.0"),
        ("hpo", {f"{ACTOR}.loss_agg_mode": "mean"}, "Invalid loss_agg_mode: mean"),
        ("hpo", {f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, "permits token-mean and seq"),
        ("hpo", {"algorithm.hpo.length": "rollout"}, "the advantages carry 1 / L, so"),
        ("hpo", {f"{ACTOR}.clip_ratio_low": 2.0}, "clip_ratio_low = 2.0"),
        ("grpo", {f"{ACTOR}.clip_ratio_c": 1.0}, "clip_ratio_c"),
        ("hapo", {"algorithm.hapo.advantage_limit": 0.0}, "advantage_limit = 0.0"),
        ("hapo", {f"{ACTOR}.policy_loss.adv_beta": 2.0}, "adv_beta = 2.0"),
        ("bapo", {f"{ACTOR}.policy_loss.positive_share": 2.0}, "positive_share = 2.0"),
        ("d3s", {"algorithm.d3s.token_share_end": 0.0}, "token_share_end = 0.0"),
        ("spo", {"algorithm.spo.rho_min": 1.0}, "rho_min = 1.0"),
        ("aepo_advantage", {"algorithm.aepo_advantage.entropy_scale": -1.0}, "entropy_scale"),
        ("sapo", {f"{ACTOR}.tau_neg": 0.0}, "makes the gradient infinite or undefined"),
        ("dr_grpo", {f"{ACTOR}.loss_scale_factor": 0}, "makes the gradient infinite"),
        ("hpo", {f"{ACTOR}.policy_loss.loss_mode": "nothing"}, "Unsupported loss mode: nothing"),
        ("hpo", {"algorithm.adv_estimator": "gae"}, "values"),
        ("grpo", {f"{ACTOR}.grad_clip": 0.5}, "grad_clip, which the lab does not read"),
        ("hapo", {"algorithm.hapo.temperature_scale": 0.1}, "per token, which the lab does not"),
        ("capo", {}, "reads the head of the model, which the lab does not catch"),
        ("reward_gradients", {}, "gradients of single rewards, which the lab does not take"),
    ],
)
def test_settings_of_an_algorithm_are_checked(name, changes, message):
    with pytest.raises(ConfigError) as caught:
        read(name, changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_estimator_of_verls_without_a_record_is_used():
    # RLOO: the reward minus the mean of the other three.
    advantages, statistics, _ = read("hpo", {"algorithm.adv_estimator": "rloo"}).advantages(
        REWARDS, GROUP, LIVE, {}
    )
    expected = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(advantages[:, 0], expected)
    assert statistics["alpha"] == 1.0


def test_the_gradient_of_an_entropy_bonus_by_hand():
    # Three live tokens: each weighs -0.3 / 3, however the mini-batch is cut.
    objective = read(
        "grpo", {f"{ACTOR}.entropy_coeff": 0.3, f"{ACTOR}.loss_agg_mode": "token-mean"}
    )
    mask = torch.tensor([[True, True], [True, False]])
    whole = objective.entropy_gradient(torch.ones(2, 2), mask, {}, (3, 2))
    torch.testing.assert_close(whole, -0.1 * mask.float())
    part = objective.entropy_gradient(torch.ones(1, 2), mask[:1], {}, (3, 2))
    assert torch.equal(part, whole[:1])
    with pytest.raises(DataError, match=r"^entropy: 1 of 3 live values are not finite"):
        objective.entropy_gradient(torch.tensor([[torch.nan, 1], [1, 1]]), mask, {}, (3, 2))


def test_the_gradient_of_a_kl_term_by_hand():
    # k2 is half the square of the difference: its slope is the difference.
    changes = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "mse"}
    changes |= {"loss_agg_mode": "token-mean"}
    objective = read("grpo", {f"{ACTOR}.{key}": value for key, value in changes.items()})
    mask = torch.tensor([[True, True], [True, False]])
    log_prob = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    slopes = objective.kl_gradient(log_prob, -torch.ones(2, 2), mask, {}, (3, 2))
    torch.testing.assert_close(slopes, 0.1 * torch.tensor([[0.0, -1.0], [-2.0, 0.0]]))


def batch(rows=6, width=5):
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, width, generator=generator)
    log_prob = old + 0.2 * torch.randn(rows, width, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    advantages = torch.tensor([1.0, -0.5, 0.0, 0.0, 2.0, -1.0])
    return log_prob * mask, old * mask, advantages[:, None] * mask, mask


def gradient_of(objective, log_prob, old, advantages, mask, rows=slice(None)):
    entropy = torch.linspace(0.1, 2.0, mask.numel()).view_as(mask)
    given = dict.fromkeys(objective.estimator.gives, mask.double())
    fields = {name: f[rows] for name, f in objective.token_fields(entropy, mask, given).items()}
    slopes, sums = objective.gradient(
        log_prob[rows], old[rows], advantages[rows], mask[rows], fields,
        (int(mask.sum()), len(mask)),
    )  # fmt: skip
    return slopes, sums


@pytest.mark.parametrize("name", IN_LAB)
def test_rows_without_advantage_may_be_left_out(name):
    objective = read(name, length=5)
    log_prob, old, advantages, mask = batch()
    if not objective.may_leave_out:
        # Their advantages of 0 change the covariance of the others; or their entropy counts.
        assert name in ("clip_cov", "kl_cov") or objective.has_terms
        return
    slopes, sums = gradient_of(objective, log_prob, old, advantages, mask)
    useful = [0, 1, 4, 5]
    found, found_sums = gradient_of(objective, log_prob, old, advantages, mask, useful)
    assert (slopes[2:4] == 0).all()
    torch.testing.assert_close(found, slopes[useful])
    assert found_sums == pytest.approx(sums)


@pytest.mark.parametrize("name", ["grpo", "hpo"])
def test_a_live_value_that_is_not_finite_is_refused(name):
    log_prob, old, advantages, mask = batch()
    log_prob[0, 0] = torch.nan
    with pytest.raises(DataError, match="log_prob"):
        gradient_of(read(name, length=5), log_prob, old, advantages, mask)
