"""How verl calls an estimator, with what a trainer of ours provides."""

import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpo_verl.algorithms.base import REWARD
from hpo_verl.algorithms.registry import OUR_ESTIMATORS
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.advantages import reward_names

NAMED = sorted(
    {f"{REWARD}{name}" for one in OUR_ESTIMATORS.values() for name in reward_names(one, None)}
    | {extras.OPENING}
)
"""What estimators with their default settings read of each response beside its reward."""

PER_OUTPUT = (*NAMED, "output")
"""Names of what an estimator may read of every output, one number each."""


def named_rewards(rows):
    """A number of each response under every name of `PER_OUTPUT`.

    All have the second opening, and each is a session's only output.
    """
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(rows, generator=generator) for name in NAMED} | {
        extras.OPENING: torch.ones(rows, dtype=torch.int64),
        extras.OUTPUT: torch.zeros(rows, dtype=torch.int64),
    }


def token_rewards(rewards, width=4):
    """Rewards per response put at the last token; a matrix is taken as it is."""
    if isinstance(rewards, torch.Tensor):
        return rewards
    matrix = torch.zeros(len(rewards), width)
    matrix[:, -1] = torch.tensor(rewards)
    return matrix


def call_with_report(name, rewards, uids, config=None, mask=None, provided=None, **kwargs):
    """Advantages, `[batch, response]`, and what the estimator reported."""
    rewards = token_rewards(rewards)
    mask = torch.ones_like(rewards) if mask is None else mask
    reported = []
    with extras.provide(report=reported.append, **(provided or {})):
        advantages, returns = get_adv_estimator_fn(name)(
            token_level_rewards=rewards,
            response_mask=mask,
            config={} if config is None else config,
            index=uids,
            **kwargs,
        )
    assert returns is advantages
    assert torch.equal(reported[0].advantages[-len(rewards) :], advantages)
    return advantages, reported[0].result.statistics


def call(*arguments, **kwargs):
    return call_with_report(*arguments, **kwargs)[0]
