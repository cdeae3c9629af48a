"""Write the splits of a dataset in verl's schema: all of them appear, or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.command import staging, write_errors
from data_prep.manifest import PREPARED, write_manifest
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sync

Row = dict[str, Any]

_ROW_GROUP = 10_000


def verl_row(
    data_source: str,
    prompt: list[dict[str, str]],
    ability: str,
    ground_truth: Any,
    extra_info: dict[str, Any],
) -> Row:
    """A row as verl's `RLHFDataset` and reward loop read it; verl uses `extra_info.index`."""
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def write_splits(
    out: str | Path, splits: Mapping[str, Iterable[Row]], made_with: Mapping[str, Any]
) -> dict[str, Path]:
    """Write `<out>/<split>.parquet` for every split, and their manifest, in place of older ones.

    Args:
        out: Folder, made if missing.
        splits: Rows of every split; arrow infers the types from the first of them.
        made_with: What was asked for: source, seed, ...; kept in the files as
            `hpo_verl`, and in the manifest.

    Returns:
        Split name -> path written.

    Raises:
        DataError: The folder or a file cannot be written (no permission, disk
            full, ...), or a split has no rows. Whatever the rows raise passes
            through. In each case nothing new stays behind.
    """
    paths = {split: Path(out) / f"{split}.parquet" for split in splits}
    metadata = {"hpo_verl": json.dumps(made_with)}
    with staging(Path(out)) as folder:
        for split, path in paths.items():
            if path.is_dir():
                raise DataError(f"{path}: is a folder; a file is to be written there")
            batches = _batches(splits[split])
            if not batches:
                raise DataError(f"{path}: the split would have no rows; needed: 1 or more")
            with write_errors(path):
                pq.write_table(
                    pa.Table.from_batches(batches).replace_schema_metadata(metadata),
                    folder / path.name,
                    row_group_size=_ROW_GROUP,
                    compression="zstd",
                    write_page_checksum=True,
                )
                sync(folder / path.name)
        write_manifest(folder, PREPARED, made_with)
        for name in (*(path.name for path in paths.values()), PREPARED):
            os.replace(folder / name, Path(out) / name)
    return paths


def _batches(rows: Iterable[Row]) -> list[pa.RecordBatch]:
    """Rows as arrow's batches, made a group at a time: dictionaries need much memory."""
    left = iter(rows)
    batches: list[pa.RecordBatch] = []
    while group := list(islice(left, _ROW_GROUP)):
        schema = batches[0].schema if batches else None
        batches.append(pa.RecordBatch.from_pylist(group, schema=schema))
    return batches
