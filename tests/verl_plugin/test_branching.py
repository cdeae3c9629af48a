"""Sessions that branch after tool calls: plans by hand, whole conversations, what is refused."""

import asyncio
import re
from types import SimpleNamespace

import pytest
import transfer_queue as tq
from composed_recipes import View, merged, plain
from tensordict import NonTensorStack, TensorDict
from tool_loops import Server, columns, make_loop, text_of
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.branching import NAME, BranchingSettings, check_branching
from hpo_verl.verl_plugin.rollout import branching
from hpo_verl.verl_plugin.rollout.branching import BranchingToolAgentLoop, Place, Siblings
from hpo_verl.verl_plugin.trainer.branching import Branching, branching_metrics

# ---------------------------------------------------------------- plans


def place(value, session=0, turns=1):
    return Place(value, session, turns, 1, 0.0, None)


def siblings(waves, waiting, places=(), entropies=(), **settings):
    made = Siblings(BranchingSettings(**settings))
    made.waves, made.places, made.entropies = waves, list(places), list(entropies)
    made.waiting = dict.fromkeys(waiting)
    return made


def test_the_first_session_is_monitored_alone():
    assert siblings(0, [2, 0, 1]).plan() == [(0, None)]


def test_half_of_the_sessions_start_from_the_root_where_entropies_are_equal():
    made = siblings(1, [1, 2, 3, 4, 5, 6, 7], [place(0.9)], [1.0, 1.0])
    # Four of eight, the monitored one among them.
    assert made.plan() == [(1, None), (2, None), (3, None)]
    assert len(made.places) == 1


def test_branches_follow_at_once_where_the_monitored_session_is_all_from_the_root():
    first = place(0.9)
    made = siblings(1, [1, 2, 3], [first], [0.0, 9.0])
    assert made.plan() == [(1, first)]
    assert made.places == []


def test_the_places_of_the_largest_value_come_first():
    low, high, later, other = place(0.6), place(0.8, 1, 2), place(0.8, 1, 3), place(0.8, 2, 1)
    made = siblings(2, [5, 6, 7], [other, low, later, high])
    assert made.plan() == [(5, high), (6, later), (7, other)]
    wide = siblings(2, [4, 5, 6], [low, high], width=3)
    assert wide.plan() == [(4, high), (5, high), (6, low)]


def test_without_a_place_the_rest_starts_from_the_root():
    assert siblings(2, [5, 6]).plan() == [(5, None), (6, None)]
    # No tool was called, or the monitored session failed: all of them.
    assert siblings(1, [1, 2], [], [1.0]).plan() == [(1, None), (2, None)]
    assert siblings(1, [1, 2]).plan() == [(1, None), (2, None)]


# ---------------------------------------------------------------- conversations


def reply_of(prompt):
    """The tool's last reply; None at the root."""
    parts = prompt.split("<|im_start|>tool\n")
    return None if len(parts) == 1 else parts[-1].split("<|im_end|>")[0]


def held(script, sessions, order=None, failing=(), cancelled=(), **settings):
    """Outputs of all sessions of a prompt, started as verl does, and the server."""
    server = Server(script)
    custom = {"branching": settings}

    async def one(session):
        loop = make_loop(BranchingToolAgentLoop, server, custom=custom, turns=3)
        if session in failing:
            server_of = Server(lambda *_: 1 / 0)
            loop.server_manager = server_of
        output = await loop.run({"temperature": 1.0}, **columns(session))
        return output, loop

    async def run():
        tasks = [asyncio.create_task(one(session)) for session in order or range(sessions)]
        for turns, session in cancelled:
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[session].cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    found = asyncio.run(run())
    assert branching._siblings == {}
    return found, server


def two_turns(prompt, request):
    """A call from the root, then an answer, at a log-probability of -1 after the tool's reply."""
    if reply_of(prompt) is None:
        return f"{request.sampling['seed'] % 9 + 1}+7=", -0.5
    return f"<answer>{request.sampling['seed'] % 99}</answer>", -1.0


def test_a_prompt_in_waves():
    # H_root 0.5, H_tool 1: sigmoid(-0.5) = 0.378, of eight sessions three from the root. P = 0.6
    # after each one's reply: three branches. Those do not branch where they come from, so that
    # the last two start from the root.
    found, server = held(two_turns, 8)
    loops = [loop for _, loop in found]
    starts = [loop._start and loop._start.session for loop in loops]
    assert starts == [None, None, None, 0, 1, 2, None, None]
    assert [loop._start.value for loop in loops[3:6]] == pytest.approx([0.6] * 3)
    # Two turns a session from the root, one a branch.
    assert len(server.requests) == 5 * 2 + 3
    assert len({request.sampling["seed"] for request in server.requests}) == 13
    assert len({request.id for request in server.requests}) == 8
    # A branch's turn is the first of its own; the place's was noted where it comes from.
    metrics = branching_metrics([*(output.extra_fields for output, _ in found), None])
    assert metrics == {"hpo/branched_session_fraction": 3 / 8, "hpo/tool_entropy_change": 0.5}


def test_a_branch_has_the_conversation_that_it_comes_from_and_goes_on_by_itself():
    (origin, *_, branch), _ = held(two_turns, 2, sensitivity=9.0)
    (parent, _), (child, loop) = origin, branch
    assert loop._start.session == 0
    turn_end = "<|im_start|>assistant\n"
    shared, of_parent = text_of(parent.response_ids).rsplit(turn_end, 1)
    of_child = text_of(child.response_ids).rsplit(turn_end, 1)
    assert of_child[0] == shared
    assert of_child[1] != of_parent
    assert child.prompt_ids == parent.prompt_ids
    for output in (parent, child):
        own = [-0.5] * output.response_logprobs.index(0.0)
        assert output.response_logprobs[: len(own)] == own
        assert [value != 0 for value in output.response_logprobs] == [
            bool(kept) for kept in output.response_mask
        ]
        assert output.response_logprobs[-1] == -1.0
        assert output.num_turns == 4


