"""One rank of verl's FSDP2 engine with a tiny Qwen3.5; run by test_qwen3_5.py.

Arguments: rank, folder with the model, port. The rank's four responses are scored packed into one
row, then each alone, then with a position for each of text, time, height and width, as verl's
agent loop gives them. A stand-in for flash-linear-attention takes the bounds of the sequences;
last it is taken away, and an adapter is put on.
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from engine_split_worker import make_engine, mini_batch, outputs

EXCLUDED = ".*visual.*"


def four_positions(data):
    """The batch with four rows of positions, which are alike for text."""
    flat = data["position_ids"]
    data["position_ids"] = torch.nested.nested_tensor_from_jagged(
        flat.values().expand(4, -1), flat.offsets(), jagged_dim=2
    )
    return data


def rules(engine):
    return [m for m in engine.module.modules() if hasattr(m, "chunk_gated_delta_rule")]


def within_bounds(rule):
    """transformers' gated delta rule for each sequence by itself, as flash-linear-attention."""

    def packed(query, key, value, g, beta, cu_seqlens, **others):
        ends = cu_seqlens.tolist()
        parts = [
            rule(*(t[:, a:b] for t in (query, key, value, g, beta)), **others)[0]
            for a, b in pairwise(ends)
        ]
        return torch.cat(parts, dim=1), None

    return packed


def main(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    import verl  # noqa: F401

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = range(rank * 4, rank * 4 + 4)
    engine = make_engine(folder)
    plain = rules(engine)[0].chunk_gated_delta_rule
    for module in rules(engine):
        module.chunk_gated_delta_rule = within_bounds(plain)
    found = {
        "rows": [row.tolist() for row in mini_batch(rows, 4)["input_ids"].unbind()],
        "packed": outputs(engine, mini_batch(rows, 4)),
        "alone": outputs(engine, mini_batch(rows, 1)),
        "positions": outputs(engine, four_positions(mini_batch(rows, 4))),
    }
    for module in rules(engine):
        module.chunk_gated_delta_rule = plain
    found["without kernel"] = outputs(engine, mini_batch(rows, 4))
    adapted = make_engine(folder, lora_rank=4, exclude_modules=EXCLUDED)
    found["adapter"] = [
        name for name, weight in adapted.module.named_parameters() if weight.requires_grad
    ]
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
