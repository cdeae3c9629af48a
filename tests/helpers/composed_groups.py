"""An algorithm's group, composed with verl's own tree."""

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict
from verl.trainer import config as verl_config

RECIPES = Path(__file__).parents[2] / "recipes"
VERL = Path(verl_config.__file__).parent


@functools.cache
def composed_once(algorithm):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(VERL), version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"hydra.searchpath=[file://{RECIPES}]",
                f"+algo={algorithm}",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "data.max_response_length=64",
                # As recipes/backend and recipes/run set them.
                "actor_rollout_ref.actor.strategy=fsdp2",
                "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=hpo",
            ],
        )


def composed(algorithm, *overrides):
    """Compose a recipe's group with verl's tree, as a primary config does, then override."""
    config = copy.deepcopy(composed_once(algorithm))
    with open_dict(config):
        config.merge_with_dotlist(list(overrides))
    return config
