"""Merges a checkpoint of verl's FSDP engine with verl's own model merger."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Permits torch.load to read the sharded tensors that a shard holds.
import torch.distributed.tensor
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger

from hpo_verl.errors import DataError

# Where verl's merger puts a LoRA adapter, beside weights that were never trained.
ADAPTER = "lora_adapter"


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


def _add_adapter(folder: Path) -> None:
    """Replace the weights of a folder by their sum with its adapter, which is removed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / ADAPTER
    if not json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]:
        raise DataError("lora_train_meta.json does not tell the adapter's lora_alpha")
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    whole: Any = PeftModel.from_pretrained(base, str(adapter))
    whole.merge_and_unload().save_pretrained(folder / "whole")
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    for file in (folder / "whole").glob("model*.safetensors*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "whole")
    shutil.rmtree(adapter)


def merge(checkpoint: Path, target: Path) -> None:
    """Write the model of an `actor` checkpoint folder to an empty one in Hugging Face's format.

    A LoRA adapter is added into the weights, so that the folder loads as any other.
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
            if (target / ADAPTER).is_dir():
                _add_adapter(target)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{checkpoint}: verl's model merger failed: {reason}") from error
