"""The last response of every prompt, kept to see how far the policy has moved since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class LastResponse(NamedTuple):
    """What scoring a response again takes: nine bytes a token, for one prompt.

    Attributes:
        prompt: Token ids, `[prompt]` int32.
        response: Token ids, `[response]` int32.
        mask: Which response tokens the policy wrote, `[response]` bool.
        log_prob: Of the response under the policy that gave it, nats, `[response]` float32.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    mask: torch.Tensor
    log_prob: torch.Tensor

    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class LastResponses(dict[int, LastResponse]):
    """Last responses by the prompt's row in the training set."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of them end to end, since many small tensors take long to write."""
        names = LastResponse._fields
        state = {"rows": torch.tensor(list(self), dtype=torch.int64)}
        for name in names:
            parts = [getattr(last, name) for last in self.values()]
            state[name] = torch.cat(parts) if parts else torch.empty(0)
            state[f"{name}_lengths"] = torch.tensor([len(part) for part in parts])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all of them."""
        self.clear()
        columns = [
            state[name].split(state[f"{name}_lengths"].long().tolist())
            for name in LastResponse._fields
        ]
        for row, *parts in zip(state["rows"].tolist(), *columns, strict=True):
            # A part is a view of the whole column; a copy lets go of it.
            self[row] = LastResponse(*(part.clone() for part in parts))


def gather(
    prompts: torch.Tensor, responses: torch.Tensor, mask: torch.Tensor, log_prob: torch.Tensor
) -> list[LastResponse]:
    """Take the responses of a batch for keeping.

    Args:
        prompts: Nested, `[batch, prompt]`.
        responses: Nested, `[batch, response]`.
        mask: Nested, `[batch, response]`.
        log_prob: Nested, nats, `[batch, response]`.
    """
    columns = (prompts.unbind(), responses.unbind(), mask.unbind(), log_prob.unbind())
    return [
        LastResponse(
            prompt.to(torch.int32),
            response.to(torch.int32),
            live.bool(),
            value.float(),
        )
        for prompt, response, live, value in zip(*columns, strict=True)
    ]


def scoring_fields(last: list[LastResponse]) -> dict[str, torch.Tensor]:
    """What verl's actor reads to give log-probabilities.

    Args:
        last: The responses to score.

    Returns:
        Nested tensors by verl's names.
    """

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    tokens = [torch.cat([one.prompt, one.response]).long() for one in last]
    mask = nested([one.mask.long() for one in last])
    return {
        "prompts": nested([one.prompt.long() for one in last]),
        "responses": nested([one.response.long() for one in last]),
        "input_ids": nested(tokens),
        "position_ids": nested([torch.arange(len(row)) for row in tokens]),
        "response_mask": mask,
        "loss_mask": mask,
    }
