"""The rollout backend `hf`: a transformers server behind verl's asynchronous interface.

The server is a Ray actor that verl's clients ask for one response at a time;
requests that arrive together are generated together. Each FSDP rank owns one
server and sends it the actor's weights after every step.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Iterable
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from hpo_verl.algorithms.base import TokenTemperature
from hpo_verl.errors import ConfigError, WeightSyncError
from hpo_verl.verl_plugin.cpu.generation import BatchGenerator, GenerationRequest
from hpo_verl.verl_plugin.extras import TEMPERATURE_RULE
from hpo_verl.verl_plugin.rollout.coalescer import Coalescer
from hpo_verl.verl_plugin.rollout.hf_settings import hf_settings
from hpo_verl.verl_plugin.rollout.weight_update import weight_update_timeout, within

# How long the server waits for further requests before it starts a batch.
ARRIVAL_PAUSE_SECONDS = 0.02
SAMPLING_KEYS = {
    *("temperature", "top_p", "top_k", "max_tokens", "max_new_tokens", "seed"),
    *("logprobs", "repetition_penalty", TEMPERATURE_RULE),
}


def server_name(config: RolloutConfig, replica_rank: int) -> str:
    """Ray actor name of a replica's server."""
    return f"{config.name}_server_{replica_rank}_0"


def request_from_sampling_params(
    prompt_ids: Iterable[int],
    sampling_params: dict[str, Any],
    request_id: str,
    config: RolloutConfig,
) -> GenerationRequest:
    """Translate verl's sampling parameters; without a seed among them the request's id is it.

    One that is unknown, unsupported or out of range raises a ConfigError.
    """
    unknown = sorted(set(sampling_params) - SAMPLING_KEYS)
    if unknown:
        raise ConfigError(f"rollout hf: unknown sampling parameter {unknown[0]!r}")
    penalty = sampling_params.get("repetition_penalty", 1.0)
    if penalty != 1.0:
        raise ConfigError(f"rollout hf: repetition_penalty={penalty}: only 1.0 is supported")
    prompt = tuple(int(token) for token in prompt_ids)
    room = (config.max_model_len or config.prompt_length + config.response_length) - len(prompt)
    wanted = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens")
    seed, by_token = sampling_params.get("seed"), sampling_params.get(TEMPERATURE_RULE)
    return GenerationRequest(
        prompt_ids=prompt,
        seed=zlib.crc32(request_id.encode()) ^ config.seed if seed is None else int(seed),
        max_tokens=max(0, min(int(wanted or config.response_length), room)),
        temperature=float(sampling_params.get("temperature", 1.0)),
        top_k=int(sampling_params.get("top_k", -1)),
        top_p=float(sampling_params.get("top_p", 1.0)),
        token_temperature=None if by_token is None else TokenTemperature(*map(float, by_token)),
    )


