"""Masks, and checks that see live positions only.

A position is live where the mask is true. What stands elsewhere, even NaN or
infinity, changes no value and no gradient.
"""

from __future__ import annotations

import torch

from hpo_verl.errors import DataError


def as_bool_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of any number type as bool; `mask` itself if it is bool already.

    Raises:
        DataError: A value is neither 0 nor 1.
    """
    if mask.dtype == torch.bool:
        return mask
    live = mask == 1
    if not bool((live | (mask == 0)).all()):
        raise DataError("response_mask must hold 0 and 1 only")
    return live


def nonempty_rows(mask: torch.Tensor) -> torch.Tensor:
    """Tell which rows of a mask of any type, `[batch, response]`, have a live position."""
    if mask.shape[-1] == 0:
        return torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
    rows = mask[:, 0] != 0
    # Nearly every row starts with a live token; only the others need the full scan.
    others = (~rows).nonzero().squeeze(-1)
    rows[others] = (mask[others] != 0).any(dim=-1)
    return rows


def not_finite(name: str, values: torch.Tensor, mask: torch.Tensor) -> str | None:
    """Describe NaN and infinity at live positions of a tensor of any shape.

    Returns:
        Name, count and the first position; None if every live value is finite.
    """
    bad = ~torch.isfinite(values) & mask
    count = int(bad.sum())
    if not count:
        return None
    first = tuple(bad.nonzero()[0].tolist())
    return (
        f"{name}: {count} of {int(mask.sum())} live values are not finite, "
        f"the first at {first} ({values[first].item()})"
    )


def require_finite(name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse NaN and infinity at live positions.

    Raises:
        DataError: The text of `not_finite`.
    """
    text = not_finite(name, values, mask)
    if text is not None:
        raise DataError(text)
