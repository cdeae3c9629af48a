"""Comparators: verl's own estimators and losses, with the settings that make them comparable.

GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071) and SAPO
(2511.20347). verl computes them; the recipes hold their settings, and say what was changed.
"""

from __future__ import annotations

from hpo_verl.algorithms.base import (
    CLIP,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    Algorithm,
    Loss,
)

ALGORITHMS = (
    Algorithm("grpo", ("2402.03300",), CLIP, SEQ_MEAN_TOKEN_MEAN),
    Algorithm("grpo_token_mean", ("2402.03300",), CLIP, TOKEN_MEAN),
    Algorithm(
        "dr_grpo",
        ("2503.20783",),
        f"{CLIP}, A = R - mean, divided by a constant length",
        SEQ_MEAN_TOKEN_SUM_NORM,
    ),
    Algorithm(
        "dapo",
        ("2503.14476",),
        f"{CLIP}, e_high > e_low, groups of equal rewards dropped",
        TOKEN_MEAN,
    ),
    Algorithm(
        "gspo",
        ("2507.18071",),
        "-min(s A, clip(s, 1 - e_low, 1 + e_high) A), s = r_seq^(1/|y|)",
        SEQ_MEAN_TOKEN_MEAN,
        loss=Loss("gspo", proportional=True),
    ),
    Algorithm(
        "sapo",
        ("2511.20347",),
        "-sigmoid(tau (r - 1)) (4 / tau) A, tau by the sign of A",
        SEQ_MEAN_TOKEN_MEAN,
        loss=Loss("sapo", proportional=True, always=SEQ_MEAN_TOKEN_MEAN),
    ),
)

OTHER_LOSSES = (
    Loss("dppo_tv", proportional=True),
    Loss("dppo_kl", proportional=True),
    Loss("gpg", proportional=True),
    Loss(
        "geo_mean",
        proportional=True,
        caveat="averages the advantages of a response, so it knows one per response only",
    ),
    Loss("cispo", proportional=True),
    Loss("bypass_mode", proportional=True),
    Loss(
        "clip_cov",
        selects=True,
        caveat="picks the tokens that it stops by their covariance with the advantages",
    ),
    Loss(
        "kl_cov",
        selects=True,
        caveat="picks the tokens that it penalises by their covariance with the advantages",
    ),
    Loss("dro", caveat="adds a quadratic log-ratio penalty that the weight does not reach"),
)
"""Losses of verl without a recipe here, and how they go together with weighted advantages."""
