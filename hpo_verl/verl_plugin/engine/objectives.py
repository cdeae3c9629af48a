"""Inner products of the gradients of several objectives, measured before verl's own update.

Where the estimator gives advantages of single objectives (`Advantages.objectives`), the trainer
sends each as a column of the mini-batch. The engine here calls verl's own `forward_backward_batch`
once for each, with that column in place of the advantages, and takes the gradients away; verl's
update then starts without any. FSDP's gradients are means over the ranks, sharded: each rank
multiplies its shards, and the products are added up over the ranks among which a parameter is
sharded, not over copies of it.

Logged: `actor/objective_score/NAME`, s_k = sum_j <g_k, g_j>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from hpo_verl.algorithms.base import GradientComparison

COLUMN = "hpo_objective"
"""Beginning of the names of the columns: COLUMN:FIRST:LAST:NAME, of layers and objective."""

SCORE = "actor/objective_score/"
LEARNING_RATE = "actor/objective_lr"
LAYER = re.compile(r"\.layers\.(\d+)\.")


def column(name: str, layers: tuple[int, int]) -> str:
    """Name of the column of an objective."""
    return f"{COLUMN}:{layers[0]}:{layers[1]}:{name}"


def compared_columns(data: Any) -> tuple[dict[str, str], tuple[int, int]]:
    """Columns of a mini-batch by the name of their objective, and the layers to compare."""
    found, layers = {}, (0, 0)
    # A TensorDict itself goes through its rows.
    keys = sorted(map(str, data.keys()))
    for key in filter(lambda one: one.startswith(f"{COLUMN}:"), keys):
        _, first, last, name = key.split(":", 3)
        found[name], layers = key, (int(first), int(last))
    return found, layers


def chosen_parameters(
    module: torch.nn.Module, layers: tuple[int, int]
) -> dict[str, torch.nn.Parameter]:
    """Trained parameters in these layers; all of them where the model has none of these layers."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inside = {}
    for name, parameter in trained.items():
        match = LAYER.search(f".{name}")
        if match is not None and layers[0] <= int(match[1]) <= layers[1]:
            inside[name] = parameter
    return inside or trained


def inner_products(gradients: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Inner products of gradients, `[objectives, objectives]` float64; on all ranks together.

    Each holds the same parameters by name, whole or sharded.
    """
    size = len(gradients)
    parts: dict[Any, torch.Tensor] = {}
    for name, one in gradients[0].items():
        local = [_local(each[name]).double().flatten() for each in gradients]
        key = (one.device_mesh, one.placements) if isinstance(one, DTensor) else None
        stacked = torch.stack(local)
        parts[key] = parts.get(key, 0.0) + stacked @ stacked.T
    total = torch.zeros(size, size, dtype=torch.float64)
    for key, part in parts.items():
        if key is not None:
            mesh, placements = key
            summed = [Partial() if one.is_shard() else Replicate() for one in placements]
            on_mesh = part.to(mesh.device_type)
            part = DTensor.from_local(on_mesh, mesh, summed, run_check=False).full_tensor()
        total += part.cpu()
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pop_comparison(metrics: dict[str, Any]) -> GradientComparison | None:
    """Read a step's comparison of its metrics, where there was one."""
    scores = {k.removeprefix(SCORE): float(metrics[k]) for k in metrics if k.startswith(SCORE)}
    rate = metrics.pop(LEARNING_RATE, None)
    return None if rate is None else GradientComparison(scores, float(rate))


def objectives_engine(parent: type) -> type:
    """Extend `FSDPEngineWithLMHead`, or a class made of it, by comparisons of gradients."""

    class ObjectivesEngine(parent):
        """verl's engine; where there are several objectives, it compares their gradients first."""

        def forward_backward_batch(
            self, data: Any, loss_function: Any, forward_only: bool = False
        ) -> Any:
            """Follow verl's interface; the scores appear in the metrics."""
            columns, layers = ({}, (0, 0)) if forward_only else compared_columns(data)
            if not columns:
                return super().forward_backward_batch(data, loss_function, forward_only)
            scores = self._compare(data, loss_function, columns, layers)
            output = super().forward_backward_batch(data, loss_function, forward_only)
            output["metrics"].update({f"{SCORE}{name}": [one] for name, one in scores.items()})
            output["metrics"][LEARNING_RATE] = [float(self.optimizer.param_groups[0]["lr"])]
            return output

        def _compare(
            self, data: Any, loss_function: Any, columns: Mapping[str, str], layers: tuple[int, int]
        ) -> dict[str, float]:
            """Score of every objective."""
            chosen = chosen_parameters(self.module, layers)
            gradients: list[dict[str, torch.Tensor]] = []
            for key in columns.values():
                probe = data.copy()
                probe["advantages"] = data[key]
                super().forward_backward_batch(probe, loss_function, False)
                found = {n: p.grad.detach() for n, p in chosen.items() if p.grad is not None}
                gradients.append(found)
                self.optimizer.zero_grad(set_to_none=True)
            scaler = getattr(self, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            products = inner_products(gradients) / scale**2
            return dict(zip(columns, products.sum(dim=1).tolist(), strict=True))

    return ObjectivesEngine
