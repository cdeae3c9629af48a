"""One rank of verl's FSDP2 engine that compares gradients; run by test_objectives.py.

Arguments: rank, folder with a tiny model, port of a group of one, port of a group of two. Scores
and gradients of every split are written to the folder.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from engine_split_worker import actor_config, gradients, make_engine, mini_batch

LAYERS = {"one": (0, 0), "all": (10, 25)}
SPLITS = {1: (8, 2, None), 2: (4, 1, None)}


def measure(engine, rank, world, layers, size, compared=True):
    """Scores and gradients of a mini-batch, of which each rank has a share."""
    from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
    from hpo_verl.verl_plugin.engine.objectives import SCORE, column

    share = 8 // world
    data = mini_batch(range(rank * share, (rank + 1) * share), size)
    if compared:
        mixed = data["advantages"]
        data[column("mixed", layers)] = mixed.clone()
        data[column("flat", layers)] = torch.ones_like(mixed)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(
            data, partial(loss_with_statistics, config=actor_config())
        )
        # Leaving the mode takes them away.
        found = gradients(engine)
    metrics = output["metrics"]
    return {k.removeprefix(SCORE): v for k, v in metrics.items() if k.startswith(SCORE)}, found


def run(folder, rank, world, name, **engine):
    made = make_engine(folder, lr=0.01, **engine)
    results = {
        (layers, size): measure(made, rank, world, LAYERS[layers], size)
        for layers in LAYERS
        for size in SPLITS[world]
    }
    results["plain"] = measure(made, rank, world, (0, 0), SPLITS[world][0], compared=False)
    torch.save(results, folder / f"{name}{rank}.pt")


def main(rank, folder, alone, together):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    import verl  # noqa: F401

    import hpo_verl.verl_plugin.main  # noqa: F401

    if rank == 0:
        os.environ["WORLD_SIZE"] = "1"
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{alone}", rank=0, world_size=1)
        run(folder, 0, 1, "alone")
        dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{together}", rank=rank, world_size=2)
    run(folder, rank, 2, "shards")
    run(folder, rank, 2, "copies", fsdp_size=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5])
