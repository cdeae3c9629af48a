"""Composes and evaluates the algorithm of another package; run by test_out_of_tree.py."""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from verl.trainer import config as verl_config
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass

from hpo_verl.verl_plugin.registered import absent_names
from hpo_verl.verl_plugin.validation import check_algorithm


def main(recipes, *overrides):
    with initialize_config_dir(str(Path(verl_config.__file__).parent), version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                f"hydra.searchpath=[file://{recipes}]",
                "+algo=example",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                *overrides,
            ],
        )
    warnings = check_algorithm(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    log_prob = torch.tensor([[0.3, -0.2]], requires_grad=True)
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=torch.zeros(1, 2),
        log_prob=log_prob,
        advantages=torch.tensor([[1.0, -2.0]]),
        response_mask=torch.ones(1, 2),
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
    )
    loss.backward()
    found = {
        "absent": absent_names(),
        "warnings": warnings,
        "section": type(actor.policy_loss).__name__,
        "loss": loss.item(),
        "gradient": log_prob.grad.flatten().tolist(),
    }
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
