"""An agent-loop worker that asks for, scores and stores responses in bulk.

verl's worker sends every request to a rollout server, every response to a reward
worker and from there to TransferQueue, in messages of their own. For short
responses that costs several times what generating them does. Here what is ready
at the same time travels together; what is computed stays the same. Selected by
verl's own setting `actor_rollout_ref.rollout.agent.agent_loop_manager_class`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import ray
import torch
import transfer_queue as tq
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap, ToolListWrap
from verl.protocol import DataProto
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from hpo_verl.verl_plugin.rollout.agent_loop import NAME, SeededSingleTurnAgentLoop
from hpo_verl.verl_plugin.rollout.coalescer import Coalescer

# Of the data set's columns, those that verl's trainer reads after the reward; the
# others would be copied to every worker at every pass.
COLUMNS_READ_LATER = ("uid", "data_source", "reward_model")

Item = TypeVar("Item")
Response = tuple[AgentLoopOutput, dict[str, Any]]
"""A response, and the fields of the data set that belong to it."""


def shares(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Items in at most `count` parts of about one size, in their order."""
    share = -(-len(items) // count)
    return [items[start : start + share] for start in range(0, len(items), share)]


class CoalescingClient(LLMServerClient):
    """verl's client, with the requests that arrive together in one message a server."""

    def __init__(self, client: LLMServerClient, servers: int) -> None:
        super().__init__(client.config, client._load_balancer)
        self._servers = servers
        self._requests: Coalescer[dict[str, Any], TokenOutput] = Coalescer(self._generate_together)

    async def generate(self, request_id: str, **request: Any) -> TokenOutput:
        """Continue one prompt, together with the requests made at the same time."""
        return await self._requests.submit({"request_id": request_id, **request})

    async def _generate_together(
        self, requests: list[dict[str, Any]]
    ) -> list[TokenOutput | BaseException]:
        parts = shares(requests, self._servers)
        answers = await asyncio.gather(*(self._generate_on_one_server(part) for part in parts))
        return [answer for part in answers for answer in part]

    async def _generate_on_one_server(
        self, requests: Sequence[dict[str, Any]]
    ) -> list[TokenOutput | BaseException]:
        request_id = requests[0]["request_id"]
        server_id, server = await self._acquire_server(request_id)
        try:
            return await server.generate_batch.remote(requests)
        finally:
            self._release_server(server_id, request_id=request_id)


def reward_batch(items: Sequence[Response]) -> DataProto:
    """What verl's reward workers read, for many responses at once.

    Tensors are padded on the right with 0; the data set's fields are object arrays.
    """
    prompts = [torch.tensor(output.prompt_ids) for output, _ in items]
    responses = [torch.tensor(output.response_ids) for output, _ in items]
    prompt_mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True)
    response_mask = pad_sequence([torch.ones_like(row) for row in responses], batch_first=True)
    columns: dict[str, list[Any]] = {
        **{key: [kwargs[key] for _, kwargs in items] for key in items[0][1]},
        "__num_turns__": [output.num_turns for output, _ in items],
        "tool_extra_fields": [output.extra_fields for output, _ in items],
    }
    return DataProto.from_dict(
        tensors={
            "prompts": pad_sequence(prompts, batch_first=True),
            "responses": pad_sequence(responses, batch_first=True),
            "attention_mask": torch.cat([prompt_mask, response_mask], dim=1),
        },
        # np.array() would turn equally long lists into a matrix.
        non_tensors={key: np.fromiter(column, object) for key, column in columns.items()},
    )


# Ray wraps verl's class; the plain one is what can be subclassed.
_verl_actor: Any = AgentLoopWorkerTQ
_VerlWorker: Any = _verl_actor.__ray_metadata__.modified_class


class CoalescingAgentLoopWorker(_VerlWorker):
    """verl's agent-loop worker with bulk scoring and bulk storage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finished: dict[str, Coalescer[Response, dict[str, Any]]] = {
            partition: Coalescer(partial(self._score_and_store, partition))
            for partition in ("train", "val")
        }
        if self.rollout_config.name == "hf":
            trainer = self.config.trainer
            self.llm_client = CoalescingClient(
                self.llm_client, servers=trainer.n_gpus_per_node * trainer.nnodes
            )

    @cached_property
    def _single_turn_loop(self) -> SeededSingleTurnAgentLoop:
        """One loop for all responses: it keeps no state between them, and takes 5 ms to make."""
        return SeededSingleTurnAgentLoop(
            trainer_config=DictConfigWrap(self.config),
            server_manager=self.llm_client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            hf_model_type=self.hf_model_type,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
            tools=ToolListWrap(self.tools),
        )

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        if agent_name != NAME or trace:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        output = await self._single_turn_loop.run(sampling_params, **kwargs)
        return await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        only_text = self.processor is None and not self.distillation_enabled
        scored_here = only_text and self.reward_loop_worker_handles is not None
        if isinstance(output, list) or output.reward_score is not None or not scored_here:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
        else:
            await self._finished["val" if validate else "train"].submit((output, kwargs))

    async def _score_and_store(
        self, partition_id: str, responses: list[Response]
    ) -> list[dict[str, Any] | BaseException]:
        workers = self.reward_loop_worker_handles
        parts = zip(workers, shares(responses, len(workers)), strict=False)
        answers = await asyncio.gather(*(scores_of(worker, part) for worker, part in parts))
        scores = [score for part in answers for score in part]
        rows = [
            _stored(*response, score)
            for response, score in zip(responses, scores, strict=True)
            if not isinstance(score, BaseException)
        ]
        if rows:
            keys, fields, tags = map(list, zip(*rows, strict=True))
            await tq.async_kv_batch_put(
                keys=keys,
                fields=list_of_dict_to_tensordict(fields),
                tags=tags,
                partition_id=partition_id,
            )
        return scores


async def scores_of(
    worker: Any, responses: Sequence[Response]
) -> list[dict[str, Any] | BaseException]:
    """Let a reward worker score responses; one that fails is answered by its error."""
    try:
        return await worker.compute_score_batch.remote(reward_batch(responses))
    except Exception:
        # One bad response must not cost the others their scores.
        return await asyncio.gather(
            *(worker.compute_score.remote(reward_batch([response])) for response in responses),
            return_exceptions=True,
        )


def _stored(
    output: AgentLoopOutput, kwargs: dict[str, Any], score: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Key, fields and tag of a response in TransferQueue, as verl's worker names them."""
    output.reward_score = score["reward_score"]
    output.extra_fields["reward_extra_info"] = score["reward_extra_info"]
    field = output.as_dict()
    field.pop("metrics", None)
    field |= {name: kwargs[name] for name in COLUMNS_READ_LATER if name in kwargs}
    input_ids = torch.cat([field["prompts"], field["responses"]])
    field["loss_mask"] = field["response_mask"]
    field["input_ids"] = input_ids
    field["position_ids"] = torch.arange(len(input_ids))
    tag = {
        "status": "success",
        "prompt_len": len(field["prompts"]),
        "response_len": len(field["responses"]),
        "seq_len": len(input_ids),
        "global_steps": kwargs["global_steps"],
        "min_global_steps": output.extra_fields.get("min_global_steps"),
        "max_global_steps": output.extra_fields.get("max_global_steps"),
    }
    return f"{kwargs['uid']}_{kwargs['session_id']}_0", field, tag


class CoalescingAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent-loop manager with `CoalescingAgentLoopWorker` as its workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CoalescingAgentLoopWorker)
