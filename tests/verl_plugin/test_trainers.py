import copy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer import config as verl_config
from verl.trainer.ppo import v1
from verl.trainer.ppo.v1 import get_trainer_cls

from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.trainer import modes as trainers
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep

CONFIG = {
    "algorithm": {"adv_estimator": "a_hpo", "use_kl_in_reward": False, "hpo": {"alpha_min": 0.1}},
    "actor_rollout_ref": {
        "actor": {
            "policy_loss": {"loss_mode": "hpo"},
            "loss_agg_mode": "token-mean",
            "clip_ratio": 0.2,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.2,
            "clip_ratio_c": 3.0,
        }
    },
    "trainer": {"v1": {"trainer_mode": "hpo_sync"}},
}


def config(**algorithm):
    result = OmegaConf.create(copy.deepcopy(CONFIG))
    result.algorithm.update(algorithm)
    OmegaConf.set_struct(result, True)
    return result


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_mode_extends_its_parent_and_restores_its_name(mode):
    parent, ours = get_trainer_cls(mode), get_trainer_cls(f"hpo_{mode}")
    assert issubclass(ours, AlgorithmStep)
    assert issubclass(ours, parent)
    assert ours.parent_mode == mode
    seen = {}

    class Parent:
        def __init__(self, config):
            seen["mode"] = config.trainer.v1.trainer_mode
            self.parameter_sync_step = 1

    stand_in = type("StandIn", (AlgorithmStep, Parent), {"parent_mode": ours.parent_mode})
    stand_in(config())
    assert seen["mode"] == mode


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_what_verl_builds_by_the_mode_is_what_it_builds_for_the_parent(mode):
    """The replay buffer, its settings and the synchronisation step of the real trainers."""
    with initialize_config_dir(str(Path(verl_config.__file__).parent), version_base=None):
        composed = compose(
            "ppo_trainer",
            overrides=[
                "algorithm.adv_estimator=grpo",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.actor.ppo_mini_batch_size=256",
                "data.train_batch_size=1024",
                "actor_rollout_ref.rollout.nnodes=1",
                "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
                "trainer.v1.separate_async.parameter_sync_step=4",
            ],
        )

    def built(name):
        own = copy.deepcopy(composed)
        own.trainer.v1.trainer_mode = name
        trainer = get_trainer_cls(name)(own)
        buffer = trainer.replay_buffer
        return (
            type(buffer), trainer.trainer_mode, trainer.parameter_sync_step,
            buffer.trainer_mode, buffer.trainer_config, buffer.max_off_policy_strategy,
        )  # fmt: skip

    assert built(f"hpo_{mode}") == built(mode)


def test_registering_twice_changes_nothing():
    before = get_trainer_cls("hpo_sync")
    trainers.register(v1)
    assert get_trainer_cls("hpo_sync") is before


def test_a_bad_configuration_stops_before_the_parent_starts(caplog):
    class Parent:
        def __init__(self, config):
            raise AssertionError("must not be reached")

    mode = type("Mode", (AlgorithmStep, Parent), {"parent_mode": "sync"})
    with pytest.raises(ConfigError, match=r"algorithm\.hpo\.alpha_min = 7"):
        mode(config(hpo={"alpha_min": 7}))


def test_warnings_are_logged(caplog):
    class Parent:
        parameter_sync_step = 1

        def __init__(self, config):
            pass

    mode = type("Mode", (AlgorithmStep, Parent), {"parent_mode": "sync"})
    changed = config()
    changed.actor_rollout_ref.actor.policy_loss.loss_mode = "someone_elses"
    mode(changed)
    assert "someone_elses" in caplog.text
