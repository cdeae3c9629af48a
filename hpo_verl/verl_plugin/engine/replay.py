"""A mini-batch whose update was not finite: its file, and its evaluation by `hpo-verl replay`.

`evaluate` calls `actor_loss` again, on the CPU, on what that function saw: checks, policy
loss, aggregation, entropy and KL terms, and the gradient with respect to the log-probabilities.
A recording is a dict of plain values and tensors:

- `found`: text on the first tensor that was not finite; `versions`: of the packages.
- `actor`: the plain settings of verl's actor config, with its `policy_loss`.
- `counts`: verl's counts of the global mini-batch; `mini_batch`: what the loss has of all of it.
- `micro_batches`: for each, tensors by name, `[batch, response]`, on the CPU.

A file may come from anybody. torch's restricted unpickler builds nothing but tensors and plain
values of it; what else is wrong with it shows when the loss is evaluated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.core.masking import not_finite
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine.actor_loss import actor_loss
from hpo_verl.verl_plugin.extras import MINI_BATCH
from hpo_verl.verl_plugin.losses import selected_loss

MAX_BYTES = 1 << 30
TEXT_CHARACTERS = 2000
MASK = "response_mask"
COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")
# Name here -> field of the micro-batch, in the order in which a step makes them.
FIELDS = {
    "old_log_prob": "old_log_probs",
    "ref_log_prob": "ref_log_prob",
    **{name: name for loss in OUR_LOSSES.values() for name in loss.token_fields},
    "rollout_is_weights": "rollout_is_weights",
    "advantages": "advantages",
}
# Name here -> key of the model's output.
OUTPUTS = {
    "log_prob": "log_probs",
    "entropy": "entropy",
    **{
        name: name
        for loss in OUR_LOSSES.values()
        for name in loss.fields
        if name not in loss.token_fields
    },
}

Tensors = dict[str, torch.Tensor]


def loss_tensors(model_output: Mapping[str, Any], data: Any) -> Tensors:
    """What `ppo_loss` reads of a nested micro-batch and of the model's output.

    `[batch, response]` each, without a graph, by the names of `FIELDS` and `OUTPUTS`; a bool mask.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    found = {name: _padded(data[field]).detach() for name, field in FIELDS.items() if field in data}
    for name, key in OUTPUTS.items():
        if model_output.get(key) is not None:
            found[name] = no_padding_2_padding(model_output[key], data).detach()
    return found | {MASK: _padded(data[MASK]).bool()}


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def first_not_finite(tensors: Tensors) -> str | None:
    """Name the first tensor with a live value that is not finite; None if there is none."""
    mask = tensors[MASK]
    names = [name for name in (*FIELDS, *OUTPUTS) if name in tensors]
    bad = torch.stack([(~torch.isfinite(tensors[name]) & mask).any() for name in names])
    # Where all is well, one flag comes from the device.
    if not bool(bad.any()):
        return None
    return next(filter(None, (not_finite(name, tensors[name], mask) for name in names)))


def loss_settings_of(config: Any) -> dict[str, Any]:
    """What a loss reads beside tensors and counts: `actor` and `mini_batch` of a recording."""
    from verl.workers.config import ActorConfig

    summed = extras.get(MINI_BATCH)
    policy_loss = {"policy_loss": _plain(config.policy_loss, config.policy_loss)}
    return {
        # Of the sections in it, a loss reads its own only.
        "actor": _plain(config, ActorConfig, nested=False) | policy_loss,
        MINI_BATCH: summed and list(summed),
    }


def _plain(section: Any, kind: Any, nested: bool = True) -> dict[str, Any]:
    """The plain values of a section of verl's config, as far as a kind of section has them."""
    found = {}
    for field in dataclasses.fields(kind):
        value = getattr(section, field.name)
        if isinstance(value, bool | int | float | str | None):
            found[field.name] = value
        elif nested and dataclasses.is_dataclass(value):
            found[field.name] = _plain(value, value)
    return found


