"""Attention of many sequences in one forward pass, each over its own tokens only.

The tokens of all sequences stand side by side, `[1, tokens]`, so that the matrix products of the
layers have no padding; only attention knows who is whose. It is computed for each sequence by
itself, or for several of equal length side by side, which changes no bit of any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hpo_verl.errors import ConfigError

NAME = "hpo_verl_sequences"
# Keys of sequences that lie apart in the cache are copied side by side up to this size (bytes of
# one sequence); above it, a call for each costs less.
COPIED_BYTES = 32_768
# Greatest distance of two ways to compute logits, as a share of their norm; bfloat16 keeps 8 bits.
CLOSE = 0.02
# What some models add to attention, and this one does not compute.
_UNKNOWN = ("softcap", "s_aux", "sliding_window")

Pair = tuple[torch.Tensor, torch.Tensor]


class Sequences(Protocol):
    """Computes the attention of one forward pass."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention of one layer, all of it `[tokens, heads, size]`."""
        ...


@dataclass
class Prompts:
    """Prompts of equal length, with their keys and values `[prompts, length, heads, size]`."""

    length: int
    prompts: list[tuple[int, ...]]
    layers: dict[int, Pair] = field(default_factory=dict)


@dataclass
class PromptPass:
    """Reads prompts that stand one after the other."""

    groups: list[Prompts]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Causal attention within each prompt; see `Sequences`."""
        mixed = query.new_zeros(*query.shape[:-1], value.shape[-1])
        shared = query.shape[1] // key.shape[1]
        start = 0
        for group in self.groups:
            shape = (len(group.prompts), group.length)
            part = slice(start, start + shape[0] * shape[1])
            start = part.stop
            q, k, v = (every[part].unflatten(0, shape) for every in (query, key, value))
            group.layers[layer] = (k, v)
            answer = scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2).repeat_interleave(shared, dim=1),
                v.transpose(1, 2).repeat_interleave(shared, dim=1),
                is_causal=True,
                scale=scaling,
            )
            mixed[part] = answer.transpose(1, 2).flatten(0, 1)
        return mixed


class Cache:
    """Keys and values of sequences that grow, `[places, room, heads, size]` a layer."""

    def __init__(self, places: int, room: int) -> None:
        self._shape = (places, room)
        self._layers: dict[int, Pair] = {}
        # Of the pass that comes next: places in order of length, their lengths, and those of equal
        # length as part of the order, places and length.
        self._places = self._lengths = torch.empty(0, dtype=torch.long)
        self._groups: list[tuple[slice, slice | torch.Tensor, int]] = []

    def fill(self, places: torch.Tensor, group: Prompts, which: torch.Tensor) -> None:
        """Copy the keys and values of prompts, by index into their group, to places."""
        for layer, pair in group.layers.items():
            for own, given in zip(self._own(layer, *pair), pair, strict=True):
                own[places, : group.length] = given[which]

    def begin(self, places: torch.Tensor, lengths: torch.Tensor) -> None:
        """Say which places the next pass adds a token to, in order of these lengths before it."""
        self._places, self._lengths = places, lengths
        self._groups = []
        start = 0
        values, counts = torch.unique_consecutive(lengths, return_counts=True)
        for length, count in zip(values.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            start = part.stop
            here = places[part]
            first, last = int(here[0]), int(here[-1])
            together = last - first == count - 1 and bool((here.diff() == 1).all())
            self._groups.append((part, slice(first, last + 1) if together else here, length + 1))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention of one new token a sequence to all of its own; see `Sequences`."""
        count = len(self._places)
        keys, values = self._own(layer, key, value)
        keys[self._places, self._lengths] = key[:count]
        values[self._places, self._lengths] = value[:count]
        mixed = query.new_zeros(*query.shape[:-1], value.shape[-1])
        heads = key.shape[1]
        entry = keys[0, 0].nbytes + values[0, 0].nbytes
        for part, places, length in self._groups:
            pieces: list[tuple[slice, slice | torch.Tensor]] = [(part, places)]
            if isinstance(places, torch.Tensor) and length * entry > COPIED_BYTES:
                pieces = [
                    (slice(at, at + 1), slice(place, place + 1))
                    for at, place in enumerate(places.tolist(), part.start)
                ]
            for piece, where in pieces:
                # The heads that share a key stand where the tokens of a query would.
                answer = scaled_dot_product_attention(
                    query[piece].unflatten(1, (heads, -1)),
                    keys[where, :length].transpose(1, 2),
                    values[where, :length].transpose(1, 2),
                    scale=scaling,
                )
                mixed[piece] = answer.flatten(1, 2)
        return mixed

    def _own(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Pair:
        if layer not in self._layers:
            self._layers[layer] = (
                key.new_empty(*self._shape, *key.shape[-2:]),
                value.new_empty(*self._shape, *value.shape[-2:]),
            )
        return self._layers[layer]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's own attention, but where the pass says which `sequences` it has."""
    if sequences is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ConfigError(f"rollout hf: attention with {name} is not supported")
    q, k, v = (every[0].transpose(0, 1) for every in (query, key, value))
    return sequences.attend(module.layer_idx, q, k, v, scaling)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> None:
    """Give a model this attention, or raise a ConfigError where it cannot be computed so.

    Without `sequences` it computes as before.
    """
    kind = model.config.model_type
    other = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention"
    }
    if other:
        raise ConfigError(
            f"rollout hf: model type {kind}: layers of {min(other)} are not supported"
        )
    model.set_attn_implementation(NAME)
    tokens = torch.arange(3)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.inference_mode():
            group = Prompts(3, [(0, 1, 2)])
            packed = model(
                input_ids=tokens,
                position_ids=torch.arange(3)[None],
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                sequences=PromptPass([group]),
            ).logits
            plain = model(input_ids=tokens, use_cache=False).logits
        works = len(group.layers) and bool((packed - plain).norm() <= CLOSE * plain.norm())
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        works = False
    if not works:
        raise ConfigError(
            f"rollout hf: model type {kind}: its attention is none that transformers lets replace"
        )
