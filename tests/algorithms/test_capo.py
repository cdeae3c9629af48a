"""CAPO: numbers by hand, the expansion by autograd, and what every setting does."""

import math

import pytest
import torch
from torch.autograd.functional import hvp

from hpo_verl.algorithms import capo
from hpo_verl.algorithms.base import HeadOptimizer, HeadTokens
from hpo_verl.algorithms.capo import FISHER, HESSIAN, MASKED, CAPOSettings, curvature
from hpo_verl.errors import ConfigError

PLAIN = HeadOptimizer(0.1, (0.5, 0.75), 0.0, 0, None)


def objective(batch, settings):
    """PPO's clip, times 1 - the field."""
    ratio = batch.log_ratio.exp()
    clipped = ratio.clamp(1 - batch.clip_range[0], 1 + batch.clip_range[1])
    surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return -surrogate * (1.0 - batch.extras[MASKED])


def one_token(advantage=2.0):
    """pi = (3/4, 1/4), the first token, h = 2: v = (1/4, -1/4), g = A v h = (1, -1)."""
    return HeadTokens(
        hidden=torch.tensor([[2.0]], dtype=torch.float64),
        logits=torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64),
        tokens=torch.tensor([0]),
        advantages=torch.tensor([advantage], dtype=torch.float64),
    )


def some_tokens(count=5, vocabulary=7, hidden=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weight = normal(count, hidden), normal(vocabulary, hidden)
    tokens = torch.randint(0, vocabulary, (count,), generator=generator)
    moments = normal(vocabulary, hidden), normal(vocabulary, hidden).square()
    optimizer = HeadOptimizer(0.1, (0.9, 0.99), 1e-3, 4, moments)
    return HeadTokens(states, states @ weight.T, tokens, normal(count)), weight, optimizer


def test_before_the_first_step_the_gradient_itself_is_the_step():
    # d = lr g = (0.1, -0.1); u = (0.2, -0.2); v'u = 0.1; <g, d> = 0.2; the spread of u is
    # 0.04 - 0.1^2 = 0.03: m_H = 0.2 + (0.01 - 0.03).
    found = curvature(one_token(), PLAIN, CAPOSettings())
    assert found[HESSIAN].tolist() == pytest.approx([0.18], rel=1e-12)
    assert found[FISHER].tolist() == pytest.approx([0.005], rel=1e-12)
    assert found[MASKED].tolist() == [1.0]


def test_the_step_is_adams_with_the_tokens_gradient_as_the_next():
    # t = 2: corrections 3/4 and 7/16. Row 0: (1 + 1) / 2 / (3/4) = 4/3 over sqrt(1.75 / .4375) = 2;
    # row 1: (-1 - 1) / 2 / (3/4) over sqrt(7 / .4375) = 4. With lr 0.15: d = (0.1, -0.05).
    moments = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[2.0], [9.0]]).double()
    kept = [moment.clone() for moment in moments]
    optimizer = HeadOptimizer(0.15, (0.5, 0.75), 0.0, 1, moments)
    found = curvature(one_token(), optimizer, CAPOSettings())
    # u = (0.2, -0.1); v'u = 0.075; m_H = 2 * 0.075 + 0.005625 - (0.0325 - 0.125^2).
    assert found[HESSIAN].tolist() == pytest.approx([0.13875], rel=1e-12)
    assert found[FISHER].tolist() == pytest.approx([0.0028125], rel=1e-12)
    assert all(map(torch.equal, moments, kept))
    larger = curvature(one_token(), optimizer._replace(epsilon=2.0), CAPOSettings())
    # d = 0.15 (4/3 / 4, -4/3 / 6) = (0.05, -1/30): v'u = 1/24.
    assert larger[FISHER].tolist() == pytest.approx([0.5 / 24**2], rel=1e-12)


