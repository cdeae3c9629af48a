"""verl's own training loop, saving and loading, around a model of one number, without Ray."""

import os
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.utils import create_rl_sampler
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn

from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle

ROWS, BATCH, STEPS = 13, 4, 8
"""Three steps an epoch, and a row left over."""
MODEL = "model_world_size_1_rank_0.pt"


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {"raw_prompt": [f"row {row}"], "row": torch.tensor(row)}


class Worker:
    """A worker group whose model is one number."""

    weight = 1.0

    def save_checkpoint(self, path, remote, step, max_ckpt_to_keep):
        assert max_ckpt_to_keep is None
        os.makedirs(path)
        torch.save(self.weight, os.path.join(path, MODEL))

    def load_checkpoint(self, local_path, del_local_after_load):
        self.weight = torch.load(os.path.join(local_path, MODEL), weights_only=False)


class Plain(PPOTrainerSync):
    """verl's trainer without Ray: the model learns the rows' numbers in their order."""

    def __init__(self, config):
        self.config, self.trainer_mode = config, "sync"
        self.checkpoint_callback = CheckpointCallback(config)
        self.use_critic = self.use_reference_policy = False
        self.actor_rollout_wg = Worker()
        self.checkpoint_manager = SimpleNamespace(update_weights=lambda step: None)
        self.parameter_sync_step = 1
        self.train_dataset = Rows()
        self.train_dataloader = StatefulDataLoader(
            self.train_dataset, BATCH, num_workers=1, drop_last=True, collate_fn=collate_fn,
            sampler=create_rl_sampler(config.data, self.train_dataset),
        )  # fmt: skip
        self.train_dataloader_it = None
        self.steps_per_epoch = ROWS // BATCH
        self.total_training_steps = config.trainer.total_training_steps
        self.kl_ctrl_in_reward = SimpleNamespace(value=0.1)
        self.memory = {}
        self.last_rows = []

    def step(self, metrics, timing_raw):
        self.last_rows = self._fetch_one_gen_batch()["row"].tolist()
        for row in self.last_rows:
            self.actor_rollout_wg.weight = self.actor_rollout_wg.weight * 0.9 + row
        self.kl_ctrl_in_reward.value *= 1.1
        # As an average over steps, of which every bit counts.
        self.memory |= {
            "alpha": 0.7 * self.memory.get("alpha", 1 / 3) + 0.3 / (1 + sum(self.last_rows))
        }
        return SimpleNamespace(keys=[], partition_id="train")

    def _validate(self):
        # As an estimator that learns from validations.
        self.memory = {**self.memory, "validated": self.actor_rollout_wg.weight}
        return {"val": self.actor_rollout_wg.weight / 2}

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        weight, kl = self.actor_rollout_wg.weight, self.kl_ctrl_in_reward.value
        metrics.update(weight=weight, kl=kl, epoch=epoch, rows=self.last_rows, **self.memory)

    def _shutdown_dump_executor(self):
        pass


class Trainer(LifeCycle, Plain):
    pass


def settings(folder, **trainer):
    return OmegaConf.create(
        {
            "data": {"shuffle": True, "seed": 3, "train_batch_size": BATCH},
            "actor_rollout_ref": {"actor": {}},
            "global_profiler": {"steps": None, "profile_continuous_steps": False},
            "skip": {},
            "trainer": {
                "project_name": "p",
                "experiment_name": "e",
                "logger": ["file"],
                "default_local_dir": str(folder / "checkpoints"),
                "default_hdfs_dir": None,
                "del_local_ckpt_after_load": False,
                "max_actor_ckpt_to_keep": None,
                "max_critic_ckpt_to_keep": None,
                "resume_mode": "disable",
                "resume_from_path": None,
                "total_epochs": 100,
                "total_training_steps": STEPS,
                "save_freq": 1,
                "test_freq": 3,
                "v1": {"trainer_mode": "sync"},
                **trainer,
            },
        }
    )
