"""Agent loops with a calculator: verl's tool agent loop, with seeds and bounds.

`seeded_tool_agent` gives a conversation as one output, as verl's own `tool_agent` does.
`tool_rounds_agent` gives every round as an output of its own, after a prompt that holds the
question, the last message of the policy and the tool's reply, and nothing else (IterResearch, arXiv
2511.07327): what the policy is to remember it must write down again. A round whose prompt would be
longer than `data.max_prompt_length` is not asked for; the session ends with the round before.

The tool is `calculator` where the configuration names no tools. A call comes in one of verl's
formats (`rollout.multi_turn.format`), or as `last_line`: a turn that ends with `=` asks for the
value of what stands before it in its last line. That suits policies whose chat template knows no
tools.

Calls are text of a model, and are bounded before verl looks for and answers them: its search takes
quadratic time in the marks of calls, and its answer to a name that holds half of a surrogate pair
raises where nothing catches it, which fails the whole group.
"""

from __future__ import annotations

import json
from typing import Any

from verl.experimental.agent_loop.agent_loop import (
    AgentLoopMetrics,
    AgentLoopOutput,
    ToolListWrap,
    register,
)
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool, get_function_tool

from hpo_verl.rewards.calculator import calculate
from hpo_verl.rewards.expression import MAX_CHARACTERS
from hpo_verl.verl_plugin.rollout.seeds import sample_seed

NAME = "seeded_tool_agent"
ROUNDS = "tool_rounds_agent"
CALCULATOR = "calculator"
LAST_LINE = "last_line"

MAX_CALL_CHARACTERS = 4_000
MAX_NAME_CHARACTERS = 64
MAX_CALL_MARKS = 16
"""Responses with more marks that open a call are not searched for calls."""

_MARK = "<tool_call>"


@function_tool(CALCULATOR)
def calculator(expression: str) -> str:
    """Compute an expression of integers with + - * / and parentheses, exactly.

    Args:
        expression: For example (3 + 7) / 4
    """
    return calculate(expression)


@ToolParser.register(LAST_LINE)
class LastLineToolParser(ToolParser):
    """Takes `12*7=84-2=` at the end of a turn for a question after `84-2`."""

    async def extract_tool_calls(
        self, responses_ids: list[int], tools: Any = None
    ) -> tuple[str, list[FunctionCall]]:
        """Return the turn's text, and the call if it ends with one."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        line = text.rstrip()
        if not line.endswith("="):
            return text, []
        start = max(line.rfind("=", 0, -1), line.rfind("\n"))
        expression = line[start + 1 : -1].strip()
        if not expression:
            return text, []
        # One more than the calculator reads, which so refuses it.
        arguments = json.dumps({"expression": expression[: MAX_CHARACTERS + 1]})
        return text, [FunctionCall(name=CALCULATOR, arguments=arguments)]


class BoundedToolParser:
    """A parser of verl's whose calls are short and flat.

    Any other call comes without arguments, so that the tool says what it lacks.
    """

    def __init__(self, parser: Any) -> None:
        self.parser = parser

    @property
    def stop_token_ids(self) -> list[int]:
        """Those of the parser."""
        return self.parser.stop_token_ids

    async def extract_tool_calls(
        self, responses_ids: list[int], tools: Any = None
    ) -> tuple[str, list[FunctionCall]]:
        """Return the turn's text without calls, and the calls."""
        text = self.parser.tokenizer.decode(responses_ids)
        if text.count(_MARK) > MAX_CALL_MARKS:
            return text, []
        content, calls = await self.parser.extract_tool_calls(responses_ids, tools)
        return content, [_bounded(one) for one in calls]


def _bounded(call: FunctionCall) -> FunctionCall:
    """The call itself where it is short, flat and can be encoded; else without arguments."""
    plain = call.name.isascii() and call.name.isprintable()
    name = call.name if plain and len(call.name) <= MAX_NAME_CHARACTERS else "?"
    if len(call.arguments) <= MAX_CALL_CHARACTERS:
        try:
            arguments = json.loads(call.arguments)
            flat = isinstance(arguments, dict) and not any(
                isinstance(value, list | dict) for value in arguments.values()
            )
            # verl's answers repeat names; half of a surrogate pair could not be made tokens of.
            if flat and "".join(map(str, [name, *arguments, *arguments.values()])).encode():
                return FunctionCall(name=name, arguments=call.arguments)
        except (ValueError, RecursionError):
            pass
    return FunctionCall(name=name, arguments="{}")


