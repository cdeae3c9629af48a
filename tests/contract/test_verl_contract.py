"""What the plugin relies on in the installed verl; a change there shows here first."""

import inspect
import subprocess
import sys

import pytest
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.config import ActorConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine.base import BaseEngine
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils import losses as verl_losses

from hpo_verl.algorithms.registry import ALGORITHMS, OUR_LOSSES
from hpo_verl.verl_plugin import losses
from hpo_verl.verl_plugin.knapsack import COLUMN


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", OUR_LOSSES)
def test_our_losses_have_the_signature_of_verls(name):
    ours = core_algos.get_policy_loss_fn(name)
    assert parameters(ours) == parameters(core_algos.compute_policy_loss_vanilla)


def test_verl_calls_a_loss_by_the_keywords_that_ours_take():
    source = inspect.getsource(verl_losses.ppo_loss)
    for keyword in parameters(losses.LOSSES["hpo"]):
        assert f"{keyword}=" in source
    assert 'data["response_mask"].to(bool)' in source


def test_verl_calls_an_estimator_by_the_keywords_that_ours_take():
    from verl.trainer.ppo import ray_trainer

    source = inspect.getsource(ray_trainer.compute_advantage)
    for keyword in ("token_level_rewards", "response_mask", "config", "index", "reward_baselines"):
        assert f'"{keyword}"' in source


def test_agg_loss_takes_the_counts_that_ppo_loss_sets():
    source = inspect.getsource(verl_losses.ppo_loss)
    for count in ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"):
        assert count in parameters(core_algos.agg_loss)
        assert f'global_batch_info["{count}"]' in source


def test_the_methods_that_the_trainer_modes_extend_exist():
    assert parameters(PPOTrainer._compute_advantage) == ["self", "batch", "metrics"]
    assert parameters(PPOTrainer._update_actor) == ["self", "batch", "metrics"]
    assert parameters(PPOTrainer._setup) == ["self"]
    assert parameters(ActorRolloutRefWorker.set_loss_fn) == ["self", "loss_fn"]


def test_agent_loops_take_the_number_of_responses_from_a_column():
    from verl.trainer.ppo.v1 import agent_loop_tq

    assert f'prompt.pop("{COLUMN}", config.n' in inspect.getsource(agent_loop_tq)


def test_no_setting_of_ours_hides_one_of_verls():
    for settings in filter(None, (loss.settings for loss in OUR_LOSSES.values())):
        assert not set(settings.__dataclass_fields__) & set(PolicyLossConfig.__dataclass_fields__)
    for field in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "policy_loss"):
        assert field in ActorConfig.__dataclass_fields__


def test_estimator_and_loss_of_every_record_are_registered():
    for algorithm in ALGORITHMS.values():
        assert core_algos.get_adv_estimator_fn(algorithm.estimator.name)
        assert core_algos.get_policy_loss_fn(algorithm.loss.name)


def test_importing_verl_registers_without_loading_what_holds_the_registries():
    program = (
        "import sys, verl; assert 'hpo_verl.verl_plugin' in sys.modules; "
        "heavy = 'verl.trainer.ppo.core_algos', 'verl.trainer.ppo.v1.trainer_base'; "
        "assert not [name for name in heavy if name in sys.modules]; "
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses; "
        "assert {'hpo', 'mhpo'} <= set(losses); "
        "from verl.trainer.ppo.v1 import get_trainer_cls; "
        "get_trainer_cls('hpo_sync'); print('registered')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip().endswith("registered"), result.stderr


def test_verl_makes_an_update_by_the_methods_that_the_guard_extends():
    source = inspect.getsource(BaseEngine.train_batch)
    calls = [f"self.{name}(" for name in (
        "optimizer_zero_grad", "forward_backward_batch", "optimizer_step"
    )]  # fmt: skip
    positions = [source.index(call) for call in calls]
    assert positions == sorted(positions)
    for call in calls:
        assert source.count(call) == 1


def test_verl_has_no_revision_for_a_model():
    """Recipes would pin one otherwise; docs/pages/recipes.md says how it is done instead."""
    assert "revision" not in HFModelConfig.__dataclass_fields__
