"""The file of a mini-batch whose update was not finite.

safetensors with a JSON text in its header: loading it runs no code. Names,
shapes, types and settings are checked, since a file may come from anybody.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpo_verl.errors import DataError, HpoVerlError
from hpo_verl.verl_plugin.engine.recorded_batch import (
    COUNTS,
    FIELDS,
    MASK,
    OUTPUTS,
    TOKENS,
    RecordedBatch,
    Tensors,
    actor_config,
)
from hpo_verl.verl_plugin.losses import CLIP_BOUNDS

FORMAT = "hpo_verl not finite 1"
REQUIRED = {"log_prob", "old_log_prob", "advantages", MASK}
_KEY = re.compile(r"(\d{1,6})/([a-z_]{1,40})")


def save(path: Path, batch: RecordedBatch) -> None:
    """Write a batch so that it is there whole or not at all, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    tensors = {
        f"{index}/{name}": tensor.contiguous()
        for index, micro_batch in enumerate(batch.micro_batches)
        for name, tensor in micro_batch.items()
    }
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    save_file(tensors, partial, {"format": FORMAT, "info": json.dumps(batch.info)})
    # safetensors makes the file anew.
    partial.chmod(0o600)
    os.replace(partial, path)


def load(path: Path) -> RecordedBatch:
    """Read a file of `save`; nothing in it is executed.

    Raises:
        DataError: Names the file and what is wrong with it.
    """
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise DataError(f"{path}: format {header.get('format')!r}, must be {FORMAT!r}")
            info = json.loads(header["info"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return RecordedBatch(_checked_info(info), _checked_tensors(tensors))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except HpoVerlError as error:
        text = str(error)
        raise DataError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no file of a batch that was not finite: {error}") from error


def _checked_info(info: Any) -> dict[str, Any]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    for key in ("actor", "policy_loss", "counts"):
        if not isinstance(info[key], dict):
            raise DataError(f"{key}: must be a mapping")
    for key in COUNTS:
        count = info["counts"][key]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise DataError(f"counts.{key} = {count!r}: must be a positive integer")
    bounds = info[CLIP_BOUNDS]
    if bounds is not None and not (len(bounds) == 3 and all(isinstance(b, float) for b in bounds)):
        raise DataError(f"{CLIP_BOUNDS} = {bounds!r}: must be three numbers")
    if not isinstance(info["found"], str):
        raise DataError("found: must be a text")
    if info["policy_loss"].get("loss_mode") not in POLICY_LOSS_REGISTRY:
        raise DataError(
            f"policy_loss.loss_mode = {info['policy_loss'].get('loss_mode')!r}: unknown"
        )
    actor_config(info)
    return info


def _checked_tensors(tensors: Mapping[str, torch.Tensor]) -> list[Tensors]:
    numbers = (*FIELDS, *OUTPUTS)
    micro_batches: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = match[2] if match else ""
        if match is None or name not in (*numbers, MASK, *TOKENS):
            raise DataError(f"tensor {key!r}: unknown")
        kind_fits = (
            tensor.is_floating_point()
            if name in numbers
            else tensor.dtype == (torch.bool if name == MASK else torch.int64)
        )
        if tensor.dim() != 2 or not kind_fits:
            raise DataError(f"tensor {key!r}: {tensor.dtype}, {tuple(tensor.shape)}")
        micro_batches.setdefault(int(match[1]), {})[name] = tensor
    for index, found in micro_batches.items():
        if not set(found) >= REQUIRED:
            raise DataError(f"micro-batch {index}: lacks {', '.join(REQUIRED - set(found))}")
        shapes = {found[name].shape for name in (*numbers, MASK) if name in found}
        if len(shapes) > 1 or not found[MASK].numel():
            raise DataError(f"micro-batch {index}: shapes {sorted(map(tuple, shapes))}")
    if sorted(micro_batches) != list(range(len(micro_batches))) or not micro_batches:
        raise DataError(f"micro-batches {sorted(micro_batches)}: must be numbered from 0")
    return [micro_batches[index] for index in sorted(micro_batches)]
