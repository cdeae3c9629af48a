"""The dimensions of a policy, on which memory and disk depend."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo_verl.errors import DataError

OUTPUT_EMBEDDING = "lm_head.weight"


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a dense decoder.

    Attributes:
        parameters: number of them, shared matrices once.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward layer.
        layers: number of decoder layers.
        key_value_heads: per layer.
        head_size: width of an attention head.
        vocabulary: rows of the embedding.
        tied: whether input and output embedding are one matrix.
    """

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the matrices of the vocabulary's size."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden_size

    @property
    def layer_parameters(self) -> float:
        """Parameters of one decoder layer, the last norm shared out."""
        return (self.parameters - self.embedding_parameters) / self.layers

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values in bfloat16 that one token takes in the cache."""
        return 2 * 2 * self.layers * self.key_value_heads * self.head_size


# What config.json of the recipes' models says, for machines that have not fetched them.
KNOWN_MODELS = {
    "Qwen/Qwen2.5-1.5B-Instruct": ModelSize(
        1_543_714_304, 1536, 8960, 28, 2, 128, 151_936, tied=True
    ),
    "Qwen/Qwen2.5-3B-Instruct": ModelSize(
        3_085_938_688, 2048, 11_008, 36, 2, 128, 151_936, tied=True
    ),
    "meta-llama/Llama-3.2-3B-Instruct": ModelSize(
        3_212_749_824, 3072, 8192, 28, 8, 128, 128_256, tied=True
    ),
    "Qwen/Qwen2.5-7B-Instruct": ModelSize(
        7_615_616_512, 3584, 18_944, 28, 4, 128, 152_064, tied=False
    ),
}


def read_model_size(folder: Path) -> ModelSize:
    """Read a model's dimensions from its `config.json` and the headers of its weights.

    Raises:
        DataError: names the file and what it lacks.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        shapes = _weight_shapes(folder)
        return ModelSize(
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            # A shared matrix is stored once; config.json may leave its default out.
            tied=OUTPUT_EMBEDDING not in shapes,
        )
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from error
    except (OSError, ValueError, TypeError, struct.error) as error:
        raise DataError(f"{path}: {error}") from error


def _weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor, from the headers of all safetensors files."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError(f"{file.name}: its header is longer than the file")
            header = json.loads(stream.read(length))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise ValueError("no weights (*.safetensors) beside it")
    return shapes
