"""A mini-batch whose update was not finite: its file, and its evaluation by `hpo-verl replay`.

For each micro-batch the file holds what verl's `ppo_loss` saw of it, and the settings which that
function reads. `evaluate` calls `ppo_loss` itself on them again, on the CPU: checks, policy loss,
aggregation, entropy and KL terms, and the gradient with respect to the log-probabilities. The
model's own forward and backward pass is not in it.

A file may come from anybody. torch's restricted unpickler builds nothing but tensors and plain
values of it, and all of them are checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.core.masking import not_finite
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.extras import MINI_BATCH

FORMAT = "hpo_verl not finite 2"
MAX_BYTES = 1 << 30
TEXT_CHARACTERS = 2000
MASK = "response_mask"
# Name here -> field of the micro-batch, in the order in which a step makes them.
FIELDS = {
    "old_log_prob": "old_log_probs",
    "ref_log_prob": "ref_log_prob",
    **{name: name for loss in OUR_LOSSES.values() for name in loss.token_fields},
    "rollout_is_weights": "rollout_is_weights",
    "advantages": "advantages",
}
# Name here -> key of the model's output.
OUTPUTS = {"log_prob": "log_probs", "entropy": "entropy"}
NUMBERS = (*FIELDS, *OUTPUTS)
REQUIRED = {"log_prob", "old_log_prob", "advantages", MASK}
COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")

Tensors = dict[str, torch.Tensor]


class RecordedBatch(NamedTuple):
    """A rank's mini-batch.

    Attributes:
        info: Plain values: settings, counts, and what was found.
        micro_batches: Tensors by name, `[batch, response]` each, on the CPU.
    """

    info: dict[str, Any]
    micro_batches: list[Tensors]


# ---------------------------------------------------------------- recording


def loss_tensors(model_output: Mapping[str, Any], data: Any) -> Tensors:
    """Gather what `ppo_loss` reads of a micro-batch, without a graph.

    Args:
        model_output: The model's, nested over prompt and response.
        data: The micro-batch, nested.

    Returns:
        `[batch, response]` each, under the names of `FIELDS` and `OUTPUTS`, and the mask as bool.
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
    names = [name for name in NUMBERS if name in tensors]
    bad = torch.stack([(~torch.isfinite(tensors[name]) & mask).any() for name in names])
    # Where all is well, one flag comes from the device.
    if not bool(bad.any()):
        return None
    return next(filter(None, (not_finite(name, tensors[name], mask) for name in names)))


def loss_settings_of(config: Any) -> dict[str, Any]:
    """The plain settings of verl's actor config, and what the loss has of the whole mini-batch."""
    from verl.workers.config import ActorConfig

    summed = extras.get(MINI_BATCH)
    return {
        "actor": _plain_settings(config, ActorConfig),
        "policy_loss": _nested_settings(config.policy_loss),
        MINI_BATCH: summed and list(summed),
    }


def _plain_settings(section: Any, kind: Any) -> dict[str, Any]:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _nested_settings(section: Any) -> dict[str, Any]:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    nested = {k: _nested_settings(v) for k, v in values.items() if dataclasses.is_dataclass(v)}
    return _plain_settings(section, section) | nested


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------- file


def save(path: Path, batch: RecordedBatch) -> None:
    """Write a batch so that it is there whole or not at all, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)
    # A view would bring all of its storage.
    copies = [{n: tensor.clone() for n, tensor in one.items()} for one in batch.micro_batches]
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        torch.save({"format": FORMAT, "info": batch.info, "micro_batches": copies}, stream)
    os.replace(partial, path)


def load(path: Path) -> RecordedBatch:
    """Read a file of `save`; nothing in it is executed.

    Raises:
        DataError: Names the file and what is wrong with it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise DataError("it is compressed, which torch.save does not do")
        # Mapped, so that no tensor is larger than the file.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        batch = _checked_batch(content)
        # Tensors may share a storage, too.
        if sum(tensor.nbytes for one in batch.micro_batches for tensor in one.values()) > size:
            raise DataError("its tensors are larger than the file")
    except Exception as error:
        raise DataError(
            f"{path} is no file of an update that was not finite: {_line(error)}"
        ) from (error)
    return batch


def _line(what: object) -> str:
    """One line that cannot steer the terminal, whatever a file of somebody else says."""
    return json.dumps(str(what).partition("\n")[0][:TEXT_CHARACTERS])[1:-1]


def _checked_batch(content: Any) -> RecordedBatch:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"its format must be {FORMAT!r}")
    info, micro_batches = content["info"], content["micro_batches"]
    for key in COUNTS:
        count = info["counts"][key]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise DataError(f"counts.{key} = {count!r}: must be a positive integer")
    if not isinstance(info["found"], str):
        raise DataError("found: must be a text")
    summed = info[MINI_BATCH]
    if summed is not None and not all(isinstance(number, float) for number in summed):
        raise DataError(f"{MINI_BATCH} = {summed!r}: must be numbers")
    actor_config(info)
    mini_batch_result(info)
    if not isinstance(micro_batches, list) or not micro_batches:
        raise DataError("micro_batches: must be a list with entries")
    for index, tensors in enumerate(micro_batches):
        _check_tensors(f"micro-batch {index}", tensors)
    return RecordedBatch(info, micro_batches)


