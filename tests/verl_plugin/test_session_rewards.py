"""What the reward function sees of a session with several outputs, in verl's own layout."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from tool_loops import Server, columns, make_loop, tokenizer
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager

from hpo_verl.verl_plugin.rollout.reward_guard import GuardedRewardManager
from hpo_verl.verl_plugin.rollout.tool_loops import ToolRoundsAgentLoop
from hpo_verl.verl_plugin.rollout.worker import CoalescingAgentLoopWorker

ANSWER = "<answer>3+7-2</answer>"
# Of the longest sequence, more stands before its last 120 tokens than before the answer.
CUT = ["11 " * 60 + "\n1+1=", "11 " * 30 + "\n1+1=", "1+2=", ANSWER]


class Reward:
    """Stands in for verl's reward worker: keeps what it is sent."""

    def __init__(self):
        self.data = None
        self.compute_score = SimpleNamespace(remote=self.keep)

    async def keep(self, data):
        self.data = data
        return {"reward_score": 1.0, "reward_extra_info": {"acc": 1.0}}


def positions(input_ids, attention_mask, multi_modal_inputs, mm_processor_kwargs=None):
    return torch.arange(input_ids.shape[-1]).unsqueeze(0)


def sent(turns):
    """Outputs of a session of rounds, and what verl's agent-loop worker sends of them."""
    texts = iter(turns)
    server, reward = Server(lambda *_: next(texts)), Reward()
    worker = SimpleNamespace(
        reward_loop_worker_handles=[reward],
        _compute_multi_modal_inputs=lambda output, input_ids: {},
        _compute_position_ids=positions,
        _get_mm_processor_kwargs=lambda audios=None: {},
    )

    async def run():
        loop = make_loop(ToolRoundsAgentLoop, server, prompt=400, response=400)
        outputs = await loop.run({"temperature": 1.0}, **columns())
        kwargs = columns() | {
            "data_source": "countdown",
            "reward_model": {"ground_truth": {"target": 8, "numbers": [3, 7, 2]}, "style": "rule"},
            "extra_info": {"index": 0, "numbers": [3, 7, 2]},
        }
        await CoalescingAgentLoopWorker._compute_score(worker, outputs, kwargs)
        return outputs

    return asyncio.run(run()), reward.data


def arguments(data):
    manager = SimpleNamespace(
        tokenizer=tokenizer(), reward_router_address=None, is_async_reward_score=False,
        _reward_kwargs={},
    )  # fmt: skip
    return GuardedRewardManager._arguments(manager, data[-1:])


@pytest.mark.parametrize(
    "turns",
    [
        [ANSWER],
        ["3+7=", ANSWER],
        ["3+7=", "11 " * 60 + "\n10-2=", ANSWER],
        CUT,
    ],
)
def test_the_last_output_is_scored_whole(turns):
    outputs, data = sent(turns)
    assert len(outputs) == len(data) == len(turns)
    found = arguments(data)
    assert found["solution_str"] == ANSWER
    assert found["ground_truth"] == {"target": 8, "numbers": [3, 7, 2]}
    assert outputs[-1].reward_score == 1.0


def test_verls_own_manager_cuts_it():
    """When this fails, verl has mended it."""
    _, data = sent(CUT)
    seen = []

    async def score(**call):
        seen.append(call["solution_str"])
        return 1.0

    async def run():
        manager = SimpleNamespace(
            loop=asyncio.get_running_loop(), tokenizer=tokenizer(), is_async_reward_score=True,
            compute_score=score, reward_router_address=None,
        )  # fmt: skip
        await NaiveRewardManager.run_single(manager, data)

    asyncio.run(run())
    assert len(seen) == 1
    assert ANSWER not in seen[0]
