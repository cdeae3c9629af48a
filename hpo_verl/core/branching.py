"""Where sessions branch: the rollouts of AEPO, agentic (arXiv 2510.14545), as plain arithmetic.

    m   = k sigmoid(beta (H_root - mean H_tool))            sessions from the root, of k in all
    P_t = (alpha + gamma (H_t - H_root)) (1 - Phat(l))      branch after a tool's reply if P_t > tau

H_root is the entropy with which the policy begins to answer the question, H_t that with which it
goes on after a tool's reply; l counts the branchings in a row on the way there, and Phat rises with
it in a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def global_samples(total: int, root: float, tools: Sequence[float], sensitivity: float) -> int:
    """How many of `total` sessions start from the root, 1 to `total`.

    Args:
        total: Sessions of a prompt, the monitored one among them; at least 1.
        root: Entropy at the root of the monitored one, nats.
        tools: Its entropies after a tool's reply, nats; without any, all start from the root.
        sensitivity: beta.
    """
    if not tools:
        return total
    gap = sensitivity * (root - sum(tools) / len(tools))
    # tanh, since exp would overflow.
    share = 0.5 + math.tanh(gap / 2) / 2
    return min(total, max(1, round(total * share)))


def branch_value(change: float, in_a_row: int, base: float, weight: float, penalty: float) -> float:
    """P_t of a change of entropy (nats) after so many branchings in a row.

    Args:
        change: H_t - H_root.
        in_a_row: l.
        base: alpha.
        weight: gamma.
        penalty: What Phat rises by for each of l, up to 1.
    """
    return (base + weight * change) * (1.0 - min(1.0, penalty * in_a_row))