def test_the_order_in_which_sessions_are_started_changes_nothing():
    def texts(found):
        return {loop._session: text_of(output.response_ids) for output, loop in found}

    assert texts(held(two_turns, 6)[0]) == texts(held(two_turns, 6, order=[3, 0, 5, 1, 4, 2])[0])


def test_branchings_in_a_row_are_penalised():
    def three_turns(prompt, request):
        # Entropies 0.5 at the root, then 1.5: P = 0.7, and 0.7 * 0.75 = 0.525 after a branching.
        return ("1+1=", -0.5 if reply_of(prompt) is None else -1.5)

    (_, loop), *_ = held(three_turns, 1)[0]
    assert [one.value for one in loop._places] == pytest.approx([0.7, 0.525])
    assert [(one.turns, one.in_a_row) for one in loop._places] == [(1, 1), (2, 2)]
    (_, loop), *_ = held(three_turns, 1, penalty=0.5)[0]
    # 0.35 is no branching, and ends the row.
    assert [one.value for one in loop._places] == pytest.approx([0.7])
    assert loop._in_a_row == 0
    # A branch counts on from where it comes.
    found, _ = held(three_turns, 2, sensitivity=9.0)
    child = found[1][1]
    assert (child._start.turns, child._in_a_row) == (1, 2)
    assert [one.value for one in child._places] == pytest.approx([0.525])


def test_the_entropy_is_taken_of_the_first_tokens():
    (_, loop), *_ = held(two_turns, 1)[0]
    assert loop._entropies == pytest.approx([0.5, 1.0])


def test_sessions_that_fail_leave_the_others_their_turn():
    for failing in ([0], [1], [0, 1, 2]):
        found, _ = held(two_turns, 6, failing=failing)
        errors = [isinstance(one, ZeroDivisionError) for one in found]
        assert errors == [session in failing for session in range(6)]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("session", [0, 1, 5])
def test_a_session_that_is_cancelled_leaves_nothing_behind(session, turns):
    # Before its wave, when it is let go, or later.
    found, _ = held(two_turns, 6, cancelled=[(turns, session)])
    assert [isinstance(one, asyncio.CancelledError) for one in found] == [
        number == session for number in range(6)
    ]


def test_without_a_tool_call_all_start_from_the_root():
    found, server = held(lambda *_: "<answer>1</answer>", 4)
    assert len(server.requests) == 4
    assert all(loop._start is None for _, loop in found)


# ---------------------------------------------------------------- metrics


class Trainer:
    def _compute_advantage(self, batch, metrics):
        return {"of verl": dict(metrics)}


@pytest.mark.parametrize(("loop", "logged"), [(NAME, True), ("seeded_tool_agent", False)])
def test_the_trainer_logs_where_sessions_branch(loop, logged, monkeypatch):
    def get(keys, partition_id, select_fields):
        assert (keys, partition_id, select_fields) == (["a"], "train", ["extra_fields"])
        record = {"branching": {"branched": True, "changes": [1.0, -0.5]}}
        return TensorDict({"extra_fields": NonTensorStack(record, {})}, batch_size=2)

    monkeypatch.setattr(tq, "kv_batch_get", get)
    trainer = type("Ours", (Branching, Trainer), {})()
    trainer.config = View(
        {"actor_rollout_ref": {"rollout": {"agent": {"default_agent_loop": loop}}}}
    )
    made = trainer._compute_advantage(SimpleNamespace(keys=["a"], partition_id="train"), {})
    expected = {"hpo/branched_session_fraction": 1.0, "hpo/tool_entropy_change": 0.25}
    assert made == {"of verl": expected if logged else {}}


def test_without_a_record_nothing_has_branched():
    assert set(branching_metrics([]).values()) == {0.0}


# ---------------------------------------------------------------- settings


def config(rollout=None, loop=NAME):
    base = plain("countdown-tiny", (), "cpu")
    given = {"agent": {"default_agent_loop": loop}, "calculate_log_probs": True}
    return View(merged(base, {"actor_rollout_ref": {"rollout": merged(given, rollout or {})}}))


def test_the_loop_is_registered_and_accepted():
    assert _agent_loop_registry[NAME]["_target_"].endswith("BranchingToolAgentLoop")
    check_branching(config())
    check_branching(config({"calculate_log_probs": False}, "seeded_tool_agent"))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"calculate_log_probs": False},
         "actor_rollout_ref.rollout.calculate_log_probs = False: must be true with "
         "actor_rollout_ref.rollout.agent.default_agent_loop = 'branching_tool_agent'"),
        ({"val_kwargs": {"n": 4}}, "actor_rollout_ref.rollout.val_kwargs.n = 4: must be 1 with"),
        *(({"custom": {"branching": {name: value}}},
           f"actor_rollout_ref.rollout.custom.branching.{name} = {value!r}: must be")
          for name, value in (
              ("sensitivity", -1), ("base", "x"), ("weight", -0.1), ("penalty", 1.5),
              ("threshold", float("nan")), ("width", 1), ("width", 2.5), ("tokens", 0),
              ("tokens", True))),
        ({"custom": {"branching": {"beam": 2}}},
         "actor_rollout_ref.rollout.custom.branching.beam = 2: unknown setting"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_branching_is_refused(rollout, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_branching(config(rollout))
