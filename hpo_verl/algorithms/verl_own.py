"""Comparators: verl's own estimators and losses, with the settings that make them comparable.

GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071), LUSPO
(2602.05261), SAPO (2511.20347), CISPO (2506.13585), DPPO-Binary-TV (2602.04879), Clip-Cov and
KL-Cov (2505.22617), RLOO (2402.14740), OPO (2505.23585) and REINFORCE++ (2501.03262). verl computes
them; the recipes hold their settings, and say what was changed and what verl does not read.

verl's code was read for every one. Of the papers: REINFORCE++ (v9, Eq. 1, 4 and 5) in its text;
Clip-Cov, KL-Cov, DPPO, LUSPO, CISPO, OPO and RLOO in their authors' or others' code and notes.
"""

from __future__ import annotations

from hpo_verl.algorithms import base

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
        loss=base.GSPO,
    ),
    base.Algorithm(
        "luspo",
        ("2602.05261",),
        "-|y| min(s A, clip(s, 1 - e_low, 1 + e_high) A), s = r_seq^(1/|y|)",
        base.SEQ_MEAN_TOKEN_SUM,
        loss=base.GSPO,
    ),
    base.Algorithm(
        "cispo",
        ("2506.13585",),
        "-sg[min(r, 1 + e_high)] A log pi",
        base.TOKEN_MEAN,
        loss=base.Loss("cispo", proportional=True),
    ),
    base.Algorithm(
        "dppo_tv",
        ("2602.04879",),
        "-sg[min(r, c)] A log pi, stopped where |pi - pi_old| > e in the direction of A",
        base.SEQ_MEAN_TOKEN_SUM_NORM,
        loss=base.Loss("dppo_tv", proportional=True),
    ),
    base.Algorithm(
        "clip_cov",
        ("2505.22617",),
        f"{base.CLIP}, some tokens of high covariance of A and log pi stopped",
        base.TOKEN_MEAN,
        loss=base.Loss(
            "clip_cov",
            selects=True,
            caveat="picks the tokens that it stops by their covariance with the advantages",
        ),
    ),
    base.Algorithm(
        "kl_cov",
        ("2505.22617",),
        "-r A, + c |log r| for the tokens of the highest covariance of A and log pi",
        base.TOKEN_MEAN,
        loss=base.Loss(
            "kl_cov",
            selects=True,
            caveat="picks the tokens that it penalises by their covariance with the advantages",
        ),
    ),
    base.Algorithm(
        "rloo",
        ("2402.14740",),
        "-A log pi, A = R - mean of the others' R",
        base.TOKEN_MEAN,
        base.Estimator("rloo"),
        base.REINFORCE,
    ),
    base.Algorithm(
        "opo",
        ("2505.23585",),
        "-A log pi on-policy, A = R - mean of R weighted by length",
        base.TOKEN_MEAN,
        base.Estimator("opo"),
        base.REINFORCE,
    ),
    base.Algorithm(
        "reinforce_plus_plus",
        ("2501.03262",),
        f"{base.CLIP}, A = R whitened over the tokens of the batch",
        base.SEQ_MEAN_TOKEN_MEAN,
        base.Estimator("reinforce_plus_plus", compares=False),
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
    *(base.Loss(name, proportional=True) for name in ("dppo_kl", "bypass_mode")),
    base.Loss(
        "geo_mean",
        proportional=True,
        caveat="averages the advantages of a response, so it knows one per response only",
    ),
    base.Loss("dro", caveat="adds a quadratic log-ratio penalty that the weight does not reach"),
)
"""Losses of verl without a recipe here, and how they go together with weighted advantages."""
