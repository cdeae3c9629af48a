"""One rank of verl's FSDP2 engine with a LoRA adapter; run by test_merged_adapter.py.

Arguments: rank, folder with a tiny model, port. One update is made; what the engine would send to
the rollout, and what it holds before and after, is written to the folder.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from engine_split_worker import make_engine, mini_batch


def whole(engine):
    """Every parameter, gathered from the ranks and copied."""
    return {name: p.full_tensor().detach().clone() for name, p in engine.module.named_parameters()}


def main(rank, folder, port):
    import verl.workers.config as verl_config
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    import hpo_verl.verl_plugin.main  # noqa: F401

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    engine = make_engine(folder, lr=0.1, lora_rank=4, lora={"merge": True})
    config = verl_config.ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="token-mean"
    )
    before = whole(engine)
    data = mini_batch(range(rank * 4, rank * 4 + 4), 2)
    tu.assign_non_tensor(data, global_batch_size=8)
    with engine.train_mode():
        engine.train_batch(data, partial(ppo_loss, config=config))
    after = whole(engine)
    weights, settings = engine.get_per_tensor_param()
    # As the rollout's side does, which sends a bucket once it is full.
    sent = dict(weights)
    if rank == 0:
        torch.save(
            {"before": before, "after": after, "sent": sent, "end": whole(engine)},
            folder / "merged.pt",
        )
        assert settings is None
    else:
        whole(engine)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