class HFServer:
    """Generates with transformers on this server's share of the cores; one Ray actor a replica."""

    def __init__(self, config: Any, model_config: Any, replicas: int) -> None:
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(
            model_config, dataclass_type=HFModelConfig
        )
        settings = hf_settings(self.config)
        self.model = AutoModelForCausalLM.from_pretrained(
            str(self.model_config.local_path),
            dtype=getattr(torch, self.config.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
        ).eval()
        tokenizer = self.model_config.tokenizer
        eos = self.model.generation_config.eos_token_id
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.generator = BatchGenerator(
            self.model,
            eos_token_ids=[] if self.config.ignore_eos else [*eos_ids, tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            block_rows=self.config.max_num_seqs,
            num_threads=max(1, (os.cpu_count() or 1) // replicas),
            repeatable=settings.repeatable,
        )
        self._global_steps: int | None = None
        self._requests: Coalescer[GenerationRequest, TokenOutput] = Coalescer(
            self._generate_together, ARRIVAL_PAUSE_SECONDS
        )
        self._admit = asyncio.Event()
        self._admit.set()
        self._abort = False
        # Names of the weights that an update has brought so far; None where none is going on.
        self._received: set[str] | None = None

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        **kwargs: Any,
    ) -> TokenOutput:
        """Continue one prompt; answered together with the requests that arrive with it."""
        if any(kwargs.get(f"{kind}_data") for kind in ("image", "video", "audio")):
            raise ConfigError("rollout hf: images, videos and audio are not supported")
        request = request_from_sampling_params(prompt_ids, sampling_params, request_id, self.config)
        await self._admit.wait()
        if self._received is not None:
            raise WeightSyncError("the rollout server holds a partly updated model")
        return await self._requests.submit(request)

    async def generate_batch(
        self, requests: list[dict[str, Any]]
    ) -> list[TokenOutput | BaseException]:
        """Continue many prompts; a request that fails is answered by its error."""
        return await asyncio.gather(
            *(self.generate(**request) for request in requests), return_exceptions=True
        )

    async def _generate_together(self, requests: list[GenerationRequest]) -> list[TokenOutput]:
        results = await asyncio.to_thread(
            self.generator.generate, requests, should_stop=lambda: self._abort
        )
        steps: dict[str, Any] = dict.fromkeys(
            ("global_steps", "min_global_steps", "max_global_steps"), self._global_steps
        )
        return [
            TokenOutput(
                token_ids=result.token_ids,
                log_probs=result.log_probs,
                stop_reason="completed" if result.finished else "aborted",
                extra_fields=dict(steps),
            )
            for result in results
        ]

    async def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Copy one bucket of the actor's weights into the model, or raise a WeightSyncError."""
        self._received = self._received or set()
        for name, tensor in named_tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise WeightSyncError(f"weight {name!r} holds a value that is not finite")
        try:
            unknown = self.model.load_state_dict(named_tensors, strict=False).unexpected_keys
        except RuntimeError as error:
            raise WeightSyncError(" ".join(str(error).split())) from error
        if unknown:
            raise WeightSyncError(f"weight {unknown[0]!r} is unknown to the rollout model")
        self._received.update(named_tensors)

    async def finish_weight_update(self, global_steps: int | None) -> None:
        """Check that every weight has arrived, and count them as those of `global_steps`."""
        missing = sorted(self.model.state_dict().keys() - (self._received or set()))
        if missing:
            self._received = set()
            raise WeightSyncError(f"{len(missing)} weights were not sent, {missing[0]!r} first")
        self._received = None
        if global_steps is not None:
            self._global_steps = global_steps

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """End running requests with what they have; hold new ones until resumed."""
        self._admit.clear()
        self._abort = True
        await self._requests.idle()
        self._abort = False

    async def resume_generation(self) -> None:
        """Admit requests again."""
        self._admit.set()

    async def nothing_to_do(self, *args: Any, **kwargs: Any) -> None:
        """Answer verl's control calls that concern device memory or profiling."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing_to_do
    start_profile = stop_profile = nothing_to_do


class HFReplica(RolloutReplica):
    """One `HFServer`; the model is not split over processes."""

    async def launch_servers(self) -> None:
        """Start the server's actor and wait until its model is loaded."""
        if self.world_size != 1:
            raise ConfigError(
                "rollout hf: tensor_model_parallel_size, data_parallel_size and "
                f"pipeline_model_parallel_size must be 1; their product is {self.world_size}"
            )
        actor_class: Any = ray.remote(HFServer)
        server = actor_class.options(
            name=server_name(self.config, self.replica_rank),
            max_concurrency=self.max_concurrency,
        ).remote(self.config, self.model_config, self.gpus_per_node)
        await server.__ray_ready__.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"hf:{self.replica_rank}"

    def rollout_worker_use_gpu(self) -> bool:
        """The server needs no accelerator."""
        return False


class HFServerAdapter(BaseRollout):
    """The actor's side of an `HFServer`: sends the weights. Rank -1 means this process's own."""

    def __init__(self, *args: Any, replica_rank: int = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None:
        """Nothing to do: the server never releases its memory."""

    async def release(self) -> None:
        """Nothing to do: the server never releases its memory."""

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Any,
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Send all weights to the server, in buckets through Ray's object store.

        A bucket that it refuses, or takes too long over, raises a WeightSyncError.
        """
        if wire_format != "named_tensors":
            raise ConfigError(f"rollout hf: wire format {wire_format!r} is not supported")
        server = ray.get_actor(server_name(self.config, self.replica_rank))
        seconds = weight_update_timeout(self.config)
        bucket_bytes = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        async for name, tensor in ensure_async_iterator(weights):
            if size and size + tensor.nbytes > bucket_bytes:
                await within(server.load_weights.remote(bucket), seconds, "a bucket of weights")
                bucket, size = {}, 0
            # The receiver reads from the object store, so no copy of our own is needed.
            bucket[name] = tensor.detach().to("cpu", torch.float32)
            size += bucket[name].nbytes
        await within(server.load_weights.remote(bucket), seconds, "the last bucket of weights")
        end = server.finish_weight_update.remote(global_steps)
        await within(end, seconds, "the end of the weight update")
