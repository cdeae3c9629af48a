"""Modulated-hazard policy optimisation, MHPO (arXiv 2603.16929).

    l_t = -exp(psi(r_t) - zeta(r_t)) A_t
    psi(r)  = c tanh(log r / c)                            bounded log-ratio (LFM)
    zeta(r) = (softplus(sg[psi]) / lambda_pos)^k_pos
            + (softplus(-sg[psi]) / lambda_neg)^k_neg      hazard, no gradient (DHP)

No clip and no minimum. The multiplier exp(psi - zeta) (1 - tanh^2) is bounded
by e^c. Note that zeta(1) = 1.328 with the defaults: on-policy the gradient is
0.265 of the plain one, which Adam hides and gradient clipping does not.

The paper averages over the tokens of a response, then over responses
(`seq-mean-token-mean`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import softplus

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss

LARGEST_C = 20.0
"""Beyond it psi would exceed the bound on the log-ratio itself."""


@dataclass(frozen=True)
class MHPOSettings:
    """Settings of MHPO, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        c: Bound of the modified log-ratio, nats, in (0, 20].
        k_pos: Exponent of the hazard of ratios above 1, greater than 0.
        lambda_pos: Scale of that hazard, greater than 0.
        k_neg: Exponent of the hazard of ratios below 1, greater than 0.
        lambda_neg: Scale of that hazard, greater than 0.
    """

    c: float = 1.5
    k_pos: float = 1.5
    lambda_pos: float = 1.0
    k_neg: float = 2.0
    lambda_neg: float = 0.8

    def __post_init__(self) -> None:
        path = "actor_rollout_ref.actor.policy_loss"
        require_number(f"{path}.c", self.c, 0.0, LARGEST_C, open_low=True)
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            require_number(f"{path}.{name}", getattr(self, name), 0.0, open_low=True)


def mhpo_loss(batch: base.TokenBatch, settings: MHPOSettings) -> TokenLoss:
    """MHPO's loss of every token; the slope is l_t (1 - tanh^2(log r_t / c)).

    The hazard zeta carries no gradient.
    """
    tanh = (batch.log_ratio / settings.c).tanh_()
    psi = tanh * settings.c
    above = softplus(psi)
    # softplus(-x) = softplus(x) - x; the difference may round to just below 0.
    below = (above - psi).clamp_(min=0.0)
    hazard = above.div_(settings.lambda_pos).pow_(settings.k_pos)
    hazard += below.div_(settings.lambda_neg).pow_(settings.k_neg)
    values = psi.sub_(hazard).exp_().mul_(batch.advantages).neg_()
    return TokenLoss(values, tanh.square_().neg_().add_(1.0).mul_(values))


ALGORITHMS = (
    base.Algorithm(
        "mhpo",
        ("2603.16929",),
        "-exp(c tanh(log r / c) - sg[zeta(r)]) A",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=base.Loss(
            "mhpo",
            mhpo_loss,
            MHPOSettings,
            aggregations=(base.SEQ_MEAN_TOKEN_MEAN, base.TOKEN_MEAN),
            proportional=True,
        ),
    ),
)