@pytest.mark.parametrize("stepped", [False, True])
def test_the_change_is_the_second_order_expansion_of_the_tokens_objective(stepped):
    head, weight, optimizer = some_tokens()
    optimizer = optimizer if stepped else optimizer._replace(moments=None)
    found = curvature(head, optimizer, CAPOSettings(top_tokens=0))
    everything = torch.arange(len(weight)).unsqueeze(0)
    for row, (hidden, logits, token, advantage) in enumerate(zip(*head, strict=True)):

        def ratio(w, hidden=hidden, logits=logits, token=token, advantage=advantage):
            probability = (w @ hidden).softmax(-1)[token]
            return advantage * probability / logits.softmax(-1)[token]

        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ratio(leaf), leaf)
        step = capo.adam_step(gradient.unsqueeze(0), everything, optimizer)[0]
        _, curved = hvp(ratio, weight, step)
        expected = (gradient * step).sum() + 0.5 * (step * curved).sum()
        torch.testing.assert_close(found[HESSIAN][row], expected, rtol=1e-9, atol=1e-12)
        log_ratio = (gradient * step).sum() / advantage
        torch.testing.assert_close(found[FISHER][row], 0.5 * log_ratio**2, rtol=1e-9, atol=1e-12)


def test_the_likeliest_tokens_stand_for_the_vocabulary():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 1.0, 2.0]])
    head = HeadTokens(torch.ones(2, 1), logits, torch.tensor([3, 0]), torch.ones(2))
    # The sampled token is there already, or takes the last place.
    assert capo.likeliest(head, 2).tolist() == [[1, 3], [1, 0]]
    assert capo.likeliest(head, 0).sort().values.tolist() == [[0, 1, 2, 3]] * 2
    assert capo.likeliest(head, 9).shape == (2, 4)
    # u = lr A v h h over two of four: v = (-p1, 1 - p3).
    p = logits[0].softmax(-1).tolist()
    found = curvature(head, PLAIN, CAPOSettings(top_tokens=2))
    expected = 0.5 * (0.1 * (p[1] ** 2 + (1 - p[3]) ** 2)) ** 2
    assert found[FISHER][0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({"hessian_high": 0.19, "fisher_high": 0.006}, 0.0),
        ({"hessian_high": 0.17, "fisher_high": 0.006}, 1.0),
        ({"hessian_high": 0.19, "fisher_high": 0.004}, 1.0),
        ({"hessian_high": 0.3, "hessian_low": 0.19, "fisher_high": 0.006}, 1.0),
        ({"hessian_high": 0.3, "hessian_low": 0.17, "fisher_high": 0.006}, 0.0),
    ],
)
def test_both_changes_have_bounds(changes, masked):
    # m_H = 0.18, m_F = 0.005, as above.
    assert curvature(one_token(), PLAIN, CAPOSettings(**changes))[MASKED].tolist() == [masked]


def test_a_negative_advantage_without_history_improves_its_objective_too():
    # g changes its sign and d with it; the second order has the sign of A.
    found = curvature(one_token(-2.0), PLAIN, CAPOSettings())
    assert found[HESSIAN].tolist() == pytest.approx([0.22], rel=1e-12)
    assert found[FISHER].tolist() == pytest.approx([0.005], rel=1e-12)


def test_tokens_are_worked_off_in_parts(monkeypatch):
    head, _, optimizer = some_tokens()
    settings = CAPOSettings(hessian_high=0.1, fisher_high=1e-2)
    whole = curvature(head, optimizer, settings)
    assert 0 < whole[MASKED].sum() < len(whole[MASKED])
    monkeypatch.setattr(capo, "ELEMENTS", 2 * 7 * 3)
    parts = curvature(head, optimizer, settings)
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-12, atol=0)
    none = curvature(HeadTokens(*(one[:0] for one in head)), optimizer, settings)
    assert [values.tolist() for values in none.values()] == [[], [], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hessian_low": 0.02}, r"hessian_low = 0\.02: must be at most hessian_high = 0\.01"),
        ({"hessian_high": float("nan")}, "hessian_high = nan"),
        ({"hessian_low": True}, "hessian_low = True"),
        ({"fisher_high": 0.0}, r"fisher_high = 0\.0: must be a number in \(0"),
        ({"top_tokens": -1}, "top_tokens = -1: must be an integer of at least 0"),
        ({"top_tokens": 1.5}, r"top_tokens = 1\.5: must be an integer"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"^{capo.PATH}\.{message}"):
        CAPOSettings(**changes)
