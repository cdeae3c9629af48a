"""Demonstrations with a calculator: each is a turn of a conversation as the agent loops hold it."""

import asyncio
from collections import Counter

from tool_loops import Server, columns, make_loop, tokenizer

from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import (
    CountdownDemonstrations,
    Demonstration,
    ToolCountdownDemonstrations,
    encode,
)
from data_prep.policies.tiny import Schedule
from hpo_verl.rewards.calculator import calculate
from hpo_verl.rewards.countdown import compute_score
from hpo_verl.verl_plugin.rollout.tool_loops import SeededToolAgentLoop, ToolRoundsAgentLoop


def drawn(count, seed=0, direct=0.3):
    demonstrations = ToolCountdownDemonstrations(seed)
    return [demonstrations.draw(direct) for _ in range(count)]


def truth_of(messages):
    numbers, target = messages[0]["content"].split(" = ")
    return {"numbers": [int(number) for number in numbers.split()], "target": int(target)}


def test_a_turn_is_a_call_or_an_answer_and_replies_are_the_calculators():
    kinds, right = Counter(), []
    for messages, response in drawn(600):
        calls, replies = messages[1::2], messages[2::2]
        assert [one["role"] for one in calls] == ["assistant"] * len(replies)
        assert [one["role"] for one in replies] == ["tool"] * len(calls)
        for call, reply in zip(calls, replies, strict=True):
            assert call["content"].endswith("=")
            assert reply["content"] == calculate(call["content"][:-1]) != "error"
        truth = truth_of(messages)
        # The last reply was not the target, unless the answer follows.
        done = bool(replies) and int(replies[-1]["content"]) == truth["target"]
        kinds[len(calls), response.endswith("=")] += 1
        if response.endswith("="):
            assert not done
        else:
            score = compute_score("t", response, truth)["score"]
            right.append((bool(replies), done, score))
    assert set(kinds) == {(0, True), (0, False), (1, True), (1, False), (2, True), (2, False),
                          (3, False)}  # fmt: skip
    assert all(score == 1 for _, done, score in right if done)
    # After three attempts the author gives up now and then; a guess is seldom right.
    assert any(called and not done for called, done, _ in right)
    guesses = [score for called, _, score in right if not called]
    assert 0 < sum(guesses) < len(guesses) / 2


def test_the_same_seed_draws_the_same_ones_and_the_author_without_a_tool_draws_as_before():
    assert drawn(20, seed=3) == drawn(20, seed=3) != drawn(20, seed=4)
    plain = CountdownDemonstrations(3).draw(0.0)
    assert plain.messages[0] == drawn(1, seed=3, direct=0.0)[0].messages[0]


def prompts_of(kind):
    """Prompts that a loop makes of three turns, and its outputs."""
    texts = iter(["3+7+2=", "3+7-2=", "<answer>3+7-2</answer>"])
    server = Server(lambda *_: next(texts))

    async def run():
        return await make_loop(kind, server).run({"temperature": 1.0}, **columns())

    asyncio.run(run())
    return [request.prompt for request in server.requests]


def test_prompts_of_demonstrations_are_those_of_the_loops():
    question = [{"role": "user", "content": "3 7 2 = 8"}]
    first = [{"role": "assistant", "content": "3+7+2="}, {"role": "tool", "content": "12"}]
    second = [{"role": "assistant", "content": "3+7-2="}, {"role": "tool", "content": "8"}]

    def shown(*parts):
        messages = [*question, *(message for part in parts for message in part)]
        return tokenizer().decode(encode(tokenizer(), Demonstration(messages, "x"))[0])

    assert prompts_of(SeededToolAgentLoop) == [shown(), shown(first), shown(first, second)]
    assert prompts_of(ToolRoundsAgentLoop) == [shown(), shown(first), shown(second)]


def test_the_policy_says_its_task(tmp_path, monkeypatch):
    short = Schedule(skill_steps=2, habit_steps=1, batch_size=4)
    monkeypatch.setitem(tiny_policy.SCHEDULES, "countdown_tool", short)
    tiny_policy.main(["--out", str(tmp_path / "policy"), "--task", "countdown_tool"])
    assert tiny_policy.check(tmp_path / "policy")["task"] == "countdown_tool"
