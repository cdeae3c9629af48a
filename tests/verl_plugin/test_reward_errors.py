"""The trainer's side of the reward guard: the share of errors, and the end of a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from hpo_verl.errors import DataError, RewardError
from hpo_verl.verl_plugin.trainer.life_cycle import LifeCycle


def fields(text):
    if text is None:
        return {"reward_extra_info": {"acc": 1.0}}
    return {"reward_extra_info": {"reward_error": float(bool(text)), "reward_error_text": text}}


class Trainer(LifeCycle):
    """In the place of verl's trainer, with one rank and a full batch."""

    def __init__(self, settings, tokenizer, folder):
        self.config, self.tokenizer, self.global_steps = settings, tokenizer, 4
        self._folder = folder

    def _get_required_batch_multiple(self, ranks):
        return ranks


@pytest.fixture
def step(monkeypatch, tmp_path):
    """One call of the trainer on a batch whose rewards said what is given; returns metrics."""
    import transfer_queue as tq

    def call(texts, response="", manager="guarded", limit=0.5):
        column = {f"u_{i}_0": fields(text) for i, text in enumerate(texts)}
        batch = SimpleNamespace(
            keys=[*column], partition_id="train", reorder=lambda order: seen.append(order)
        )

        def get(keys, partition_id, select_fields):
            if select_fields == ["responses"]:
                return {"responses": [torch.tensor([0])]}
            return tu.get_tensordict({"extra_fields": [column[key] for key in keys]})

        monkeypatch.setattr(tq, "kv_batch_get", get)
        settings = OmegaConf.create(
            {
                "reward": {
                    "reward_manager": {"name": manager},
                    "reward_model": {"enable": False},
                    "sandbox_fusion": {"url": None},
                    "guard": {"max_error_fraction": limit},
                },
                "trainer": {"nnodes": 1, "n_gpus_per_node": 1},
            }
        )
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: response)
        seen, metrics = [], {}
        trainer = Trainer(settings, tokenizer, tmp_path / "run")
        assert trainer._balance_batch(batch, metrics) is batch
        assert seen == [list(range(len(texts)))]
        return metrics

    return call


def test_the_share_is_logged_on_every_step(step):
    assert step(["", "", "", ""]) == {"reward/error_fraction": 0.0}
    assert step(["", "", "broken", "broken"]) == {"reward/error_fraction": 0.5}
    assert step(["broken"], manager="naive") == {}


def test_above_the_threshold_the_run_ends_with_the_offender_in_a_file(step, tmp_path):
    response = "\x1b[2J\x7f\u202e" + "x" * 5000
    with pytest.raises(RewardError, match=r"reward/error_fraction = 0.667 in step 4") as stopped:
        step(["", "ValueError: first", "second"], response=response)
    file = tmp_path / "run" / "reward_error.json"
    assert str(file) in str(stopped.value)
    assert "xxx" not in str(stopped.value)
    assert all(32 <= byte < 127 or byte == 10 for byte in file.read_bytes())
    written = json.loads(file.read_text())
    assert written == {
        "error": "ValueError: first",
        "step": 4,
        "sample": "u_1_0",
        "response": response[:2000],
        "response_characters": 5006,
    }


def test_a_response_of_another_manager_is_refused(step):
    with pytest.raises(DataError, match="carries no reward_error: reward manager 'guarded'"):
        step(["", None])
