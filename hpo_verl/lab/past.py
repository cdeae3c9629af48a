"""The policy that samples when it is some steps behind the one that is trained."""

from __future__ import annotations

import copy
from collections import deque

import torch

from hpo_verl.lab.policy import Policy


class Past:
    """Weights of the last steps; without a lag the policy that is trained is the one that samples.

    Args:
        policy: The policy that is trained.
        lag: Steps by which the sampling policy is behind; before that many steps are made, it is
            the first one. So many copies of the weights are held.
    """

    def __init__(self, policy: Policy, lag: int) -> None:
        self._trained = policy
        self.sampler = policy
        self._kept: deque[list[torch.Tensor]] = deque(maxlen=lag + 1)
        if lag:
            self.sampler = Policy(copy.deepcopy(policy.model), policy.tokenizer)

    @torch.no_grad()
    def advance(self) -> None:
        """Take note of the trained weights before a step, and turn to those of `lag` steps ago."""
        if self.sampler is self._trained:
            return
        self._kept.append([weight.detach().clone() for weight in self._trained.weights])
        for weight, value in zip(self.sampler.weights, self._kept[0], strict=True):
            weight.copy_(value)
