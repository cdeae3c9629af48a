import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.algorithms import spo as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.spo import SPOSettings, ValueTracker
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.ratios import mean_drift
from hpo_verl.errors import ConfigError, DataError

NAN = float("nan")


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def tracker(prompts=3, initial=None, **changes):
    values = ValueTracker(prompts, SPOSettings(**changes))
    if initial is not None:
        values.start_from(initial)
    return values


def single_stream_advantages(rewards, values, live):
    rollout = Rollout(
        rewards, torch.arange(len(live)), live, live[:, None], True, {"values": values}
    )
    return module.single_stream_advantages(rollout, SPOSettings()).values


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # Differences .5, -.5, .75, -.75: mean 0, variance 1.625 / 3, deviation .735980.
    rewards, values = float64([1, 0, 1, 0]), float64([0.5, 0.5, 0.25, 0.75])
    result = single_stream_advantages(rewards, values, torch.ones(4).bool())
    assert result.tolist() == pytest.approx([0.679366, -0.679366, 1.019049, -1.019049], rel=2e-6)


def test_the_mean_of_the_batch_is_taken_off():
    # Differences .75, -.25, .25: mean .25, deviation .5.
    result = single_stream_advantages(
        float64([1, 0, 1]), float64([0.25, 0.25, 0.75]), torch.ones(3).bool()
    )
    assert result.tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("value", [0.5, 0.3, 1 / 3])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equal_differences_give_exactly_zero(value, rows):
    result = single_stream_advantages(
        torch.ones(rows), torch.full((rows,), value), torch.ones(rows).bool()
    )
    assert (result == 0).all()


def test_rows_that_do_not_count_change_nothing():
    rewards, values = float64([1, 0, 1, 0]), float64([0.5, 0.5, 0.25, 0.75])
    plain = single_stream_advantages(rewards, values, torch.ones(4).bool())
    padded = single_stream_advantages(
        torch.cat([rewards, float64([NAN, 1])]),
        torch.cat([values, float64([0, NAN])]),
        torch.tensor([1, 1, 1, 1, 0, 0]).bool(),
    )
    assert torch.equal(padded[:4], plain)
    assert (padded[4:] == 0).all()


def test_with_one_value_for_all_it_is_grpo_with_the_batch_as_one_group():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (64,), generator=generator).double()
    live = torch.rand(64, generator=generator) < 0.9
    ours = single_stream_advantages(rewards, torch.full((64,), 0.3), live)
    group = group_relative_advantages(rewards, torch.zeros(64, dtype=torch.int64), live)
    torch.testing.assert_close(ours, group.advantages, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- drift and forgetting


def test_drift_is_the_mean_magnitude_over_live_tokens():
    now, last = float64([[-1.0, -2.0, NAN], [-1.0, NAN, NAN]]), float64([[-1.1, -1.7, 0], [0] * 3])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert mean_drift(now, last, mask).tolist() == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    ("drift", "rho"),
    # 2^-(D / .06): 1 is above .96; .9; .5 is below .875.
    [(0.0, 0.96), (0.00912018, 0.9), (0.06, 0.875), (1e6, 0.875)],
)
def test_forgetting_halves_with_the_drift_and_is_clipped(drift, rho):
    assert SPOSettings().forgetting(float64([drift])).item() == pytest.approx(rho, rel=1e-6)


def test_every_setting_of_the_forgetting_counts():
    drift = float64([0.0, 0.03, 0.1])
    rho = SPOSettings(rho_min=0.25, rho_max=0.75, drift_half=0.05).forgetting(drift)
    assert rho.tolist() == pytest.approx([0.75, 2**-0.6, 0.25])
    assert tracker().measures_drift
    constant = SPOSettings(rho_min=0.9, rho_max=0.9)
    assert not ValueTracker(3, constant).measures_drift
    assert constant.forgetting(drift).tolist() == [0.9] * 3


# ---------------------------------------------------------------- tracker


def test_an_update_by_hand():
    values = tracker()
    assert values.values().tolist() == [0.5] * 3
    values.update(torch.tensor([2, 0]), torch.tensor([1.0, 0.25]), torch.tensor([0.9, 0.5]))
    assert values.alpha.tolist() == pytest.approx([0.5, 0.5, 1.45])
    assert values.beta.tolist() == pytest.approx([1.0, 0.5, 0.45])
    assert values.values().tolist() == pytest.approx([1 / 3, 0.5, 1.45 / 1.9])


@pytest.mark.parametrize("successes", [0, 3, 8])
def test_t13_offline_samples_set_the_first_counts(successes):
    offline = [1.0] * successes + [0.0] * (8 - successes)
    values = tracker(2, [offline, []])
    assert values.values()[0].item() == pytest.approx((successes + 0.5) / 9)
    assert (values.alpha + values.beta).tolist() == pytest.approx([8.0, 1.0])
    assert values.alpha[1] == values.beta[1] == 0.5


