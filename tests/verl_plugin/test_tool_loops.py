"""Conversations with the calculator: what is trained on, what repeats, and hostile calls."""

import asyncio
import json
import subprocess
import sys

import pytest
from tool_loops import QUESTION, Server, columns, make_loop, text_of, tokenizer
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.experimental.agent_loop.tool_parser import HermesToolParser

from hpo_verl.rewards.calculator import NOT_AN_EXPRESSION
from hpo_verl.verl_plugin.rollout.tool_loops import (
    CALCULATOR,
    NAME,
    ROUNDS,
    BoundedToolParser,
    LastLineToolParser,
    SeededToolAgentLoop,
    ToolRoundsAgentLoop,
)

TURNS = {"8": "3+7=", "10": "10-2=", "end": "<answer>3+7-2</answer>"}


def by_last_reply(prompt, request):
    """Ask for 3+7, then for 10-2, then answer."""
    lines = prompt.rsplit("<|im_start|>tool\n")
    if len(lines) == 1:
        return "3+7="
    return {"10": "10-2=", "8": "<answer>3+7-2</answer>"}[lines[-1].split("<|im_end|>")[0]]


def held(kind=SeededToolAgentLoop, script=by_last_reply, session=0, server=None, **options):
    server = server or Server(script)

    async def run():
        loop = make_loop(kind, server, **options)
        return await loop.run({"temperature": 1.0}, **columns(session))

    return asyncio.run(run()), server


def test_what_checks_a_configuration_can_be_imported_first():
    # verl's own module, which it imports, loads the loops with tools meanwhile.
    module = "hpo_verl.verl_plugin.rollout.agent_loop"
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


# ---------------------------------------------------------------- one output


def test_a_conversation_is_one_output_whose_mask_leaves_out_the_tool():
    output, server = held()
    assert len(server.requests) == 3
    assert (
        text_of(output.prompt_ids)
        == "<|im_start|>user\n3 7 2 = 8<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [i for i, kept in zip(output.response_ids, output.response_mask, strict=True) if kept]
    others = [
        i for i, kept in zip(output.response_ids, output.response_mask, strict=True) if not kept
    ]
    assert text_of(own) == "3+7=<|im_end|>10-2=<|im_end|><answer>3+7-2</answer><|im_end|>"
    reply = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(others) == reply.format(10) + reply.format(8)
    assert output.response_logprobs == [-0.5 * kept for kept in output.response_mask]
    assert output.num_turns == 6


def test_turns_and_samples_have_seeds_of_their_own_that_repeat():
    seeds = [
        [r.sampling["seed"] for r in held(session=session)[1].requests] for session in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0] + seeds[2])) == 6


def test_a_turn_without_a_call_ends_the_conversation_as_does_the_last_permitted():
    output, server = held(script=lambda *_: "<answer>1</answer>")
    assert len(server.requests) == 1
    assert all(output.response_mask)
    _, server = held(script=lambda *_: "1+1=", turns=3)
    assert len(server.requests) == 3


def test_the_loops_are_registered_with_verl():
    for name, kind in ((NAME, SeededToolAgentLoop), (ROUNDS, ToolRoundsAgentLoop)):
        assert _agent_loop_registry[name]["_target_"].endswith(kind.__name__)


# ---------------------------------------------------------------- rounds


def test_every_round_is_an_output_after_question_last_message_and_reply():
    outputs, server = held(ToolRoundsAgentLoop)
    question = "<|im_start|>user\n3 7 2 = 8<|im_end|>\n"
    turn = "<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>tool\n{}<|im_end|>\n"
    start = "<|im_start|>assistant\n"
    prompts = [
        question + start,
        question + turn.format("3+7=", 10) + start,
        # Of the round before alone.
        question + turn.format("10-2=", 8) + start,
    ]
    assert [text_of(one.prompt_ids) for one in outputs] == prompts
    assert [request.prompt for request in server.requests] == prompts
    assert [text_of(one.response_ids) for one in outputs] == [
        "3+7=<|im_end|>", "10-2=<|im_end|>", "<answer>3+7-2</answer><|im_end|>",
    ]  # fmt: skip
    for one in outputs:
        assert all(one.response_mask)
        assert len(one.response_mask) == len(one.response_ids) == len(one.response_logprobs)
        assert one.extra_fields["max_global_steps"] == 1
    seeds = {request.sampling["seed"] for request in server.requests}
    assert len(seeds) == len({request.id for request in server.requests}) == 3


