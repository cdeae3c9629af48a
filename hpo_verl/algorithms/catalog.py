"""Every algorithm that a recipe `algo/<name>.yaml` offers.

The shared test suites run over this list, so an entry without its recipe,
its numbers or its place in the paper index fails.
"""

from __future__ import annotations

from typing import NamedTuple

TOKEN_MEAN = "token-mean"  # noqa: S105
SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"  # noqa: S105
SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"  # noqa: S105


class Algorithm(NamedTuple):
    """What one recipe selects.

    Attributes:
        name: Name of the recipe, `algo=<name>`.
        paper: arXiv id.
        equation: Loss of a token or weight of an advantage.
        estimator: `algorithm.adv_estimator`.
        loss: `actor_rollout_ref.actor.policy_loss.loss_mode`.
        loss_agg_mode: Aggregation that the recipe sets, the paper's.
        origin: Package that defines the loss: `hpo_verl` or `verl`.
    """

    name: str
    paper: str
    equation: str
    estimator: str
    loss: str
    loss_agg_mode: str
    origin: str


_CLIP = "-min(r A, clip(r, 1 - e_low, 1 + e_high) A)"

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "a_hpo", "2605.30201", f"{_CLIP}, A < 0 weighted by clip(n+/n-, alpha_min, 1)",
            "a_hpo", "hpo", TOKEN_MEAN, "hpo_verl",
        ),
        Algorithm(
            "hpo", "2605.30201", f"{_CLIP}, A < 0 weighted by alpha",
            "hpo", "hpo", TOKEN_MEAN, "hpo_verl",
        ),
        Algorithm(
            "mhpo", "2603.16929", "-exp(c tanh(log r / c) - sg[zeta(r)]) A",
            "grpo", "mhpo", SEQ_MEAN_TOKEN_MEAN, "hpo_verl",
        ),
        Algorithm("grpo", "2402.03300", _CLIP, "grpo", "vanilla", SEQ_MEAN_TOKEN_MEAN, "verl"),
        Algorithm("grpo_token_mean", "2402.03300", _CLIP, "grpo", "vanilla", TOKEN_MEAN, "verl"),
        Algorithm(
            "dr_grpo", "2503.20783", f"{_CLIP}, A = R - mean, divided by a constant length",
            "grpo", "vanilla", SEQ_MEAN_TOKEN_SUM_NORM, "verl",
        ),
        Algorithm(
            "dapo", "2503.14476", f"{_CLIP}, e_high > e_low, groups of equal rewards dropped",
            "grpo", "vanilla", TOKEN_MEAN, "verl",
        ),
        Algorithm(
            "gspo", "2507.18071", "-min(s A, clip(s, 1 - e_low, 1 + e_high) A), s = r_seq^(1/|y|)",
            "grpo", "gspo", SEQ_MEAN_TOKEN_MEAN, "verl",
        ),
        Algorithm(
            "sapo", "2511.20347", "-sigmoid(tau (r - 1)) (4 / tau) A, tau by the sign of A",
            "grpo", "sapo", SEQ_MEAN_TOKEN_MEAN, "verl",
        ),
        Algorithm(
            "d3s", "2509.22115",
            f"{_CLIP}, A = 0 outside the N responses of largest Var(A) and their K tokens of "
            "largest |A| H",
            "d3s", "vanilla", TOKEN_MEAN, "verl",
        ),
        Algorithm(
            "spo", "2509.13232", f"{_CLIP}, A = whiten(r - v(prompt)), one response a prompt",
            "spo", "vanilla", TOKEN_MEAN, "verl",
        ),
        Algorithm(
            "bapo", "2510.18927", "-min(r A, clip(r, c_low, c_high) A), bounds set per mini-batch",
            "grpo", "bapo", TOKEN_MEAN, "hpo_verl",
        ),
        Algorithm(
            "hapo", "2509.16591", f"{_CLIP}, A and both bounds adapted to each token's entropy",
            "hapo", "hapo", TOKEN_MEAN, "hpo_verl",
        ),
        Algorithm(
            "aepo_advantage", "2510.14545", f"{_CLIP}, A (1 + a z(H)), gradient kept above it",
            "aepo_advantage", "aepo_clip", TOKEN_MEAN, "hpo_verl",
        ),
    )
}  # fmt: skip

LOSS_AGG_MODES: dict[str, tuple[str, ...]] = {
    "hpo": (TOKEN_MEAN,),
    "mhpo": (SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN),
    "bapo": (TOKEN_MEAN,),
    "hapo": (TOKEN_MEAN,),
    "aepo_clip": (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN),
}
"""Aggregations under which our losses are the objective of their paper."""

HYSTERETIC_ESTIMATORS = ("hpo", "a_hpo")

ESTIMATOR_SECTIONS = {
    "hpo": "hpo",
    "a_hpo": "hpo",
    "d3s": "d3s",
    "spo": "spo",
    "hapo": "hapo",
    "aepo_advantage": "aepo_advantage",
}
"""Where under `algorithm` the settings of an estimator of ours stand."""

HOMOGENEOUS_LOSSES = (
    "hpo", "mhpo", "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "cispo",
    "bypass_mode", "hapo", "aepo_clip",
)  # fmt: skip
"""Losses with f(c A) = c f(A) per sign: weighting the advantage is weighting the loss."""

SELECTING_LOSSES: dict[str, str] = {
    "clip_cov": "picks the tokens that it stops by their covariance with the advantages",
    "kl_cov": "picks the tokens that it penalises by their covariance with the advantages",
    "bapo": "sets its clip bounds by the sums of positive and negative advantages",
}
"""Losses that choose what they clip by the advantages: the weight would change it. Refused."""

PENALISED_LOSSES: dict[str, str] = {
    "dro": "adds a quadratic log-ratio penalty that the weight does not reach",
}
"""Losses with a term free of the advantage: the weight shifts the balance. Warned about."""

AVERAGING_LOSSES: dict[str, str] = {
    "geo_mean": "averages the advantages of a response, so it knows one per response only",
}
"""Losses that do not see advantages of single tokens. Refused where tokens are selected."""
