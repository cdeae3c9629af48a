"""An agent loop whose sessions branch after tool calls; see `verl_plugin.branching`.

verl starts all sessions of a prompt at once, in one process. Here they wait for each other and are
let go in waves: the monitored one, those from the root, those that branch off from what came
before. A wave is planned when all sessions of the last one have ended, so that the plan depends on
what was sampled and not on what was faster.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any, NamedTuple

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState

from hpo_verl.core.branching import global_samples
from hpo_verl.verl_plugin.branching import (
    NAME,
    RECORD,
    BranchingSettings,
    branching_settings,
)
from hpo_verl.verl_plugin.rollout.tool_loops import SeededToolAgentLoop


class Place(NamedTuple):
    """Where a session is to branch: after a tool's reply.

    Attributes:
        value: P_t.
        session: Number of the session that came there.
        turns: How many turns of the policy lie before it.
        in_a_row: Branchings in a row, this one included.
        root: Entropy at the session's root, nats.
        state: The conversation there.
    """

    value: float
    session: int
    turns: int
    in_a_row: int
    root: float
    state: AgentData


class Siblings:
    """The sessions of one prompt."""

    def __init__(self, settings: BranchingSettings) -> None:
        self.settings = settings
        self.waiting: dict[int, asyncio.Future[Place | None]] = {}
        self.running: set[int] = set()
        self.places: list[Place] = []
        # Of the monitored session, then of those after it.
        self.entropies: list[float] = []
        self.waves = 0

    async def join(self, session: int) -> Place | None:
        """Wait for the session's wave; returns where it is to start, None for the root."""
        loop = asyncio.get_running_loop()
        self.waiting[session] = loop.create_future()
        if len(self.waiting) == 1 and not self.running:
            # Behind the first steps of the sessions that were started together with this one.
            loop.call_soon(self.release)
        return await self.waiting[session]

    def leave(self, session: int, entropies: list[float], places: list[Place]) -> None:
        """Note what a session that has ended, or failed, has come across."""
        if session not in self.running:
            # Cancelled while it waited.
            self.waiting.pop(session, None)
            return
        self.running.discard(session)
        if self.waves == 1:
            self.entropies = entropies
        self.places += places
        if not self.running:
            self.release()

    def release(self) -> None:
        """Let the next wave go."""
        # A session that is being cancelled starts nothing, and so ends nothing.
        while self.waiting and not self.running:
            wave = self.plan()
            self.waves += 1
            for session, place in wave:
                future = self.waiting.pop(session)
                if not future.done():
                    self.running.add(session)
                    future.set_result(place)

    def plan(self) -> list[tuple[int, Place | None]]:
        """The next wave: its sessions, and where each is to start."""
        waiting = sorted(self.waiting)
        if self.waves == 0:
            return [(session, None) for session in waiting[:1]]
        if self.waves == 1:
            root, *tools = self.entropies or [0.0]
            total, beta = 1 + len(waiting), self.settings.sensitivity
            from_root = global_samples(total, root, tools, beta) - 1
            if from_root:
                return [(session, None) for session in waiting[:from_root]]
        places, self.places = self.places, []
        places.sort(key=lambda place: (-place.value, place.session, place.turns))
        starts = [place for place in places for _ in range(self.settings.width - 1)]
        if not starts:
            return [(session, None) for session in waiting]
        return list(zip(waiting, starts, strict=False))


_siblings: dict[object, Siblings] = {}


def copy_of(state: AgentData) -> AgentData:
    """A conversation that goes on by itself."""
    found = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, list | dict):
            setattr(found, name, copy.copy(value))
    return found


class BranchingToolAgentLoop(SeededToolAgentLoop):
    """The calculator's loop, one output a session, whose sessions branch."""

    _start: Place | None = None
    _session = 0
    _in_a_row = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = branching_settings(self.rollout_config)
        self._entropies: list[float] = []
        self._changes: list[float] = []
        self._places: list[Place] = []

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Hold one conversation, from the root or from where another one branched."""
        key, self._session = kwargs["uid"], kwargs["session_id"]
        siblings = _siblings.setdefault(key, Siblings(self.settings))
        try:
            self._start = await siblings.join(self._session)
            if self._start is not None:
                self._in_a_row = self._start.in_a_row
                self._entropies = [self._start.root]
            output: Any = await super().run(sampling_params, priority=priority, **kwargs)
        finally:
            siblings.leave(self._session, self._entropies, self._places)
            if not siblings.waiting and not siblings.running:
                _siblings.pop(key, None)
        record = {"branched": self._start is not None, "changes": self._changes}
        output.extra_fields[RECORD] = record
        return output

    async def _handle_pending_state(
        self, agent_data: AgentData, sampling_params: dict[str, Any]
    ) -> AgentState:
        if self._start is None:
            return await super()._handle_pending_state(agent_data, sampling_params)
        # The server must not take the branch for the session it comes from.
        own = {"request_id": agent_data.request_id}
        vars(agent_data).update(vars(copy_of(self._start.state)), **own)
        return AgentState.GENERATING

    async def _handle_generating_state(
        self,
        agent_data: AgentData,
        sampling_params: dict[str, Any],
        ignore_termination: bool = False,
    ) -> AgentState:
        before, turns = copy_of(agent_data), agent_data.assistant_turns
        state = await super()._handle_generating_state(
            agent_data, sampling_params, ignore_termination
        )
        made = agent_data.response_logprobs[len(before.response_mask) :][: self.settings.tokens]
        entropy = -sum(made) / max(len(made), 1)
        if self._start is not None and turns == self._start.turns:
            # Where it branched off itself.
            return state
        self._entropies.append(entropy)
        if turns:
            change = entropy - self._entropies[0]
            self._changes.append(change)
            value = self.settings.value(change, self._in_a_row)
            self._in_a_row = self._in_a_row + 1 if value > self.settings.threshold else 0
            if self._in_a_row:
                root = self._entropies[0]
                self._places.append(
                    Place(value, self._session, turns, self._in_a_row, root, before)
                )
        return state


register(NAME)(BranchingToolAgentLoop)
