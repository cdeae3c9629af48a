"""A single-turn agent loop whose samples repeat, each at a temperature of its own.

verl gives every request a random id, so a rollout server cannot tell which
noise belongs to which sample. This loop adds a seed to the sampling parameters
that follows from the sample itself; vLLM and the backend `hf` both honour it.
A prompt may come with factors on the temperature of its first samples, with what these begin
with or are, and with a rule for the temperature of every token, which `hf` alone follows.
"""

from __future__ import annotations

import asyncio
import json
from copy import copy
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from hpo_verl.verl_plugin.extras import OPENINGS, TEMPERATURE_RULE, TEMPERATURES
from hpo_verl.verl_plugin.rollout.openings import OpenedServers
from hpo_verl.verl_plugin.rollout.seeds import sample_seed

NAME = "seeded_single_turn_agent"
PROMPTS_KEPT = 4096


@register(NAME)
class SeededSingleTurnAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn loop with a seed per sample."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts: dict[str, asyncio.Task[list[int]]] = {}

    async def ct_build_initial_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, messages: list[dict[str, Any]], tools: Any = None, **media: Any
    ) -> list[int]:
        """Tokenise a prompt once for all of its samples."""
        build = super().ct_build_initial_tokens
        if tools or any(media.values()):
            return await build(messages, tools, **media)
        name = repr(messages)
        if name not in self._prompts:
            if len(self._prompts) >= PROMPTS_KEPT:
                self._prompts.clear()
            self._prompts[name] = asyncio.create_task(build(messages))
        return list(await self._prompts[name])

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any
    ) -> AgentLoopOutput:
        """Generate one response with noise that depends on the sample's name alone."""
        if openings := kwargs.pop(OPENINGS, None):
            loop, longest = copy(self), self.rollout_config.response_length
            opened = OpenedServers(self.server_manager, self.tokenizer, longest, openings, kwargs)
            loop.server_manager = opened
            output = await loop.run(sampling_params, priority, **kwargs)
            opened.mark(output)
            return output
        seed = sample_seed(
            self.rollout_config.seed,
            kwargs["global_steps"],
            kwargs.get("index"),
            kwargs["session_id"],
            [(message["role"], message["content"]) for message in kwargs["raw_prompt"]],
        )
        factors = json.loads(kwargs.pop(TEMPERATURES, "[]"))[kwargs["session_id"] :]
        temperature = sampling_params["temperature"] * (factors[0] if factors else 1.0)
        seeded = {**sampling_params, "seed": seed, "temperature": temperature}
        if (by_token := kwargs.pop(TEMPERATURE_RULE, None)) is not None:
            seeded[TEMPERATURE_RULE] = json.loads(by_token)
        # Concrete in the parent, though verl's decorator hides that from a type checker.
        return await super().run(  # pyright: ignore[reportAbstractUsage]
            seeded, priority=priority, **kwargs
        )
