"""What travels together: coalescing, the client, the reward batch, seeds and order."""

import asyncio
from types import SimpleNamespace

import pytest
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from hpo_verl.verl_plugin.rollout import worker
from hpo_verl.verl_plugin.rollout.coalescer import Coalescer
from hpo_verl.verl_plugin.rollout.seeds import sample_seed
from hpo_verl.verl_plugin.rollout.worker import (
    CoalescingAgentLoopWorker,
    CoalescingClient,
    reward_batch,
)
from hpo_verl.verl_plugin.trainer.batches import response_order


def test_items_submitted_together_are_processed_together():
    calls = []

    async def square(items):
        calls.append(list(items))
        return [ValueError(str(item)) if item == 3 else item**2 for item in items]

    async def run():
        coalescer = Coalescer(square)
        first = await asyncio.gather(
            *(coalescer.submit(item) for item in range(5)), return_exceptions=True
        )
        return first, await coalescer.submit(7)

    first, second = asyncio.run(run())
    assert calls == [[0, 1, 2, 3, 4], [7]]
    assert [first[i] for i in (0, 1, 2, 4)] == [0, 1, 4, 16]
    assert isinstance(first[3], ValueError)
    assert second == 49


def test_an_error_of_the_whole_batch_reaches_every_item():
    async def fail(items):
        raise RuntimeError("down")

    async def run():
        coalescer = Coalescer(fail)
        return await asyncio.gather(
            *(coalescer.submit(item) for item in range(3)), return_exceptions=True
        )

    assert [str(error) for error in asyncio.run(run())] == ["down"] * 3


class Remote:
    """Stands in for a method of a Ray actor."""

    def __init__(self, function):
        self.function = function

    def remote(self, *args, **kwargs):
        async def call():
            return self.function(*args, **kwargs)

        return call()


def make_client(batches, released):
    def generate_batch(requests):
        batches.append(len(requests))
        return [
            TokenOutput(token_ids=ids)
            if (ids := request["prompt_ids"]) != [3]
            else ValueError("no")
            for request in requests
        ]

    def release(**fields):
        released.append(fields)

        async def done():
            return None

        return asyncio.ensure_future(done())

    balancer = SimpleNamespace(
        acquire_server=Remote(
            lambda request_id: ("s", SimpleNamespace(generate_batch=Remote(generate_batch)))
        ),
        require_acquire_fields=Remote(list),
        require_release_fields=Remote(list),
        release_server=SimpleNamespace(remote=release),
    )
    plain = SimpleNamespace(config=None, _load_balancer=balancer)
    return CoalescingClient(plain, servers=2)


def test_client_shares_requests_among_the_servers():
    batches, released = [], []

    async def run():
        client = make_client(batches, released)
        return await asyncio.gather(
            *(
                client.generate(str(i), prompt_ids=[i], sampling_params={"seed": i})
                for i in range(5)
            ),
            return_exceptions=True,
        )

    outputs = asyncio.run(run())
    assert sorted(batches) == [2, 3]
    assert len(released) == 2
    assert str(outputs.pop(3)) == "no"
    assert [output.token_ids for output in outputs] == [[0], [1], [2], [4]]


def test_reward_batch_pads_and_keeps_lists_whole():
    def row(prompt, response, numbers):
        output = SimpleNamespace(
            prompt_ids=prompt, response_ids=response, num_turns=2, extra_fields={}
        )
        return output, {"reward_model": {"ground_truth": numbers}, "data_source": "countdown"}

    batch = reward_batch([row([1, 2], [3], [7, 8]), row([4], [5, 6], [9, 9])])
    assert batch.batch["responses"].tolist() == [[3, 0], [5, 6]]
    assert batch.batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]
    assert batch.non_tensor_batch["reward_model"][0] == {"ground_truth": [7, 8]}
    assert len(batch[1:2]) == 1


@pytest.mark.parametrize("bad", [(), (1,), (0, 1, 2)])
def test_a_response_that_cannot_be_scored_costs_no_other(monkeypatch, bad):
    stored, alone = {}, []

    def score(row):
        number = row.non_tensor_batch["uid"][0]
        if number in bad:
            raise ValueError(f"no score for {number}")
        return {"reward_score": float(number), "reward_extra_info": {"acc": float(number)}}

    def score_alone(row):
        alone.append(len(row))
        return score(row)

    async def put(keys, fields, tags, partition_id):
        assert partition_id == "train"
        stored.update(zip(keys, zip(fields["rm_scores"], tags, strict=True), strict=True))

    monkeypatch.setattr(worker.tq, "async_kv_batch_put", put)
    ours = object.__new__(CoalescingAgentLoopWorker)
    ours.reward_loop_worker_handles = [
        SimpleNamespace(
            compute_score_batch=Remote(lambda rows: [score(rows[i : i + 1]) for i in range(3)]),
            compute_score=Remote(score_alone),
        )
    ]
    responses = [
        (
            AgentLoopOutput(
                prompt_ids=[1, 2],
                response_ids=[3] * (number + 1),
                response_mask=[1] * (number + 1),
                metrics={},
                extra_fields={"min_global_steps": 4, "max_global_steps": 4},
            ),
            {"uid": number, "session_id": 7, "global_steps": 4, "data_source": "countdown"},
        )
        for number in range(3)
    ]
    answers = asyncio.run(ours._score_and_store("train", responses))
    assert [isinstance(answer, ValueError) for answer in answers] == [i in bad for i in range(3)]
    assert alone == ([1] * 3 if bad else [])
    assert set(stored) == {f"{number}_7_0" for number in range(3) if number not in bad}
    for key, (scores, tag) in stored.items():
        number = int(key[0])
        assert scores.tolist() == [0.0] * number + [number]
        assert (tag["prompt_len"], tag["response_len"], tag["seq_len"]) == (
            2,
            number + 1,
            number + 3,
        )


def test_every_part_of_a_samples_name_changes_its_seed():
    name = (0, 1, 2, 3, [("user", "a")])
    seeds = {sample_seed(*name)}
    for position, value in enumerate((1, 2, 3, 4, [("user", "b")])):
        seeds.add(sample_seed(*name[:position], value, *name[position + 1 :]))
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(*name) == sample_seed(*name)


def test_responses_sort_by_step_prompt_and_number():
    keys = ["00000002-00000000_0_0", "00000001-00000001_10_0", "00000001-00000001_9_0"]
    assert sorted(keys, key=response_order) == [keys[2], keys[1], keys[0]]
