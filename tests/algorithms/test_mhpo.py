import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_batches import token_batch

from hpo_verl.algorithms import mhpo as module
from hpo_verl.algorithms.mhpo import LARGEST_C, MHPOSettings
from hpo_verl.errors import ConfigError


def mhpo_loss(log_ratio, advantages, settings):
    return module.mhpo_loss(token_batch(log_ratio, advantages), settings)


PATH = "actor_rollout_ref.actor.policy_loss"


def loss_of(log_ratio, advantages, **changes):
    return mhpo_loss(
        torch.as_tensor(log_ratio, dtype=torch.float64),
        torch.as_tensor(advantages, dtype=torch.float64),
        MHPOSettings(**changes),
    )


def numpy_loss(log_ratio, advantages, c=1.5, k_pos=1.5, lambda_pos=1.0, k_neg=2.0, lambda_neg=0.8):
    """Value and derivative from the paper's equations; zeta is a constant."""
    psi = c * np.tanh(log_ratio / c)
    zeta = (np.log1p(np.exp(psi)) / lambda_pos) ** k_pos
    zeta += (np.log1p(np.exp(-psi)) / lambda_neg) ** k_neg
    values = -np.exp(psi - zeta) * advantages
    return values, values / np.cosh(log_ratio / c) ** 2


def test_defaults_are_the_papers():
    assert MHPOSettings() == MHPOSettings(
        c=1.5, k_pos=1.5, lambda_pos=1.0, k_neg=2.0, lambda_neg=0.8
    )
    assert LARGEST_C == 20.0


def test_t9_on_policy():
    # psi(1) = 0, zeta(1) = ln2^1.5 + (ln2 / 0.8)^2 = 1.32779, weight e^-zeta = 0.26506.
    loss = loss_of([0.0], [1.0])
    assert loss.values.item() == pytest.approx(-0.26506, abs=5e-6)
    assert loss.slopes.item() == loss.values.item()
    assert -np.log(-loss.values.item()) == pytest.approx(1.32779, abs=5e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"c": 0.5},
        {"c": 20.0},
        {"k_pos": 1.0, "k_neg": 1.0},
        {"k_pos": 2.5},
        {"k_neg": 2.5},
        {"lambda_pos": 2.0},
        {"lambda_neg": 2.0},
    ],
)
def test_agrees_with_the_equations(changes):
    generator = torch.Generator().manual_seed(3)
    log_ratio = 2 * torch.randn(32, 16, generator=generator, dtype=torch.float64)
    advantages = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    loss = loss_of(log_ratio.clone(), advantages, **changes)
    values, slopes = numpy_loss(log_ratio.numpy(), advantages.numpy(), **changes)
    np.testing.assert_allclose(loss.values, values, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(loss.slopes, slopes, rtol=1e-7, atol=1e-12)


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    psi = settings.c * torch.tanh(batch.log_ratio / settings.c)
    above = torch.nn.functional.softplus(psi) / settings.lambda_pos
    below = torch.nn.functional.softplus(-psi) / settings.lambda_neg
    hazard = (above**settings.k_pos + below**settings.k_neg).detach()
    return -torch.exp(psi - hazard) * batch.advantages


@given(st.floats(-20, 20), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_t9_the_multiplier_is_bounded(log_ratio, c):
    loss = loss_of([log_ratio], [1.0], c=c)
    assert 0 <= -loss.slopes.item() <= np.exp(c)
    assert abs(loss.slopes.item()) <= abs(loss.values.item()) + 1e-15


@pytest.mark.parametrize("log_ratio", [-20.0, 20.0])
@pytest.mark.parametrize("changes", [{}, {"c": 20.0}, {"k_pos": 50.0}, {"lambda_neg": 1e-30}])
def test_extremes_stay_finite_in_float32(log_ratio, changes):
    loss = mhpo_loss(torch.tensor([log_ratio]), torch.tensor([-1.0]), MHPOSettings(**changes))
    assert torch.isfinite(loss.values).all()
    assert torch.isfinite(loss.slopes).all()


def test_the_rounding_of_softplus_never_makes_a_hazard_undefined():
    # softplus(x) - x rounds below 0 somewhere in here; a power of it would be NaN.
    log_ratio = torch.linspace(0, 20, 20001)
    loss = mhpo_loss(log_ratio, torch.ones(20001), MHPOSettings(c=20.0, k_neg=1.5))
    assert torch.isfinite(loss.values).all()


@pytest.mark.parametrize("name", ["c", "k_pos", "lambda_pos", "k_neg", "lambda_neg"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1.5", None, True])
def test_settings_out_of_range_are_refused_by_their_path(name, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{PATH}.{name} = {value!r}: must be')}"):
        MHPOSettings(**{name: value})


def test_c_ends_at_the_bound_of_the_log_ratio():
    assert MHPOSettings(c=20).c == 20
    with pytest.raises(ConfigError, match=r"must be a number in \(0, 20\]"):
        MHPOSettings(c=20.1)


@pytest.mark.parametrize("name", ["k_pos", "lambda_pos", "k_neg", "lambda_neg"])
def test_the_other_settings_have_no_upper_end(name):
    assert getattr(MHPOSettings(**{name: 1e3}), name) == 1e3
    with pytest.raises(ConfigError, match=r"must be a number in \(0, inf\)"):
        MHPOSettings(**{name: 0})
