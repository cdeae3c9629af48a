"""verl on a machine without an accelerator.

verl 0.9.1 says that it does not support CPUs. This folder is the one place
that bridges what it lacks:

- `platform`: device, memory and random-number functions for "cpu", through
  verl's `PlatformRegistry`;
- `bridges`: the places where verl offers no hook;
- `sampling`, `generation`, `server`: the rollout backend `hf`, which generates
  with transformers behind verl's asynchronous server interface;
- `vllm_worker`: what vLLM's own workers need, for the rollout backend `vllm`.
"""
