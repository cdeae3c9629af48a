"""The order of a step's responses, how they are dealt to ranks, and what of them is sent there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

from hpo_verl.algorithms.base import REWARD
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.extras import OPENING

# Columns that no worker reads.
FOR_THE_DRIVER_ALONE = {
    *("uid", "data_source", "reward_model", "extra_fields", "num_turns"),
    *("rm_scores", "token_level_rewards", "rollout_log_probs"),
}


def response_order(key: str) -> tuple[str, int, int]:
    """Sort key of TransferQueue's key `{uid}_{session}_{output}` of a response."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


def sort_rows(batch: Any) -> None:
    """Sort a batch by prompt, session and output; verl's padding rows come last."""
    batch.reorder(sorted(range(len(batch.keys)), key=lambda row: response_order(batch.keys[row])))


def ordered_validation(
    data_sources: Sequence[Any], uids: Sequence[str], infos: Mapping[str, Sequence[Any]]
) -> tuple[list[Any], list[str], dict[str, Any]]:
    """The rows of a validation, prompt by prompt, in an order that their values alone decide.

    verl hands them over as they were finished, and a mean of the same numbers in another order may
    differ in its last bit. `infos` are verl's lists by name; one of another length stays as it is.
    """
    whole = {name: values for name, values in sorted(infos.items()) if len(values) == len(uids)}
    shown = [[repr(values[row]) for values in whole.values()] for row in range(len(uids))]
    rows_of: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        rows_of.setdefault(uid, []).append(row)
    groups = [sorted(rows, key=lambda row: shown[row]) for rows in rows_of.values()]
    groups.sort(key=lambda rows: [(str(data_sources[row]), shown[row]) for row in rows])
    order = [row for rows in groups for row in rows]
    ordered = {name: [values[row] for row in order] for name, values in whole.items()}
    return [data_sources[row] for row in order], [uids[row] for row in order], {**infos, **ordered}


def final_outputs(keys: Sequence[str]) -> torch.Tensor:
    """Row of the final output of each row's session, `[rows]` int64."""
    outputs = [response_order(key) for key in keys]
    last = {output[:2]: row for output, row in sorted(zip(outputs, range(len(keys)), strict=True))}
    return torch.tensor([last[output[:2]] for output in outputs], dtype=torch.int64)


def session_numbers(keys: Sequence[str]) -> torch.Tensor:
    """Number of each row's session among those of its prompt, `[rows]` int64."""
    return torch.tensor([response_order(key)[1] for key in keys], dtype=torch.int64)


def output_numbers(keys: Sequence[str]) -> torch.Tensor:
    """Number of each row among the outputs of its session, `[rows]` int64."""
    return torch.tensor([response_order(key)[2] for key in keys], dtype=torch.int64)


def named_rewards(extra_fields: Sequence[Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the reward function returned under each name, `[rows]` float64, by `reward/NAME`.

    verl leaves it in the column `extra_fields`. A row without such a number, as verl's padding
    rows are, has NaN.

    Raises:
        DataError: No row has a number under one of the names.
    """
    fields = [one if isinstance(one, dict) else {} for one in extra_fields]
    returned = [one.get("reward_extra_info") or {} for one in fields]
    found = {}
    for name in names:
        values = [info.get(name) for info in returned]
        numbers = [math.nan if isinstance(one, str | None) else float(one) for one in values]
        if numbers and all(map(math.isnan, numbers)):
            there = sorted({key for info in returned for key in info})
            raise DataError(
                f"the reward function returns no number {name!r}, which the estimator reads; it "
                f"returns {', '.join(there) or 'the reward alone'}"
            )
        found[f"{REWARD}{name}"] = torch.tensor(numbers, dtype=torch.float64)
    return found


def opening_numbers(extra_fields: Sequence[Any]) -> torch.Tensor:
    """Number of each row's opening, `[rows]` int64, of verl's column `extra_fields`; or -1."""
    fields = [one if isinstance(one, dict) else {} for one in extra_fields]
    return torch.tensor([one.get(OPENING, -1) for one in fields], dtype=torch.int64)


def deal_mini_batches(lengths: Sequence[int], mini_batch_size: int, ranks: int) -> list[list[int]]:
    """Deal the rows of every mini-batch to the ranks, about the same work to each.

    Mini-batches, of so many rows over all ranks, are cut in the order of the lengths (tokens).

    Returns:
        For each rank, its rows: its share of the first mini-batch, of the second, ...
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    workloads = calculate_workload(torch.tensor(lengths, dtype=torch.int64))
    for start in range(0, len(lengths), mini_batch_size):
        parts: Any = get_seqlen_balanced_partitions(
            workloads[start : start + mini_batch_size].tolist(), ranks, equal_size=True
        )
        for share, part in zip(shares, parts, strict=True):
            share += [start + row for row in part]
    return shares


def columns_for_workers(batch: Any) -> list[str]:
    """Names of a batch's columns in TransferQueue that a worker may read.

    For short responses, to fetch the rest for every sample by itself costs as much as the update.
    """
    names = kv_batch_meta2batch_meta(batch).field_names
    return [name for name in names if name not in FOR_THE_DRIVER_ALONE]
