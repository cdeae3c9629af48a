"""What verl hands to an estimator, read as a `Rollout`, and the parts of a step put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional

from hpo_verl.algorithms.base import REWARD, Rollout
from hpo_verl.core.masking import as_bool_mask, nonempty_rows, require_finite
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras

TOKEN_VALUES = {"entropy": "entropy", "old_log_prob": "old_log_probs"}
"""What an estimator may need of every token, and verl's name of its field."""


def is_reward(name: str) -> bool:
    """Whether what an estimator needs is a number of the reward function."""
    return name.startswith(REWARD)


def group_codes(uids: Iterable[Hashable], size: int) -> tuple[torch.Tensor, list[Hashable]]:
    """Number the groups of a batch in order of appearance.

    Args:
        uids: One hashable label per response; equal labels make a group.
        size: Number of responses.

    Returns:
        `[size]` int64, and the labels as a list.

    Raises:
        DataError: The number of labels differs from `size`, or one is not hashable.
    """
    labels = uids.tolist() if isinstance(uids, (np.ndarray, torch.Tensor)) else list(uids)
    if len(labels) != size:
        raise DataError(f"uid: {len(labels)} labels for {size} responses")
    codes: dict[Hashable, int] = {}
    try:
        numbers = [codes.setdefault(label, len(codes)) for label in labels]
    except TypeError as error:
        raise DataError(f"uid: labels must be hashable ({error})") from error
    return torch.tensor(numbers, dtype=torch.int64), labels


def response_rewards(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the rewards of every response; both arguments are `[batch, response]`.

    A reward may stand at a masked token, since verl puts it at the last token
    even if a tool wrote that one. Finite values there count, others do not.

    Returns:
        Rewards, `[batch]` float32, and which of them can be read, `[batch]` bool: not those of
        rows that are masked whole and hold a value that is not finite.

    Raises:
        DataError: Shapes differ, or a live reward is not finite.
    """
    if token_level_rewards.shape != response_mask.shape or response_mask.dim() != 2:
        raise DataError(
            f"token_level_rewards {tuple(token_level_rewards.shape)} and response_mask "
            f"{tuple(response_mask.shape)} must both be [batch, response]"
        )
    token_level_rewards = token_level_rewards.detach()
    # In float64, so that the order of a sum does not show in float32.
    rewards = token_level_rewards.sum(dim=-1, dtype=torch.float64)
    readable = torch.isfinite(rewards)
    if not bool(readable.all()):
        mask = response_mask != 0
        require_finite("token_level_rewards", token_level_rewards, mask)
        ignored = ~mask & ~torch.isfinite(token_level_rewards)
        rewards = token_level_rewards.masked_fill(ignored, 0.0).sum(dim=-1, dtype=torch.float64)
        readable |= nonempty_rows(mask)
    return rewards.float(), readable


def make_rollout(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    codes: torch.Tensor,
    normalize_by_std: bool = True,
) -> Rollout:
    """Read what verl hands to an estimator, and what a trainer of ours adds, without `extras`.

    verl's padding rows are prompts without a token; so they do not count. A response that a
    rejection has masked counts as long as its prompt has another, as with verl's `grpo`.
    """
    rewards, readable = response_rewards(token_level_rewards, response_mask)
    mask, codes = as_bool_mask(response_mask), codes.to(rewards.device)
    trained = torch.zeros_like(codes, dtype=torch.bool)
    trained[codes[nonempty_rows(mask)]] = True
    live = readable & trained[codes]
    scores, final = extras.get(extras.SCORES), extras.get(extras.FINAL)
    session = extras.get(extras.SESSION)
    if scores is not None:
        scores, _ = response_rewards(scores, response_mask)
    if final is not None:
        final = final.to(rewards.device)
        live &= final == torch.arange(len(final), device=rewards.device)
    if session is not None:
        session = session.to(rewards.device)
    return Rollout(rewards, codes, live, mask, normalize_by_std, {}, scores, final, session)


def joined(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of parts whose prompts all differ; what is no tensor is the last part's."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.shape[1] for part in parts)

    def wide(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([functional.pad(one, (0, width - one.shape[1])) for one in tensors])

    groups, finals, start = [], [], 0
    for part in parts:
        rows = torch.arange(len(part.mask), device=part.mask.device)
        # A part has at most as many groups as rows.
        groups.append(start + part.groups)
        finals.append(start + (rows if part.final is None else part.final))
        start += len(rows)
    found = dict(parts[-1].extras)
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            values = [part.extras[name] for part in parts]
            found[name] = wide(values) if value.dim() > 1 else torch.cat(values)
    scores = [part.scores for part in parts if part.scores is not None]
    sessions = [part.session for part in parts if part.session is not None]
    return parts[-1]._replace(
        rewards=torch.cat([part.rewards for part in parts]),
        groups=torch.cat(groups),
        live=torch.cat([part.live for part in parts]),
        mask=wide(part.mask for part in parts),
        extras=found,
        scores=torch.cat(scores) if scores else None,
        final=torch.cat(finals),
        session=torch.cat(sessions) if sessions else None,
    )
