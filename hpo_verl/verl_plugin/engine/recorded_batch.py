"""A mini-batch whose update was not finite, and how it is evaluated again.

It holds, for each micro-batch, what verl's `ppo_loss` saw of it, and the settings
which that function reads. `evaluate` calls `ppo_loss` itself on them again, on
the CPU: checks, policy loss, aggregation, entropy and KL terms, and the gradient
with respect to the log-probabilities. What lies behind these, the model's own
forward and backward pass, is not in it. Of a rollout correction in `bypass_mode`
only the defaults are evaluated. Its file: `batch_file`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpo_verl.core.masking import not_finite
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.losses import CLIP_BOUNDS, ENTROPY_DEVIATION

MASK = "response_mask"
# Name here -> field of the micro-batch, in the order in which a step makes them.
FIELDS = {
    "old_log_prob": "old_log_probs",
    "ref_log_prob": "ref_log_prob",
    ENTROPY_DEVIATION: ENTROPY_DEVIATION,
    "rollout_is_weights": "rollout_is_weights",
    "advantages": "advantages",
}
# Name here -> key of the model's output.
OUTPUTS = {"log_prob": "log_probs", "entropy": "entropy"}
TOKENS = ("prompts", "responses")
COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")
# What `ppo_loss` and the losses read of verl's actor section.
ACTOR_KEYS = (
    *("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "loss_agg_mode"),
    *("loss_scale_factor", "entropy_coeff", "tau_pos", "tau_neg"),
    *("use_kl_loss", "kl_loss_coef", "kl_loss_type"),
)
TEXT_CHARACTERS = 2000

Tensors = dict[str, torch.Tensor]


class RecordedBatch(NamedTuple):
    """A rank's mini-batch.

    Attributes:
        info: What JSON can hold: settings, counts, and what was found.
        micro_batches: Tensors by name, `[batch, response]` each, on the CPU; `prompts` and
            `responses` are token ids filled up with -1.
    """

    info: dict[str, Any]
    micro_batches: list[Tensors]


class Evaluation(NamedTuple):
    """What a micro-batch gives.

    Attributes:
        loss: The micro-batch's part of the loss; None if its inputs are not finite.
        largest: Largest entry of the gradient with respect to log_prob; None likewise.
        found: The first tensor that is not finite; None if all are.
    """

    loss: float | None
    largest: float | None
    found: str | None


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


def _padded(tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
    return tensor.to_padded_tensor(fill) if tensor.is_nested else tensor


def first_not_finite(tensors: Tensors) -> str | None:
    """Name the first tensor with a live value that is not finite; None if there is none."""
    mask = tensors[MASK]
    names = [name for name in (*FIELDS, *OUTPUTS) if name in tensors]
    bad = torch.stack([(~torch.isfinite(tensors[name]) & mask).any() for name in names])
    # One transfer from the device where all is well.
    if not bool(bad.any()):
        return None
    return next(filter(None, (not_finite(name, tensors[name], mask) for name in names)))


def loss_settings_of(config: Any) -> dict[str, Any]:
    """What JSON can hold of verl's actor config, as far as a loss reads it."""
    values = {name: getattr(config.policy_loss, name) for name in _settings(config.policy_loss)}
    policy_loss = {name: value for name, value in values.items() if _is_plain(value)}
    actor = {key: getattr(config, key) for key in ACTOR_KEYS}
    bounds = (config.policy_loss.get("batch_info", None) or {}).get(CLIP_BOUNDS)
    return {"actor": actor, "policy_loss": policy_loss, CLIP_BOUNDS: bounds and list(bounds)}


def _settings(section: Any) -> dict[str, Any]:
    """Names and defaults of the settings of a dataclass of verl, without its `_target_`."""
    fields = dataclasses.fields(section)
    return {field.name: field.default for field in fields if field.init and field.name[0] != "_"}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a setting's default; a number may be absent."""
    if default is None or type(default) in (int, float):
        return value is None or type(value) in (int, float)
    return type(value) is type(default)