# Its decorator hides what a class has from a type checker; so ours are registered below.
_VerlLoop: Any = ToolAgentLoop


class SeededToolAgentLoop(_VerlLoop):
    """verl's tool agent loop with a seed per turn, and the calculator as its tool."""

    _sample: tuple[int, int, Any, int]
    _messages: list[tuple[Any, Any]]

    def __init__(self, *args: Any, tools: ToolListWrap | None = None, **kwargs: Any) -> None:
        if tools is None or not tools.tools:
            tools = ToolListWrap([get_function_tool(CALCULATOR)])
        super().__init__(*args, tools=tools, **kwargs)
        self.tool_parser: Any = BoundedToolParser(self.tool_parser)

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Hold one conversation, with noise that depends on the sample's name alone."""
        self._name(kwargs)
        return await super().run(sampling_params, priority=priority, **kwargs)

    def _name(self, kwargs: dict[str, Any]) -> None:
        self._messages = [(one["role"], one["content"]) for one in kwargs["raw_prompt"]]
        self._sample = (
            self.rollout_config.seed,
            kwargs["global_steps"],
            kwargs.get("index"),
            kwargs["session_id"],
        )

    async def _handle_generating_state(
        self,
        agent_data: AgentData,
        sampling_params: dict[str, Any],
        ignore_termination: bool = False,
    ) -> AgentState:
        seed = sample_seed(*self._sample, (self._messages, agent_data.assistant_turns))
        return await super()._handle_generating_state(
            agent_data, {**sampling_params, "seed": seed}, ignore_termination
        )


class _PromptTooLong(Exception):
    """The workspace of a later round does not fit into the prompt's tokens."""


class ToolRoundsAgentLoop(SeededToolAgentLoop):
    """A calculator's loop whose rounds are outputs of their own, each after a short prompt."""

    _round = 0

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any
    ) -> list[AgentLoopOutput]:
        """Hold one conversation, and return its rounds in their order."""
        self._name(kwargs)
        question = list(kwargs["raw_prompt"])
        workspace, outputs = question, []
        request_id = self._make_request_id(priority, self.rollout_config.full_determinism)
        state = AgentState.PENDING
        while state != AgentState.TERMINATED:
            self._round = len(outputs)
            data = AgentData(
                messages=list(workspace),
                image_data=None,  # type: ignore[arg-type] - as for a prompt of text
                video_data=None,  # type: ignore[arg-type]
                audio_data=None,
                mm_processor_kwargs=None,
                metrics={},
                request_id=f"{request_id}-{self._round}",
                tools_kwargs=kwargs.get("tools_kwargs", {}),
            )
            data.assistant_turns = data.user_turns = self._round
            try:
                await self._handle_pending_state(data, sampling_params)
            except _PromptTooLong:
                break
            state = await self._handle_generating_state(data, sampling_params)
            # The tool's reply is no part of the round's response, but of the next prompt.
            outputs.append(self._output(data))
            if state == AgentState.PROCESSING_TOOLS:
                state = await self._handle_processing_tools_state(data)
            workspace = question + data.messages[len(workspace) :]
        return outputs

    def _cap_text_prompt_length(self, prompt_ids: list[int]) -> list[int]:
        if self._round and len(prompt_ids) > self.rollout_config.prompt_length:
            # verl would cut off its beginning, the question.
            raise _PromptTooLong
        return super()._cap_text_prompt_length(prompt_ids)

    def _output(self, data: AgentData) -> AgentLoopOutput:
        length, most = len(data.response_mask), self.response_length
        start = len(data.prompt_ids) - length
        return AgentLoopOutput(
            prompt_ids=data.prompt_ids[:start],
            response_ids=data.prompt_ids[start : start + most],
            response_mask=data.response_mask[:most],
            response_logprobs=data.response_logprobs[:most] or None,
            num_turns=data.user_turns + data.assistant_turns + 1,
            metrics=AgentLoopMetrics(**data.metrics),
            extra_fields=dict(data.extra_fields),
        )


register(NAME)(SeededToolAgentLoop)
register(ROUNDS)(ToolRoundsAgentLoop)