def save(path: Path, recording: Mapping[str, Any]) -> None:
    """Write a recording so that it is there whole or not at all, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        torch.save(recording, stream)
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """Read a file of `save`; nothing in it is executed, and another file raises a DataError."""
    try:
        if not path.is_file():
            raise DataError("no such file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{size} bytes; at most {MAX_BYTES} are read")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise DataError("it is compressed, which torch.save does not do")
        recording = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for index, tensors in enumerate(recording["micro_batches"]):
            shape = tensors[MASK].shape
            for name, tensor in tensors.items():
                if type(tensor) is not torch.Tensor or tensor.shape != shape:
                    raise DataError(f"micro-batch {index}: {name}: must be a tensor like {MASK}")
            # Tensors may share a storage, or repeat one value.
            size -= sum(tensor.nbytes for tensor in tensors.values())
        if size < 0:
            raise DataError("its tensors are larger than the file")
    except Exception as error:
        raise DataError(
            f"{path} is no file of an update that was not finite: {_line(error)}"
        ) from error
    return recording


def _line(what: object) -> str:
    """One line that cannot steer the terminal, whatever a file of somebody else says."""
    return json.dumps(str(what).partition("\n")[0][:TEXT_CHARACTERS])[1:-1]


class _Section(dict[str, Any]):
    """Settings by name, with the access of verl's own configs: as attributes, and by `get`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Section(v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def evaluate(
    tensors: Tensors, recording: Mapping[str, Any]
) -> tuple[float | None, float | None, str | None]:
    """Compute loss and gradient of one of the recording's micro-batches as the actor does.

    Returns:
        The micro-batch's part of the loss, the largest entry of the gradient with respect to
        log_prob, and the first tensor that is not finite. The last is None if all are; the others
        are None if an input is not finite.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig

    found = first_not_finite(tensors)
    if found is not None:
        return None, None, found
    # No class that the settings name is looked up.
    config = ActorConfig(**_Section(recording["actor"]))
    mask = tensors[MASK]
    rows, width = mask.shape
    data = tu.get_tensordict(
        {
            **{field: tensors[name] for name, field in FIELDS.items() if name in tensors},
            "prompts": torch.zeros(rows, 1),
            "responses": torch.zeros(rows, width),
            "attention_mask": torch.ones(rows, 1 + width, dtype=torch.int64),
            MASK: mask,
        },
        non_tensor_dict={key: recording["counts"][key] for key in COUNTS},
    )
    log_prob = tensors["log_prob"].detach().requires_grad_()
    # Behind a prompt of one token; what belongs to a token stands one place before it.
    output = {
        OUTPUTS[name]: torch.nn.functional.pad(tensor, (0, 1)).flatten()
        for name, tensor in (tensors | {"log_prob": log_prob}).items()
        if name in OUTPUTS
    }
    fields, sums, loss = {}, {}, selected_loss(config.policy_loss)
    if loss is not None:
        fields = {name: tensors[name] for name in loss.fields}
        if loss.mini_batch_sums is not None:
            sums[MINI_BATCH] = loss.mini_batch_sums.kind(*recording[MINI_BATCH])
    with extras.provide(**sums), torch.random.fork_rng(devices=[]):
        total, _ = actor_loss(config, output, data, fields=fields)
        value = total.item()
        (gradient,) = torch.autograd.grad(total, log_prob)
    if not bool(torch.isfinite(total)):
        found = f"loss: {value}"
    else:
        found = not_finite("gradient of log_prob", gradient, torch.ones_like(mask))
    return value, gradient.abs().max().item(), found


def first_found(recording: Mapping[str, Any]) -> str | None:
    """Name the first tensor of a mini-batch that is not finite, with its micro-batch."""
    for index, tensors in enumerate(recording["micro_batches"]):
        *_, found = evaluate(tensors, recording)
        if found is not None:
            return f"micro-batch {index}: {found}"
    return None


def report(path: Path) -> list[str]:
    """Evaluate the mini-batch of a file again, and tell of each micro-batch in a line.

    Another file, or one with which the loss cannot be evaluated, raises a DataError.
    """
    recording, first = load(path), None
    try:
        actor = recording["actor"]
        names = f"{actor['policy_loss']['loss_mode']}, {actor['loss_agg_mode']}"
        lines = [f"{path}: loss {_line(names)}", f"recorded: {_line(recording['found'])}"]
        for index, tensors in enumerate(recording["micro_batches"]):
            loss, largest, found = evaluate(tensors, recording)
            shown = found or f"loss {loss:.6g}, largest gradient of log_prob {largest:.6g}"
            where, (rows, width) = f"micro-batch {index}", tensors[MASK].shape
            lines.append(f"{where} [{rows} x {width}]: {shown}")
            first = first or (found and f"{where}: {found}")
    except Exception as error:
        raise DataError(f"{path} cannot be evaluated: {_line(error)}") from error
    nothing = (
        "nothing that the loss reads or returns; what was recorded arose in the model's backward "
        "pass, or on another rank"
    )
    return [
        *lines,
        f"first not finite: {first or nothing}",
        "not evaluated here: the model's forward and backward pass, which the file does not hold",
    ]
