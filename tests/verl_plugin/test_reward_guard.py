"""Rewards that raise, hang, end their process or return what is no number: 0, and counted."""

import asyncio

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager
from verl.protocol import DataProto
from verl.trainer.ppo.reward import load_reward_manager

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.rewards import countdown
from hpo_verl.rewards.guarded_function import GuardedFunction, RewardGuardSettings
from hpo_verl.verl_plugin.rollout.reward_guard import GuardedRewardManager, guard_settings

FAULTS = """
import math, os, re, sys, time

class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no message either")

class LoadsNowhere:
    def __reduce__(self):
        raise TypeError("cannot be sent")

# Loaded where they are needed: torch takes seconds.
def tensor():
    import torch
    return torch.tensor(1.0)
def silent(): raise Silent
def hang(): time.sleep(600)
# Holds the interpreter's lock for hours: no thread of this process would run.
def backtrack(): re.match("(a+)+$", "a" * 60 + "b")

FAULTS = {
    "raise": lambda: 1 / 0,
    "silent": silent,
    "exit": lambda: sys.exit(0),
    "none": lambda: None,
    "nan": lambda: math.nan,
    "infinite": lambda: {"score": -math.inf, "acc": 0.0, "note": ""},
    "huge": lambda: 10**400,
    "tensor": tensor,
    "tensor score": lambda: {"score": tensor(), "acc": 1.0, "note": ""},
    "text": lambda: "1.0",
    "list": lambda: [1.0],
    "no score": lambda: {"acc": 1.0},
    "unsendable": lambda: {"score": 1.0, "acc": LoadsNowhere(), "note": ""},
    "hang": hang,
    "backtrack": backtrack,
    "die": lambda: os._exit(7),
    "killed": lambda: os.kill(os.getpid(), 9),
}

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    if solution_str in FAULTS:
        return FAULTS[solution_str]()
    score = float(solution_str == ground_truth) + bonus
    return {"score": score, "acc": score, "note": data_source, "parts": [score, 1.0]}

async def score_later(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    import asyncio
    if solution_str == "hang":
        await asyncio.sleep(600)
    return compute_score(data_source, solution_str, ground_truth, bonus=bonus)

def plain_number(data_source, solution_str, ground_truth, extra_info=None):
    print("rewards may print")
    return int(solution_str == ground_truth)

def endless(**arguments):
    while True:
        pass
"""
QUICK = ["raise", "silent", "exit", "none", "nan", "infinite", "huge", "tensor", "tensor score",
         "text", "list", "no score", "unsendable", "die", "killed"]  # fmt: skip
SLOW = ["hang", "backtrack"]
GUARD = RewardGuardSettings(time_limit=10.0)
BRIEF = {"time_limit": 2.0, "max_error_fraction": 0.5}


class Words:
    """A tokenizer whose ids are positions in a list of texts."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens):
        return "".join(self.texts[int(i)] for i in ids)


@pytest.fixture
def rewards(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(FAULTS)
    return str(file)


def config(path, name="compute_score", manager="guarded", guard=None, **kwargs):
    return OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {"path": path, "name": name, "reward_kwargs": kwargs},
                "reward_manager": {"source": "register", "name": manager},
                "reward_model": {"enable": False, "enable_resource_pool": False},
                "sandbox_fusion": {"url": None},
                "guard": guard or {"time_limit": 60.0, "max_error_fraction": 0.5},
            },
            "trainer": {"default_local_dir": "unset"},
        }
    )


def rows(texts, truth="right"):
    """One row per response, with a padding token after each."""
    count = len(texts)
    columns = {
        "data_source": ["source"] * count,
        "reward_model": [{"ground_truth": truth}] * count,
        "extra_info": [{"index": i} for i in range(count)],
        "__num_turns__": [2] * count,
        "tool_extra_fields": [{"tool": 1}] * count,
    }
    return DataProto(
        batch=TensorDict(
            {
                "prompts": torch.zeros(count, 1, dtype=torch.int64),
                "responses": torch.stack([torch.arange(count), torch.zeros(count).long()], 1),
                "attention_mask": torch.tensor([[1, 1, 0]]).expand(count, -1),
            },
            batch_size=count,
        ),
        non_tensor_batch={name: np.array(values, dtype=object) for name, values in columns.items()},
    )


def score(texts, settings):
    """All responses at once, as verl's reward worker does, and what was there before and after."""

    async def run():
        manager = load_reward_manager(settings, Words(texts))
        manager.loop = asyncio.get_running_loop()
        data = rows(texts)
        try:
            return await asyncio.gather(
                *(manager.run_single(data[i : i + 1]) for i in range(len(data)))
            )
        finally:
            function = getattr(manager, "_function", None)
            if function is not None:
                function.close()

    return asyncio.run(run())


def errors(outputs):
    return [output["reward_extra_info"]["reward_error"] for output in outputs]


def texts_of(outputs):
    return [output["reward_extra_info"]["reward_error_text"] for output in outputs]


