"""Merges a checkpoint of verl's FSDP engine with verl's own model merger."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

# Permits torch.load to read the sharded tensors that a shard holds.
import torch.distributed.tensor
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger

from hpo_verl.errors import DataError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep verl's progress bars and warnings off the screen; none asks the user for anything."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def needed_bytes(shards: list[Path]) -> tuple[int, int]:
    """Check that shards hold tensors only (verl's merger would run code in them).

    Returns:
        Bytes of disk and of memory, at most, that merging them takes: it reads all of them, the
        first twice, and then holds the model in bfloat16 twice.

    Raises:
        DataError: names the file.
    """
    merged = 0
    for shard in shards:
        try:
            with _quiet():
                tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
            merged += sum(2 * getattr(t, "_local_tensor", t).numel() for t in tensors.values())
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{shard} is damaged, or holds more than tensors: {reason}") from error
    sizes = [shard.stat().st_size for shard in shards]
    return merged, sizes[0] + max(sum(sizes), 2 * merged)


def merge(checkpoint: Path, target: Path) -> None:
    """Write the model of an `actor` checkpoint folder to an empty one in Hugging Face's format."""
    config = ModelMergerConfig(
        operation="merge",
        backend="fsdp",
        local_dir=str(checkpoint),
        target_dir=str(target),
        hf_model_config_path=str(checkpoint / "huggingface"),
    )
    try:
        with _quiet():
            FSDPModelMerger(config).merge_and_save()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{checkpoint}: verl's model merger failed: {reason}") from error
