"""The sum of weights and a LoRA adapter, as precise as the actor computes with it.

verl sends the sum to the rollout in bfloat16, whatever the actor's type, and a small adapter is
less than its rounding. Where the actor computes in bfloat16, so does a rollout; where it computes
in float32, as on the CPU, the rollout gets float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor


def adapter_engine(parent: type) -> type:
    """Extend `FSDPEngineWithLMHead`, or a class made of it, by sums that are not rounded."""
    from verl.utils.fsdp_utils import (
        merged_lora_context,
        normalize_peft_param_name,
        offload_fsdp_model_to_cpu,
    )
    from verl.utils.model import convert_weight_keys

    class AdapterEngine(parent):
        """verl's engine; a rollout gets the sum in the actor's precision."""

        def _merged_lora_per_tensor_param(self) -> Iterator[tuple[str, torch.Tensor]]:
            if self._autocast_dtype == torch.bfloat16:
                yield from super()._merged_lora_per_tensor_param()
                return
            try:
                with merged_lora_context(self.module, backup_adapters=True):
                    wrapped = getattr(self.module, "_fsdp_wrapped_module", self.module)
                    weights = normalize_peft_param_name(self.module.state_dict())
                    for name, weight in convert_weight_keys(weights, wrapped).items():
                        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
                        # The weights themselves are without the adapter before the last is sent.
                        yield name, whole.detach().clone()
            finally:
                if self._is_offload_param:
                    offload_fsdp_model_to_cpu(self.module)

    return AdapterEngine
