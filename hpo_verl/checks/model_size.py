"""A policy's dimensions, from its configuration and the headers of its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo_verl.errors import DataError

OUTPUT_EMBEDDING = "lm_head.weight"
HEAD_NORM = "q_norm.weight"
# Layers that guess further tokens, which transformers leaves out.
UNREAD = "mtp."
# Tokens in a chunk of the gated delta rule.
CHUNK = 64


@dataclass(frozen=True)
class DeltaLayers:
    """Layers with the gated delta rule instead of attention, as in Qwen3.5.

    Attributes:
        layers: number of them.
        heads: of the values; queries and keys are repeated until they have as many.
    """

    layers: int
    key_heads: int
    heads: int
    key_size: int
    value_size: int

    @property
    def key_width(self) -> int:
        """Width of all keys, and of all queries."""
        return self.key_heads * self.key_size

    @property
    def value_width(self) -> int:
        """Width of all values."""
        return self.heads * self.value_size

    @property
    def saved(self) -> int:
        """Values that a layer keeps of a token, beside those of its norms and feed-forward.

        Input and output of the convolution, query and key after their norms, the part of a
        chunk's matrix, gate, and output before and after it.
        """
        convolution = 2 * (2 * self.key_width + self.value_width)
        within = self.heads * (2 * self.key_size + CHUNK)
        return convolution + within + 3 * self.value_width

    @property
    def state_bytes(self) -> int:
        """What vLLM keeps of a response: states in float32, the convolution's input in bfloat16."""
        states = 4 * self.heads * self.key_size * self.value_size
        return self.layers * (states + 2 * 3 * (2 * self.key_width + self.value_width))

    def adapted(self, hidden: int) -> dict[str, int]:
        """Input and output width of each matrix, by its name."""
        return {
            "in_proj_qkv": hidden + 2 * self.key_width + self.value_width,
            **dict.fromkeys(("in_proj_z", "out_proj"), hidden + self.value_width),
            **dict.fromkeys(("in_proj_a", "in_proj_b"), hidden + self.heads),
        }


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a dense decoder.

    Attributes:
        tied: whether input and output embedding are one matrix.
        head_norms: whether queries and keys are normalised, as in Qwen3.
        delta: the layers without attention; where there are some, attention has a gate.
    """

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    head_norms: bool = False
    delta: DeltaLayers | None = None

    @property
    def attention_layers(self) -> int:
        """Layers that have attention."""
        return self.layers - (self.delta.layers if self.delta else 0)

    @property
    def query_width(self) -> int:
        """Width of all queries, which need not be the hidden size."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Width of all keys."""
        return self.key_value_heads * self.head_size

    @property
    def layer_parameters(self) -> float:
        """Parameters of one decoder layer, the last norm shared out."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden_size
        return (self.parameters - embeddings) / self.layers

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values in bfloat16 that one token takes in the cache."""
        return 2 * 2 * self.attention_layers * self.key_width


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor of a model, from the headers of its safetensors files.

    Raises:
        DataError: a file is damaged or cut off, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                names = [name for name in weights.keys() if not name.startswith(UNREAD)]  # noqa: SIM118
                shapes |= {name: weights.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is not a whole safetensors file ({error})") from error
    if not shapes:
        raise DataError(f"{folder} holds no weights (*.safetensors)")
    return shapes


def read_model_size(folder: Path) -> ModelSize:
    """Read a model's dimensions from its `config.json` and the headers of its weights.

    Raises:
        DataError: names the file and what it lacks.
    """
    path, shapes = folder / "config.json", weight_shapes(folder)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # A model that sees images says there what its decoder is.
        config |= config.get("text_config", {})
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        # A shared matrix is stored once; config.json may leave its default out.
        tied = config.get("tie_word_embeddings", OUTPUT_EMBEDDING not in shapes)
        if tied:
            # The files of Qwen3-0.6B hold it twice all the same.
            shapes.pop(OUTPUT_EMBEDDING, None)
        return ModelSize(
            parameters=sum(map(math.prod, shapes.values())),
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            tied=bool(tied),
            head_norms=any(name.endswith(HEAD_NORM) for name in shapes),
            delta=_delta_layers(config),
        )
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}") from error


def _delta_layers(config: dict[str, Any]) -> DeltaLayers | None:
    """The layers without attention; a KeyError names what is missing of them."""
    kinds: list[str] = config.get("layer_types") or []
    layers = kinds.count("linear_attention")
    if not layers:
        return None
    return DeltaLayers(
        layers=layers,
        key_heads=config["linear_num_key_heads"],
        heads=config["linear_num_value_heads"],
        key_size=config["linear_key_head_dim"],
        value_size=config["linear_value_head_dim"],
    )
