"""Merges a checkpoint of verl's FSDP engine with verl's own model merger."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

# Registers with torch.load what else than plain tensors a shard may hold.
import torch.distributed.tensor
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger

from hpo_verl.errors import DataError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings, which name nothing that a user could do, off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def check_shards(shards: list[Path]) -> None:
    """Check that shards hold tensors and nothing that would run when they are loaded.

    verl's merger loads them without this restriction, so that a shard from a
    stranger could run anything.

    Raises:
        DataError: names the file.
    """
    for shard in shards:
        try:
            with _quiet():
                torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise DataError(
                f"{shard} is damaged, or holds more than tensors: {str(error).splitlines()[0]}"
            ) from error


def merge(checkpoint: Path, target: Path) -> None:
    """Write the model of an `actor` checkpoint folder as a Hugging Face folder.

    Args:
        checkpoint: folder with the ranks' shards and `huggingface/`.
        target: an existing, empty folder.

    Raises:
        DataError: verl cannot merge the shards.
    """
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
        raise DataError(f"{checkpoint}: verl's model merger failed: {error}") from error
