"""SPO in verl: the estimator `spo`, its settings, and the sampler of prompts.

The estimator subtracts the values that the trainer (`spo_trainer`) lends and
whitens over the batch. The sampler draws prompts by the tracker's weights; verl
saves its state with the data loader's, in `data.pt` of every checkpoint, and with
it the tracker and the last response of every prompt.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from hpo_verl.algorithms.spo import SPOSettings, ValueTracker, single_stream_advantages
from hpo_verl.core.settings import parse_settings
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.advantages import response_rewards, uid_labels
from hpo_verl.verl_plugin.estimator_inputs import borrow
from hpo_verl.verl_plugin.trainer.last_responses import LastResponses

ESTIMATOR = "spo"
ROW = "prompt_row"
"""Column that tells a prompt's row in the training set."""


def spo_settings(config: Mapping[str, Any] | None) -> SPOSettings:
    """Read `algorithm.spo`.

    Args:
        config: verl's `algorithm` section; None means the defaults.

    Raises:
        ConfigError: Names the key, the value and what is permitted.
    """
    section = {} if config is None else config
    return parse_settings(SPOSettings, section.get(ESTIMATOR, None), f"algorithm.{ESTIMATOR}")


def check_spo(config: Mapping[str, Any]) -> None:
    """Check SPO's settings and what it is combined with.

    Args:
        config: verl's whole configuration, resolved.

    Raises:
        ConfigError: Unknown or out-of-range setting, or a combination that cannot be meant.
        DataError: The file of offline rewards is missing or holds something else.
    """
    algorithm = config["algorithm"]
    read_initial_rewards(spo_settings(algorithm))
    responses = config["actor_rollout_ref"]["rollout"]["n"]
    if responses != 1:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n = {responses!r}: algorithm.adv_estimator = 'spo' takes "
            "one response per prompt; must be 1"
        )
    if algorithm.get("use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward = True: adv_estimator = 'spo' counts rewards in [0, 1], "
            "which a KL penalty leaves; must be false"
        )


def read_initial_rewards(settings: SPOSettings) -> list[list[float]] | None:
    """Read the offline rewards.

    Args:
        settings: Name the file, or none.

    Returns:
        A list of rewards for every prompt; None without a file.

    Raises:
        DataError: Names the key, the file and what is wrong.
    """
    if settings.initial_rewards is None:
        return None
    where = f"algorithm.spo.initial_rewards: {settings.initial_rewards}"
    try:
        rows = json.loads(Path(settings.initial_rewards).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be read as JSON ({error})") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(reward) in (int, float) for reward in row)
        for row in rows
    ):
        raise DataError(f"{where} must hold a list of lists of numbers in [0, 1]")
    return rows


def estimate(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: advantages twice, `[batch, response]` float32.

    `reward_baselines` is ReMax's; the baseline here is the prompt's tracked value.

    Raises:
        ConfigError: A setting is out of range, or the trainer mode is not ours.
        DataError: uids are missing, a prompt has no value, a reward lies outside [0, 1], or a
            tensor has the wrong shape or is not finite.
    """
    spo_settings(config)
    if index is None:
        raise DataError(f"{ESTIMATOR}: uid is missing; every response needs its prompt's uid")
    values: Mapping[Hashable, float] = borrow(ESTIMATOR, "values")
    rewards, live = response_rewards(token_level_rewards, response_mask)
    labels = uid_labels(index, len(rewards))
    for row in live.nonzero().squeeze(-1).tolist():
        if labels[row] not in values:
            raise DataError(f"{ESTIMATOR}: uid {labels[row]!r} is of no prompt that was drawn")
    outside = live & ((rewards < 0.0) | (rewards > 1.0))
    if bool(outside.any()):
        raise DataError(
            f"{ESTIMATOR}: reward {rewards[outside][0].item():g} of response "
            f"{int(outside.nonzero()[0])}: must be in [0, 1]"
        )
    baseline = torch.tensor([values.get(label, 0.0) for label in labels], dtype=torch.float64)
    advantages = single_stream_advantages(rewards, baseline.to(rewards.device), live)
    spread = advantages.float().unsqueeze(-1) * (response_mask != 0)
    return spread, spread


class NumberedRows(Dataset[dict[str, Any]]):
    """A data set whose items tell their row.

    Args:
        dataset: verl's training set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.dataset[row], ROW: row}


class PrioritizedSampler(Sampler[int]):
    """Draws prompts by the tracker's weights, without end.

    A batch is drawn when its first prompt is asked for, from the weights of that
    moment; the loader must not read ahead, or it would use old ones.

    Args:
        tracker: Values of the prompts.
        batch_size: Prompts that are drawn at once, all different.
        seed: Of the draws; None for a seed of the system.

    Attributes:
        tracker: As given.
        last: The last response of every prompt, saved with the tracker.
    """

    def __init__(self, tracker: ValueTracker, batch_size: int, seed: int | None) -> None:
        self.tracker = tracker
        self.batch_size = batch_size
        self.last = LastResponses()
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.tracker.alpha)

    def __iter__(self) -> Iterator[int]:
        while True:
            if not self._drawn:
                self._drawn = self.tracker.draw(self.batch_size, self.generator)
            yield self._drawn.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws and updates depend on."""
        return {
            "tracker": self.tracker.state_dict(),
            "last": self.last.state_dict(),
            "generator": self.generator.get_state(),
            "drawn": list(self._drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            DataError: It is of another number of prompts.
        """
        self.tracker.load_state_dict(state["tracker"])
        self.last.load_state_dict(state["last"])
        self.generator.set_state(state["generator"])
        self._drawn = list(state["drawn"])


def register() -> None:
    """Register the estimator with verl; a second call changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est(ESTIMATOR)(estimate)
