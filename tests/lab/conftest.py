"""A cache of its own for every test of the lab, and rewards that a random policy meets."""

import dataclasses

import pytest

from hpo_verl.lab.trainer import Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def graded(monkeypatch):
    """Rewards by the length of a response, so that a random policy has something to learn from."""
    original = Trainer.__init__

    def score(text, truth):
        reward = float(len(text) % 3 == 0)
        return {"score": reward, "acc": reward, "format": float(len(text) % 2)}

    def init(self, cell, policy):
        original(self, cell, policy)
        self.task = dataclasses.replace(self.task, score=score)

    monkeypatch.setattr(Trainer, "__init__", init)