@pytest.mark.parametrize("fault", QUICK)
def test_a_fault_costs_its_own_response_and_no_other(rewards, fault):
    outputs = score(["right", fault, "wrong", "right"], config(rewards))
    assert [output["reward_score"] for output in outputs] == [1.0, 0.0, 0.0, 1.0]
    assert errors(outputs) == [0.0, 1.0, 0.0, 0.0]
    assert texts_of(outputs)[0] == ""
    assert texts_of(outputs)[1]
    infos = [output["reward_extra_info"] for output in outputs]
    assert [list(info) for info in infos] == [list(infos[0])] * 4
    assert (infos[1]["score"], infos[1]["note"], infos[1]["parts"]) == (0.0, "", [0.0, 0.0])


@pytest.mark.parametrize("fault", SLOW)
def test_a_hang_is_ended_in_time_and_costs_no_other(rewards, fault):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    outputs = score(["right", fault, "right"], config(rewards, guard=BRIEF))
    assert [output["reward_score"] for output in outputs] == [1.0, 0.0, 1.0]
    assert texts_of(outputs)[1] == "the reward did not return within 2 s"
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_reward_that_always_hangs_is_given_up(rewards):
    outputs = score(["right"] * 40, config(rewards, "endless", guard={"time_limit": 0.2}))
    # Of 40, four are a tenth; the fifth goes above it.
    assert texts_of(outputs)[:5] == ["the reward did not return within 0.2 s"] * 5
    assert set(texts_of(outputs)[5:]) == {
        "not called: 5 responses of its batch ran into the time limit"
    }
    assert errors(outputs) == [1.0] * 40


def test_errors_are_told(rewards):
    outputs = score(["raise", "tensor", "nan", "no score", "die"], config(rewards))
    assert texts_of(outputs) == [
        "ZeroDivisionError: division by zero",
        "TypeError: the reward is of type Tensor, not a number",
        "ValueError: the reward is nan",
        "ValueError: the reward's dict has no key 'score'",
        "the reward ended its process",
    ]
    assert errors(outputs) == [1.0] * 5
    assert {output["reward_score"] for output in outputs} == {0.0}


def test_a_coroutine_is_guarded_too(rewards):
    outputs = score(
        ["right", "hang", "raise", "nan"], config(rewards, "score_later", guard=BRIEF, bonus=0.5)
    )
    assert [output["reward_score"] for output in outputs] == [1.5, 0.0, 0.0, 0.0]
    assert errors(outputs) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "kwargs"), [("compute_score", {"bonus": 0.25}), ("plain_number", {})]
)
def test_scores_are_those_of_verls_naive_manager(rewards, name, kwargs):
    texts = ["right", "wrong", "right"]
    naive = score(texts, config(rewards, name, manager="naive", **kwargs))
    ours = score(texts, config(rewards, name, **kwargs))
    for one in ours:
        assert one["reward_extra_info"].pop("reward_error") == 0.0
        assert one["reward_extra_info"].pop("reward_error_text") == ""
    assert ours == naive


def test_the_arguments_are_those_of_verls_naive_manager():
    async def run(kind):
        seen = {}

        async def remember(**arguments):
            seen.update(arguments)
            return 1.0

        manager = kind(config(None), Words(["right"]), remember)
        manager.loop = asyncio.get_running_loop()
        await manager.run_single(rows(["right"]))
        return seen

    assert asyncio.run(run(GuardedRewardManager)) == asyncio.run(run(NaiveRewardManager))


def test_our_rewards_are_loaded_as_packages():
    call = {
        "data_source": "countdown",
        "solution_str": "<answer>1+2</answer>",
        "ground_truth": {"target": 3, "numbers": [1, 2]},
    }
    guarded = GuardedFunction("pkg://hpo_verl.rewards.countdown", "compute_score", GUARD)
    try:
        assert guarded.score([call]) == [(countdown.compute_score(**call), "")]
    finally:
        guarded.close()


@pytest.mark.parametrize(
    ("path", "name"),
    [("pkg://hpo_verl.nowhere", "f"), ("pkg://hpo_verl.rewards.countdown", "f"), ("/no.py", "f")],
)
def test_a_function_that_does_not_load_is_an_error_at_the_start(path, name):
    with pytest.raises(DataError, match=f"{name} of {path} cannot be loaded: "):
        GuardedFunction(path, name, GUARD)


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"time_limit": 0}, r"reward\.guard\.time_limit = 0: must be a number in \(0, 3600\]"),
        ({"time_limit": "1"}, r"reward\.guard\.time_limit = '1': .* got str"),
        ({"max_error_fraction": 1.5}, r"reward\.guard\.max_error_fraction = 1.5: .* \[0, 1\]"),
        ({"time_limt": 1}, r"did you mean reward\.guard\.time_limit\?"),
    ],
)
def test_settings_are_checked(guard, message):
    with pytest.raises(ConfigError, match=message):
        guard_settings(config(None, guard=guard))


@pytest.mark.parametrize("key", ["reward.reward_model.enable", "reward.sandbox_fusion.url"])
def test_what_it_cannot_do_is_refused(key):
    settings = config(None)
    OmegaConf.update(settings, key, True)
    with pytest.raises(ConfigError, match="use naive"):
        guard_settings(settings)
