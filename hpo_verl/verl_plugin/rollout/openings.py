"""Responses that begin with a given text, or are one (`algorithms.base.Opening`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from hpo_verl.algorithms.base import Opening
from hpo_verl.verl_plugin.extras import OPENING


class OpenedServers:
    """The rollout servers as one sample's agent loop asks them: its opening counts as theirs.

    So verl's own loop makes the output. Log-probabilities of what is given are 0.

    Args:
        servers: The client of the servers.
        tokenizer: The policy's.
        longest: Most tokens of a response, its opening included.
        openings: Those of the prompt, as the trainer wrote them.
        sample: The sample's fields: its session, the step, `extra_info`.
    """

    def __init__(
        self, servers: Any, tokenizer: Any, longest: int, openings: str, sample: Mapping[str, Any]
    ) -> None:
        self.servers, self.tokenizer, self.longest = servers, tokenizer, longest
        given = [Opening(*one) for one in json.loads(openings)]
        self.openings = [*dict.fromkeys(given)]
        self.own = given[sample["session_id"]] if sample["session_id"] < len(given) else Opening()
        self.tokens = self._tokens(sample.get("extra_info"))
        # A synchronous step samples with the weights of the step before.
        self.step = int(sample["global_steps"]) - 1

    def _tokens(self, extra_info: Any) -> list[int]:
        """The sample's opening, a whole response ended; none where it is missing or too long."""
        text, end = self.own.text, []
        if self.own.whole:
            text = extra_info.get(self.own.whole) if isinstance(extra_info, Mapping) else None
            end = [self.tokenizer.eos_token_id]
        if not isinstance(text, str) or not text:
            return []
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return [*tokens, *end] if len(tokens) < self.longest else []

    async def generate(
        self, *, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], **request: Any
    ) -> TokenOutput:
        """Continue one prompt and its opening; a whole response is answered without a server."""
        if self.tokens and self.own.whole:
            keys = ("global_steps", "min_global_steps", "max_global_steps")
            return TokenOutput(
                token_ids=self.tokens,
                log_probs=[0.0] * len(self.tokens) if sampling_params.get("logprobs") else None,
                extra_fields=dict.fromkeys(keys, self.step),
            )
        room = {"max_tokens": self.longest - len(self.tokens)} if self.tokens else {}
        said: TokenOutput = await self.servers.generate(
            prompt_ids=[*prompt_ids, *self.tokens],
            sampling_params={**sampling_params, **room},
            **request,
        )
        said.token_ids = [*self.tokens, *said.token_ids]
        if said.log_probs:
            said.log_probs = [*[0.0] * len(self.tokens), *said.log_probs]
        return said

    def mark(self, output: AgentLoopOutput) -> None:
        """Mask a beginning that was given, and write down which opening the response has."""
        count = len(self.tokens)
        if not self.own.whole:
            output.response_mask = [*[0] * count, *output.response_mask[count:]]
        number = self.openings.index(self.own) if count else self._chosen(output.response_ids)
        output.extra_fields[OPENING] = number

    def _chosen(self, response_ids: Sequence[int]) -> int:
        """Number of the opening with which a response begins by itself; -1 without one."""
        texts = {number: one.text for number, one in enumerate(self.openings) if one.text}
        # A token has a byte at least.
        longest = max((len(text.encode()) for text in texts.values()), default=0)
        start = self.tokenizer.decode(response_ids[:longest], skip_special_tokens=False)
        return next((number for number, text in texts.items() if start.startswith(text)), -1)