def test_offline_samples_weigh_as_the_shortest_memory():
    assert tracker(1, [[1.0]], rho_min=0.5).alpha.item() == pytest.approx(2 * 1.5 / 2)


def test_offline_samples_of_another_number_of_prompts_are_refused():
    with pytest.raises(DataError, match=r"^initial_rewards: 1 lists for 3 prompts"):
        tracker(3, [[1.0]])


@pytest.mark.parametrize(("rho", "memory"), [(0.875, 8.0), (0.96, 25.0)])
def test_the_memory_is_one_over_what_is_forgotten(rho, memory):
    values = tracker(1)
    for _ in range(400):
        values.update(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([rho]))
    assert (values.alpha + values.beta).item() == pytest.approx(memory, rel=1e-5)
    assert values.values().item() == pytest.approx(1.0, abs=1e-5)


def test_without_forgetting_it_is_the_average_of_all_responses():
    values, rewards = tracker(1), [1.0, 0.0, 0.0, 1.0, 1.0]
    for reward in rewards:
        values.update(torch.tensor([0]), torch.tensor([reward]), torch.tensor([1.0]))
    assert values.values().item() == pytest.approx((sum(rewards) + 0.5) / 6)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_values_stay_rates_and_weights_stay_positive(updates):
    values = tracker(1, exploration=1e-9)
    for reward, rho in updates:
        values.update(torch.tensor([0]), float64([reward]), float64([rho]))
        assert 0 <= values.values().item() <= 1
        assert 0 < values.sampling_weights().item() <= 0.5 + 1e-8


# ---------------------------------------------------------------- which prompts come next


def test_sampling_weights_by_hand():
    values = tracker(3)
    values.alpha, values.beta = float64([1, 9, 0]), float64([1, 1, 1])
    assert values.sampling_weights().tolist() == pytest.approx([0.55, 0.35, 0.05])
    values.settings = SPOSettings(exploration=0.2)
    assert values.sampling_weights().tolist() == pytest.approx([0.7, 0.5, 0.2])
    values.settings = SPOSettings(prioritized=False)
    assert values.sampling_weights().tolist() == [1, 1, 1]


def test_prompts_are_drawn_by_weight():
    values, generator = tracker(3), torch.Generator().manual_seed(0)
    values.alpha, values.beta = float64([1, 9, 0]), float64([1, 1, 1])
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[values.draw(1, generator)] += 1
    # Three standard deviations of a share near a third are 0.022.
    expected = torch.tensor([0.55, 0.35, 0.05]) / 0.95
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.023)


def test_a_draw_holds_no_prompt_twice():
    values, generator = tracker(10), torch.Generator().manual_seed(0)
    assert sorted(values.draw(10, generator)) == list(range(10))
    assert len(set(values.draw(7, generator))) == 7


# ---------------------------------------------------------------- state and settings


def test_a_restored_tracker_goes_on_the_same():
    first, prompts = tracker(5), torch.tensor([1, 3])
    first.update(prompts, torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.9]))
    state = first.state_dict()
    second = tracker(5)
    second.load_state_dict(state)
    for values in (first, second):
        values.update(prompts, torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.95]))
    assert torch.equal(first.alpha, second.alpha)
    assert torch.equal(first.beta, second.beta)
    assert not torch.equal(first.alpha, state["alpha"])


def test_a_state_of_other_prompts_is_refused():
    with pytest.raises(DataError, match="5 prompts, but the training set has 3"):
        tracker(3).load_state_dict(tracker(5).state_dict())


def test_the_defaults_are_the_papers():
    assert SPOSettings() == SPOSettings(0.875, 0.96, 0.06, 0.05, True, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho_min": 1.0}, "rho_min = 1.0: must be a number in [0, 0.999]"),
        ({"rho_min": -0.1}, "rho_min = -0.1: must be a number in [0, 0.999]"),
        ({"rho_max": 0.8}, "rho_max = 0.8: must be a number in [0.875, 1]"),
        ({"rho_max": 1.1}, "rho_max = 1.1: must be a number in [0.875, 1]"),
        ({"drift_half": 0.0}, "drift_half = 0.0: must be a number in (0, inf)"),
        ({"exploration": 0.0}, "exploration = 0.0: must be a number in (0, inf)"),
        ({"exploration": NAN}, "exploration = nan: must be a number"),
        ({"prioritized": 1}, "prioritized = 1: must be true or false"),
        ({"initial_rewards": 3}, "initial_rewards = 3: must be a path or null"),
        ({"rho_min": "0.9"}, "rho_min = '0.9': must be a number"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'algorithm.spo.{message}')}"):
        SPOSettings(**changes)
