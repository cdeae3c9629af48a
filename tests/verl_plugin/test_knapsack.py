"""Knapsack RL in the trainer: responses a prompt by its success rate, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from hpo_verl.algorithms.base import Rollout
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.knapsack import COLUMN, knapsack_settings
from hpo_verl.verl_plugin.run_validation import check_sampling
from hpo_verl.verl_plugin.trainer.prompts import ROW, Curriculum, Knapsack


def config(values=None, mode="hpo_sync", **others):
    given = {
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {
            "rollout": {"n": 4, "custom": {"knapsack": values or {"enable": True}}}
        },
        "data": {"train_batch_size": 3, "shuffle": True, "seed": 0},
        "trainer": {"v1": {"trainer_mode": mode, "sampler": {}}},
    }
    result = OmegaConf.create(given)
    for key, value in others.items():
        OmegaConf.update(result, key, value, force_add=True)
    return result


class Parent:
    """What verl's trainer does around the part tested here."""

    total_training_steps, global_steps = 6, 1

    def __init__(self, config):
        self.config = config
        self._init_dataloader()

    def _init_dataloader(self):
        self.train_dataset = [
            {"raw_prompt": [f"p{row}"], "extra_info": {"d": row}, "dummy": torch.zeros(1)}
            for row in range(7)
        ]
        self.train_dataloader = "verl's"

    def prepare_step(self):
        batch = tu.get_tensordict(next(self.batches))
        self.rows = list(batch[ROW])
        uids = np.array([f"u{row}" for row in self.rows], dtype=object)
        tu.assign_non_tensor_stack(batch, "uid", uids)
        self._submit_batch_to_rollout(batch)
        return {}

    def _submit_batch_to_rollout(self, batch):
        assert ROW not in batch
        # As verl's agent loops read it.
        self.numbers = [batch[i][COLUMN] for i in range(len(batch))]
        return len(batch)


class Mode(Knapsack, Curriculum, Parent):
    pass


@pytest.fixture
def trainer():
    result = Mode(config())
    result.batches = iter(result.train_dataloader)
    return result


def answered(trainer, rewards, scores=None):
    """The responses of a step: rewards by prompt, and a padding row."""
    labels = [f"u{row}" for row, own in zip(trainer.rows, rewards, strict=True) for _ in own]
    values = torch.tensor([reward for own in rewards for reward in own] + [9.0])
    live = torch.ones(len(values), dtype=torch.bool)
    live[-1] = False
    mask = live.unsqueeze(-1)
    return Rollout(values, torch.zeros(len(values)), live, mask, scores=scores), [*labels, "pad"]


def test_a_step_deals_by_the_rates_of_the_last_time(trainer):
    assert trainer.prepare_step() == {}
    assert trainer.numbers == [4, 4, 4]
    part, labels = answered(trainer, [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [0.1, 1.0, 2.0, 1.0]])
    assert trainer.note_rewards(part, labels) == {
        "knapsack_most": 4.0, "knapsack_known_fraction": 0.0,
    }  # fmt: skip
    first = trainer.rows
    assert trainer.success_rates == dict(zip(map(str, first), [0.5, 0.0, 1.0], strict=True))
    # Rows that were not seen, then the first ones again.
    trainer.prepare_step()
    assert trainer.numbers == [4, 4, 4]
    trainer.batches = iter([{**batch} for batch in collated(trainer, [first])])
    trainer.prepare_step()
    assert trainer.numbers == [8, 2, 2]
    part, labels = answered(trainer, [[0.0] * 7 + [1.0], [0.0, 1.0], [1.0, 1.0]])
    assert trainer.note_rewards(part, labels) == {
        "knapsack_most": 8.0, "knapsack_known_fraction": 1.0,
    }  # fmt: skip
    assert [trainer.success_rates[str(row)] for row in first] == [0.125, 0.5, 1.0]


def collated(trainer, batches):
    """Batches of chosen rows as the trainer's loader makes them."""
    loader = trainer.train_dataloader
    return [loader.collate_fn([loader.dataset[row] for row in rows]) for rows in batches]


def test_scores_before_a_penalty_count(trainer):
    trainer.prepare_step()
    part, labels = answered(trainer, [[1.0] * 4] * 3)
    trainer.note_rewards(part._replace(scores=part.rewards - 1.0), labels)
    assert set(trainer.success_rates.values()) == {0.0}


def test_the_order_is_verls_or_the_curriculums(trainer):
    from torchdata.stateful_dataloader.sampler import RandomSampler

    assert isinstance(trainer.train_dataloader.sampler, RandomSampler)
    staged = Mode(config(**{"data.curriculum": {"by": "d"}}))
    batch = next(iter(staged.train_dataloader))
    assert set(batch[ROW]) <= {0, 1}


def test_without_it_nothing_changes():
    mode = Mode(config({"enable": False}))
    assert mode.train_dataloader == "verl's"
    assert mode.note_rewards(SimpleNamespace(), []) == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"enable": 1}, r"knapsack\.enable = 1: must be true or false"),
        ({"low": 1}, r"knapsack\.low = 1: must be an integer of at least 2"),
        ({"low": 3.5}, r"low = 3\.5: must be an integer"),
        ({"low": 9, "high": 8}, r"high = 8: must be an integer of at least 9"),
        ({"hihg": 8}, r"did you mean actor_rollout_ref\.rollout\.custom\.knapsack\.high\?"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        knapsack_settings(config(values))


def test_what_would_change_the_number_of_responses_is_refused():
    check_sampling(config())
    for mode in ("sync", "hpo_separate_async", "hpo_colocate_async"):
        with pytest.raises(ConfigError, match=rf"trainer_mode = '{mode}': .* needs hpo_sync$"):
            check_sampling(config(mode=mode))
        check_sampling(config({"enable": False}, mode=mode))
    with pytest.raises(ConfigError, match=r"rollout\.n = 1: .* permits 2 \(low\) to 128 \(high\)"):
        check_sampling(config(**{"actor_rollout_ref.rollout.n": 1}))
    for key in ("algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups"):
        with pytest.raises(ConfigError, match=rf"^{key} = True: must be false with actor_"):
            check_sampling(config(**{key: True}))