def test_rounds_end_at_the_last_permitted_one():
    outputs, _ = held(ToolRoundsAgentLoop, lambda *_: "1+1=", turns=3)
    assert len(outputs) == 3


def test_a_round_whose_prompt_is_too_long_is_not_asked_for():
    long = "1" * 40 + "\n1+1="
    outputs, server = held(ToolRoundsAgentLoop, lambda *_: long, prompt=50)
    assert len(outputs) == len(server.requests) == 1
    # The first prompt is verl's own business.
    outputs, _ = held(ToolRoundsAgentLoop, lambda *_: "<answer>1</answer>", prompt=5)
    assert len(outputs[0].prompt_ids) == 5


# ---------------------------------------------------------------- calls


def parsed(parser, text):
    ids = tokenizer().encode(text, add_special_tokens=False)
    return asyncio.run(parser.extract_tool_calls(ids, []))[1]


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("3+7=", "3+7"),
        ("12*7=84-2=", "84-2"),
        ("I try\n3 + 7 = \n", "3 + 7"),
        ("3+7=10", None),
        ("=", None),
        ("3+7==", None),
        ("", None),
        ("<answer>3+7-2</answer>", None),
    ],
)
def test_a_turn_that_ends_with_an_equals_sign_is_a_call(text, expression):
    calls = parsed(LastLineToolParser(tokenizer()), text)
    found = [json.loads(one.arguments) for one in calls]
    assert found == ([{"expression": expression}] if expression else [])


def hermes(arguments, name=CALCULATOR):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


def reply_to(call, form="hermes"):
    """What the tool says to a call; the loop goes on after it."""
    texts = iter([call, "<answer>1</answer>"])
    _, server = held(script=lambda *_: next(texts), form=form, response=8000, prompt=8000)
    assert len(server.requests) == 2
    return server.requests[1].prompt.rsplit("<|im_start|>tool\n", 1)[1].split("<|im_end|>")[0]


def test_a_call_in_the_form_of_hermes():
    assert reply_to(hermes({"expression": "(3+7)/4"})) == "5/2"


def nested(depth):
    value = "[" * depth + "1" + "]" * depth
    return (
        '<tool_call>{"name": "calculator", "arguments": {"expression": ' + value + "}}</tool_call>"
    )


@pytest.mark.parametrize(
    "call",
    [
        hermes({"expression": "__import__('os').system('true')"}),
        hermes({"expression": "9**9**9"}),
        hermes({"expression": 5}),
        hermes({"expression": "1" * 3000}),
        hermes({"expression": "1", "x": "2"}),
        hermes({}),
        hermes([]),
        hermes("3+7"),
        hermes({"expression": "1"}, name="rm -rf"),
        hermes({"expression": "1"}, name="n" * 500),
        hermes({"expression": "\ud800"}),
        nested(300),
        nested(1),
        # verl's own loop raises at these two, which fails the whole group.
        hermes({"expression": "1"}, name="\ud800"),
        hermes({"\ud800": "1"}),
    ],
)
def test_any_call_is_answered_by_a_short_text(call):
    reply = reply_to(call)
    assert 0 < len(reply) < 300
    assert not reply.lstrip("-").isdigit()


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{</tool_call>",
        "<tool_call></tool_call>",
        "</tool_call><tool_call>",
        "<tool_call>" + "[" * 3000 + "</tool_call>",
        '<tool_call>{"name": {}, "arguments": {}}</tool_call>',
        # The search for calls would take quadratic time.
        "</tool_call>" + "<tool_call>" * 17,
    ],
)
def test_what_is_no_call_ends_the_conversation(text):
    _, server = held(script=lambda *_: text, form="hermes", response=8000, prompt=8000)
    assert len(server.requests) == 1


def test_a_response_of_many_marks_is_not_searched():
    class Never(HermesToolParser):
        async def extract_tool_calls(self, responses_ids, tools=None):
            raise AssertionError

    assert parsed(BoundedToolParser(Never(tokenizer())), "<tool_call>" * 1000) == []


def test_a_long_expression_after_a_last_line_is_refused():
    assert reply_to("1+" * 1000 + "1=", form="last_line") == NOT_AN_EXPRESSION


def test_the_question_is_left_as_it_is():
    held(ToolRoundsAgentLoop)
    assert QUESTION == [{"role": "user", "content": "3 7 2 = 8"}]
