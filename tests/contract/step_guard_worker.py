"""One rank of verl's FSDP2 engine on CPU; run by test_step_guard_engine.py.

Arguments: rank, folder with a tiny model, port. Two ranks train half of a
mini-batch each, in two packed micro-batches, with one fault after another. What
each update left is written to the folder.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from engine_split_worker import make_engine, mini_batch

from hpo_verl.algorithms.registry import ALGORITHMS

# Loss -> aggregation, of every recipe.
MODES = {one.loss.name: one.loss_agg_mode for one in ALGORITHMS.values()}
NAN, INF = float("nan"), float("inf")
ROWS = {0: range(4), 1: range(4, 8)}


def state(engine):
    """This rank's part of weights and optimizer state, copied."""

    def local(tensor):
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()

    copied = {name: local(p) for name, p in engine.module.named_parameters()}
    for index, entries in engine.optimizer.state_dict()["state"].items():
        copied |= {f"{index}.{key}": local(torch.as_tensor(v)) for key, v in entries.items()}
    return copied


def same(before, after):
    return set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


def batch(rank, change=None, **settings):
    data = mini_batch(ROWS[rank], 2)
    # Rows 0 to 3 and 4 to 7; the last of a rank's rows lies in its second micro-batch.
    if change is not None:
        change(data)
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(data, **settings)
    return data


def put(field, value):
    def change(data):
        data[field].values()[-1] = value

    return change


def scale(field, value):
    def change(data):
        data[field].values().mul_(value)

    return change


def spoil_logits(engine):
    """The model's output holds a NaN at a live token of the second micro-batch."""
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        if len(calls) % 2 == 0:
            output.logits = output.logits.clone()
            # Row 7 has a prompt of four tokens and a response of two; packed, row 6 with its
            # three and four stands before it.
            output.logits[0, 7 + 4] = NAN

    return engine.module.register_forward_hook(hook)


def spoil_backward(engine):
    """Everything is finite forward; the gradient that enters the model is not."""

    def hook(module, inputs, output):
        output.logits.register_hook(lambda gradient: gradient * INF)

    return engine.module.register_forward_hook(hook)


def main(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", WORLD_SIZE="2")
    import verl  # noqa: F401

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from verl.workers.config import ActorConfig, PolicyLossConfig

    from hpo_verl.errors import NotFiniteError
    from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
    from hpo_verl.verl_plugin.engine.step_guard import GuardedLoss, StepGuardSettings

    engine = make_engine(folder, lr=0.01)
    results = {}

    def loss_of(name="hpo", limit=100, **settings):
        config = ActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            loss_agg_mode=MODES[name],
            policy_loss=PolicyLossConfig(loss_mode=name),
            **settings,
        )
        function = partial(loss_with_statistics, config=config)
        return GuardedLoss(function, StepGuardSettings(limit), folder)

    def update(case, loss=None, data=None, spoil=None):
        handle = spoil(engine) if spoil else None
        before = state(engine)
        try:
            with engine.train_mode():
                output = engine.train_batch(
                    data if data is not None else batch(rank), loss or loss_of()
                )
            metrics = output["metrics"]
        except NotFiniteError as error:
            metrics = {"error": str(error)}
        finally:
            if handle:
                handle.remove()
        results[case] = (same(before, state(engine)), metrics)

    one, zero = rank == 1, rank == 0
    update("first")
    update("advantages", data=batch(rank, put("advantages", NAN) if one else None))
    update("old_log_prob", data=batch(rank, put("old_log_probs", INF) if zero else None))
    update("log_prob", spoil=spoil_logits if one else None)
    update("loss", data=batch(rank, scale("advantages", 2e38) if one else None))
    update("gradient", spoil=spoil_backward if one else None)
    update("finite again")
    for name in MODES:
        update(f"good {name}", loss_of(name))
        bad = batch(rank, put("advantages", NAN) if one else None)
        update(f"bad {name}", loss_of(name), bad)
        update(f"log_prob {name}", loss_of(name), spoil=spoil_logits if one else None)
    update("no advantage", data=batch(rank, scale("advantages", 0.0)))
    update("an advantage on one rank", data=batch(rank, scale("advantages", 0.0) if one else None))
    update(
        "no advantage, entropy",
        loss_of(entropy_coeff=0.01),
        batch(rank, scale("advantages", 0.0), calculate_entropy=True),
    )
    for number in (1, 2):
        update(f"row {number}", loss_of(limit=3), batch(rank, put("advantages", NAN)))
    update("between", loss_of(limit=3))
    for number in (1, 2, 3):
        update(f"new row {number}", loss_of(limit=3), batch(rank, put("advantages", NAN)))
    # verl's own update, for comparison: without an advantage it moves the weights.
    update("unguarded", loss_of().function, data=batch(rank, scale("advantages", 0.0)))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
