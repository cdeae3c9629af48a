"""Parquet files of runs: rows of all runs below each other, and in the metadata their facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hpo_verl.errors import DataError
from hpo_verl.runs.files import write_atomically


class Shared:
    """What many runs have in common, kept once; `list` holds it by place."""

    def __init__(self) -> None:
        self.list: list[dict[str, Any]] = []

    def place(self, facts: dict[str, Any]) -> int:
        """Place of some facts, which are added if they are new."""
        if facts not in self.list:
            self.list.append(facts)
        return self.list.index(facts)


def write_runs(
    path: Path, key: bytes, frames: Sequence[pd.DataFrame], facts: Sequence[Any], shared: Shared
) -> None:
    """Write the rows of runs, and their facts as JSON under a key; there whole or not at all.

    Raises:
        DataError: The file cannot be written.
    """
    table = pa.Table.from_pandas(pd.concat(frames), preserve_index=False)
    # The bytes of noisy numbers compress when their exponents stand together.
    noisy = [field.name for field in table.schema if pa.types.is_float32(field.type)]
    others = [name for name in table.column_names if name not in noisy]
    metadata = json.dumps({"shared": shared.list, "runs": list(facts)})
    # Its annotations know of True and False only.
    columns: Any = {"use_dictionary": others, "use_byte_stream_split": noisy}
    buffer = pa.BufferOutputStream()
    table = table.replace_schema_metadata({key: metadata})
    pq.write_table(table, buffer, compression="zstd", compression_level=19, **columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue().to_pybytes())
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error}") from error


def read_runs(
    path: Path, key: bytes, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[pd.DataFrame]]:
    """Facts of the runs of a file, what they share, and their rows without some columns.

    Raises whatever a file makes fail that `write_runs` has not written.
    """
    table = pq.read_table(path)
    metadata = json.loads((table.schema.metadata or {})[key])
    rows = table.drop_columns(list(columns)).to_pandas().astype(float)
    frames, start = [], 0
    for facts in metadata["runs"]:
        end = start + facts.pop("rows")
        frames.append(rows.iloc[start:end].reset_index(drop=True))
        start = end
    return metadata["runs"], metadata["shared"], frames
