"""Hysteretic GRPO: the weight of A-HPO with the length normalisation of GRPO.

    J = (1/N) sum_i (1/|o_i|) sum_t min(r_it w(A_i) A_i,
                                        clip(r_it, 1 - e_low, 1 + e_high) w(A_i) A_i)
    w(A) = 1 for A > 0, clip(n+ / n-, alpha_min, 1) for A < 0

Sources: the weight is A-HPO's (arXiv 2605.30201), with the counts n+ and n-, and every decision
that the paper leaves open, of the record that it is taken from; the mean over the tokens of a
response before the mean over responses is GRPO's (arXiv 2402.03300), here as in the recipe `grpo`
without the KL term. verl computes the loss.

The combination is this project's own: it stands in neither paper, nor in another that is known
here. With alpha = 1 it is GRPO; where all responses are equally long it is A-HPO.

Caution: what speaks for it are runs of the lab, with policies of 0.15 million parameters on short
arithmetic and a synthetic diagnosis task (docs/pages/evidence); with responses sixteen steps old it
was behind GRPO. No language model has been trained with it, and nothing tells that one would gain.
"""

from __future__ import annotations

from hpo_verl.algorithms import base
from hpo_verl.algorithms.hpo import A_HPO

ALGORITHMS = (
    base.Algorithm(
        "hysteretic_grpo",
        ("2605.30201", "2402.03300"),
        f"{A_HPO.equation}, averaged per response",
        base.SEQ_MEAN_TOKEN_MEAN,
        A_HPO.estimator,
        base.VANILLA,
    ),
)