def actor_config(info: Mapping[str, Any]) -> Any:
    """Rebuild verl's actor config from `loss_settings_of`.

    The classes are chosen here, never by the file.

    Raises:
        DataError: A setting is unknown or has no plain value.
        HpoVerlError: A value is out of range.
    """
    from verl.workers.config import ActorConfig, PolicyLossConfig

    from hpo_verl.algorithms.bapo import ClipBounds
    from hpo_verl.verl_plugin import config as typed

    classes = {
        "mhpo": typed.MHPOPolicyLossConfig,
        "hapo": typed.HAPOPolicyLossConfig,
        "bapo": typed.BAPOPolicyLossConfig,
    }
    actor, policy_loss = info["actor"], info["policy_loss"]
    policy_class = classes.get(policy_loss.get("loss_mode"), PolicyLossConfig)
    defaults = _settings(ActorConfig)
    for section, values, permitted in (
        ("actor", actor, {key: defaults[key] for key in ACTOR_KEYS}),
        ("policy_loss", policy_loss, _settings(policy_class)),
    ):
        for key, value in values.items():
            if key not in permitted or not _fits(value, permitted[key]):
                raise DataError(f"{section}.{key} = {value!r}: no setting of this loss")
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy_class(**policy_loss),
        **actor,
    )
    if info[CLIP_BOUNDS] is not None:
        config.policy_loss.batch_info[CLIP_BOUNDS] = ClipBounds(*info[CLIP_BOUNDS])  # type: ignore[attr-defined]
    return config


def evaluate(tensors: Tensors, info: Mapping[str, Any]) -> Evaluation:
    """Compute loss and gradient of a micro-batch as the actor does, up to log_prob.

    Args:
        tensors: One of `RecordedBatch.micro_batches`.
        info: `RecordedBatch.info`.

    Raises:
        HpoVerlError: The settings or the tensors fit no loss.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    from hpo_verl.verl_plugin.entropy import token_fields

    found = first_not_finite(tensors)
    if found is not None:
        return Evaluation(None, None, found)
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
    with token_fields(config, data), torch.random.fork_rng(devices=[]):
        loss, _ = ppo_loss(config, output, data)
        value = loss.item()
        (gradient,) = torch.autograd.grad(loss, log_prob)
    if not bool(torch.isfinite(loss)):
        found = f"loss: {value}"
    else:
        found = not_finite("gradient of log_prob", gradient, torch.ones_like(mask))
    return Evaluation(value, gradient.abs().max().item(), found)


def first_found(batch: RecordedBatch) -> str | None:
    """Name the first tensor of a mini-batch that is not finite, with its micro-batch."""
    for index, tensors in enumerate(batch.micro_batches):
        found = evaluate(tensors, batch.info).found
        if found is not None:
            return f"micro-batch {index}: {found}"
    return None


def with_tokens(tensors: Tensors, tokens: Tensors) -> Tensors:
    """Add the token ids of a micro-batch, and bring everything to the CPU."""
    padded = {name: _padded(ids, -1) for name, ids in tokens.items()}
    return {name: tensor.detach().cpu() for name, tensor in (tensors | padded).items()}


def report(path: Path, batch: RecordedBatch) -> Iterable[str]:
    """Evaluate a recorded batch again, line by line.

    Args:
        path: Its file, for the first line.
        batch: The batch.
    """
    info = batch.info
    mode = info["policy_loss"].get("loss_mode")
    yield f"{path}: loss {mode}, {info['actor'].get('loss_agg_mode')}"
    # Nothing in a file of somebody else may steer the terminal.
    yield f"recorded: {json.dumps(info['found'][:TEXT_CHARACTERS])[1:-1]}"
    first = None
    for index, tensors in enumerate(batch.micro_batches):
        result = evaluate(tensors, info)
        shown = result.found
        if shown is None:
            shown = f"loss {result.loss:.6g}, largest gradient of log_prob {result.largest:.6g}"
        elif first is None:
            first = f"micro-batch {index}: {result.found}"
        rows, width = tensors[MASK].shape
        yield f"micro-batch {index} [{rows} x {width}]: {shown}"
    if first is not None:
        yield f"first not finite: {first}"
    else:
        yield (
            "first not finite: nothing that the loss reads or returns; what was recorded arose in "
            "the model's backward pass, or on another rank"
        )
    yield "not evaluated here: the model's forward and backward pass, which the file does not hold"
