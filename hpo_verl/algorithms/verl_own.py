"""Comparators: verl's own estimators and losses, with the settings that make them comparable.

GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071), LUSPO
(2602.05261) and SAPO (2511.20347). verl computes them; the recipes hold their settings, and say
what was changed.
"""

from __future__ import annotations

from hpo_verl.algorithms import base

GSPO = base.Loss("gspo", proportional=True)

ALGORITHMS = (
    base.Algorithm("grpo", ("2402.03300",), base.CLIP, base.SEQ_MEAN_TOKEN_MEAN),
    base.Algorithm("grpo_token_mean", ("2402.03300",), base.CLIP, base.TOKEN_MEAN),
    base.Algorithm(
        "dr_grpo",
        ("2503.20783",),
        f"{base.CLIP}, A = R - mean, divided by a constant length",
        base.SEQ_MEAN_TOKEN_SUM_NORM,
    ),
    base.Algorithm(
        "dapo",
        ("2503.14476",),
        f"{base.CLIP}, e_high > e_low, groups of equal rewards dropped",
        base.TOKEN_MEAN,
    ),
    base.Algorithm(
        "gspo",
        ("2507.18071",),
        "-min(s A, clip(s, 1 - e_low, 1 + e_high) A), s = r_seq^(1/|y|)",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=GSPO,
    ),
    base.Algorithm(
        "luspo",
        ("2602.05261",),
        "-|y| min(s A, clip(s, 1 - e_low, 1 + e_high) A), s = r_seq^(1/|y|)",
        base.SEQ_MEAN_TOKEN_SUM,
        loss=GSPO,
    ),
    base.Algorithm(
        "sapo",
        ("2511.20347",),
        "-sigmoid(tau (r - 1)) (4 / tau) A, tau by the sign of A",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=base.Loss("sapo", proportional=True, always=base.SEQ_MEAN_TOKEN_MEAN),
    ),
)

OTHER_LOSSES = (
    *(base.Loss(name, proportional=True) for name in ("dppo_tv", "dppo_kl")),
    base.Loss(
        "geo_mean",
        proportional=True,
        caveat="averages the advantages of a response, so it knows one per response only",
    ),
    *(base.Loss(name, proportional=True) for name in ("cispo", "bypass_mode")),
    base.Loss(
        "clip_cov",
        selects=True,
        caveat="picks the tokens that it stops by their covariance with the advantages",
    ),
    base.Loss(
        "kl_cov",
        selects=True,
        caveat="picks the tokens that it penalises by their covariance with the advantages",
    ),
    base.Loss("dro", caveat="adds a quadratic log-ratio penalty that the weight does not reach"),
)
"""Losses of verl without a recipe here, and how they go together with weighted advantages."""