def _check_tensors(where: str, tensors: Any) -> None:
    if not isinstance(tensors, dict) or not tensors.keys() >= REQUIRED:
        raise DataError(f"{where}: must hold {', '.join(sorted(REQUIRED))}")
    for name, tensor in tensors.items():
        if name not in (*NUMBERS, MASK):
            raise DataError(f"{where}: tensor {name!r}: unknown")
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
            raise DataError(f"{where}: {name}: must be a plain tensor")
        kind_fits = tensor.dtype == torch.bool if name == MASK else tensor.is_floating_point()
        shape_fits = tensor.dim() == 2 and tensor.shape == tensors[MASK].shape
        if not kind_fits or not shape_fits or not tensor.numel() or not tensor.is_contiguous():
            raise DataError(f"{where}: {name}: {tensor.dtype}, shape {tuple(tensor.shape)}")


# ---------------------------------------------------------------- evaluation


class _Section(dict[str, Any]):
    """Settings by name, with the access of verl's own configs: as attributes, and by `get`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _section(name: str, values: Any) -> _Section:
    if not isinstance(values, dict):
        raise DataError(f"{name}: must be a mapping to numbers and texts")
    return _Section(
        {k: v if _is_plain(v) else _section(f"{name}.{k}", v) for k, v in values.items()}
    )


def actor_config(info: Mapping[str, Any]) -> Any:
    """Rebuild as much of verl's actor config as `loss_settings_of` tells; no class is looked up.

    Raises:
        DataError: A value is neither number nor text.
        TypeError: verl's actor config has no such setting.
    """
    from verl.workers.config import ActorConfig

    policy_loss = _section("policy_loss", info["policy_loss"])
    actor = _section("actor", info["actor"])
    return ActorConfig(**actor, policy_loss=policy_loss)  # type: ignore[arg-type]


def mini_batch_result(info: Mapping[str, Any]) -> Any:
    """Rebuild what the loss made of its sums over the whole mini-batch; None without any."""
    loss = OUR_LOSSES.get(info["policy_loss"].get("loss_mode"))
    if loss is None or loss.mini_batch_sums is None or info[MINI_BATCH] is None:
        return None
    return loss.mini_batch_sums.kind(*info[MINI_BATCH])


def evaluate(
    tensors: Tensors, info: Mapping[str, Any]
) -> tuple[float | None, float | None, str | None]:
    """Compute loss and gradient of a micro-batch as the actor does, up to log_prob.

    Args:
        tensors: One of `RecordedBatch.micro_batches`.
        info: `RecordedBatch.info`.

    Returns:
        The micro-batch's part of the loss, the largest entry of the gradient with respect to
        log_prob, and the first tensor that is not finite. The last is None if all are; the others
        are None if an input is not finite.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    from hpo_verl.verl_plugin.engine.loss_statistics import token_fields

    found = first_not_finite(tensors)
    if found is not None:
        return None, None, found
    config = actor_config(info)
    mask = tensors[MASK]
    rows, width = mask.shape

    def nested(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(tensor.unbind()), layout=torch.jagged)

    def behind_a_prompt(tensor: torch.Tensor) -> torch.Tensor:
        # A prompt of one token; what belongs to a token stands one place before it.
        return torch.nn.functional.pad(tensor, (0, 1)).flatten()

    fields = {field: tensors[name] for name, field in FIELDS.items() if name in tensors}
    empty = {"prompts": torch.zeros(rows, 1), "responses": torch.zeros(rows, width), MASK: mask}
    data = tu.get_tensordict(
        {name: nested(tensor) for name, tensor in (fields | empty).items()},
        non_tensor_dict={key: info["counts"][key] for key in COUNTS},
    )
    log_prob = tensors["log_prob"].detach().requires_grad_()
    output = {"log_probs": behind_a_prompt(log_prob)}
    if "entropy" in tensors:
        output["entropy"] = behind_a_prompt(tensors["entropy"])
    summed = extras.provide(**{MINI_BATCH: mini_batch_result(info)})
    with summed, token_fields(config, data), torch.random.fork_rng(devices=[]):
        loss, _ = ppo_loss(config, output, data)
        value = loss.item()
        (gradient,) = torch.autograd.grad(loss, log_prob)
    if not bool(torch.isfinite(loss)):
        found = f"loss: {value}"
    else:
        found = not_finite("gradient of log_prob", gradient, torch.ones_like(mask))
    return value, gradient.abs().max().item(), found


def first_found(batch: RecordedBatch) -> str | None:
    """Name the first tensor of a mini-batch that is not finite, with its micro-batch."""
    for index, tensors in enumerate(batch.micro_batches):
        *_, found = evaluate(tensors, batch.info)
        if found is not None:
            return f"micro-batch {index}: {found}"
    return None


def report(path: Path, batch: RecordedBatch) -> Iterator[str]:
    """Evaluate the mini-batch of a file again, line by line.

    Raises:
        DataError: The loss cannot be evaluated with what the file holds.
    """
    info, first = batch.info, None
    names = f"{info['policy_loss'].get('loss_mode')}, {info['actor'].get('loss_agg_mode')}"
    yield f"{path}: loss {_line(names)}"
    yield f"recorded: {_line(info['found'])}"
    for index, tensors in enumerate(batch.micro_batches):
        where = f"micro-batch {index}"
        try:
            loss, largest, found = evaluate(tensors, info)
        except Exception as error:
            raise DataError(f"{path}: {where} cannot be evaluated: {_line(error)}") from error
        shown = found or f"loss {loss:.6g}, largest gradient of log_prob {largest:.6g}"
        rows, width = tensors[MASK].shape
        yield f"{where} [{rows} x {width}]: {shown}"
        if found and first is None:
            first = f"{where}: {found}"
    nothing = (
        "nothing that the loss reads or returns; what was recorded arose in the model's backward "
        "pass, or on another rank"
    )
    yield f"first not finite: {first or nothing}"
    yield "not evaluated here: the model's forward and backward pass, which the file does not hold"
