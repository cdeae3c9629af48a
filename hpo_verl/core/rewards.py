"""Rewards of two values, as methods for verifiable answers assume them."""

from __future__ import annotations

import torch

from hpo_verl.errors import DataError


def successes(rewards: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Tell which responses succeeded, from rewards of 1 and 0, or of 1 and -1.

    Args:
        rewards: One per response, `[batch]`.
        live: Rows that count, `[batch]` bool; the rewards of the others may be anything.

    Returns:
        `[batch]` bool; false for rows that are not live.

    Raises:
        DataError: A live reward is another number, or both 0 and -1 occur: what the third value
            means is for the reward function to say.
    """
    low = -1.0 if bool((live & (rewards == -1.0)).any()) else 0.0
    other = live & (rewards != 1.0) & (rewards != low)
    if bool(other.any()):
        raise DataError(
            f"reward {rewards[other][0].item():g} of response {int(other.nonzero()[0])}: rewards "
            "must be 1 and 0, or 1 and -1"
        )
    return live & (rewards == 1.0)
