"""Compares what two checkpoints hold, bit for bit."""

import json

import torch
from torch.distributed.tensor import DTensor

from hpo_verl.runs.checkpoints import SEAL


def sealed_files(checkpoint):
    return json.loads((checkpoint / SEAL).read_text())["files"]


def bits(tensor):
    """Kind, shape and bytes of a tensor, so that -0.0 is not 0.0 and NaN is NaN."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    content = local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return type(tensor).__name__, local.dtype, tuple(local.shape), content


def saved_weights(run, step, rank=0, ranks=1):
    """Name -> tensor of a rank's part of a run's checkpoint, as the actor held it."""
    name = f"checkpoints/global_step_{step}/actor/model_world_size_{ranks}_rank_{rank}.pt"
    loaded = torch.load(run / name, weights_only=False)
    return {key: getattr(tensor, "_local_tensor", tensor) for key, tensor in loaded.items()}


def plain(value):
    """Nested containers with every tensor as its bits."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def different_files(one, other):
    """Names of the files of two checkpoints that hold something different.

    torch's archives of weights and optimizer also hold a random id and an order of
    pickling, so they are compared by what is loaded from them; all others by SHA-256.
    """
    first, second = sealed_files(one), sealed_files(other)
    names = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    for name in sorted(names & first.keys() & second.keys()):
        if name.startswith(("actor/model_", "actor/optim_")):
            loaded = [torch.load(path / name, weights_only=False) for path in (one, other)]
            if plain(loaded[0]) == plain(loaded[1]):
                names.discard(name)
    return names
