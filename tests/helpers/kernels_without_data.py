"""CUDA kernels of the actor as functions that keep and allocate what their sources do.

flash-attn 2.8: flash_attn_interface.py `FlashAttnVarlenFunc`, csrc/flash_attn/flash_api.cpp
`mha_varlen_bwd`, ops/triton/cross_entropy.py `CrossEntropyLoss`. flash-linear-attention 0.5:
ops/gated_delta_rule/chunk.py, modules/fused_norm_gate.py. causal-conv1d: its one function.
"""

import torch


class FlashAttention(torch.autograd.Function):
    """What flash-attn's attention over packed sequences keeps and allocates."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2]).float())
        return out

    @staticmethod
    def backward(ctx, _):
        query, key, value, _, _ = ctx.saved_tensors
        # Sums of the query's gradient in float32, and key and value once for each query head.
        buffers = [query.new_empty(query.shape, dtype=torch.float32)]
        buffers += [torch.empty_like(query), torch.empty_like(query)]
        return tuple(torch.empty_like(t) for t in (query, key, value))


class DeltaRule(torch.autograd.Function):
    """What flash-linear-attention 0.5's chunks of the gated delta rule keep and allocate."""

    CHUNK = 64

    @staticmethod
    def forward(ctx, query, key, value, decay, beta):
        rows = query.shape[:3]
        within = query.new_empty(*rows, DeltaRule.CHUNK)
        scales = [query.new_empty(rows, dtype=torch.float32) for _ in range(3)]
        kept = torch.empty_like(query), torch.empty_like(key), value, beta, within, *scales
        ctx.save_for_backward(*kept)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx, _):
        query, key, value, beta, *_ = ctx.saved_tensors
        tokens, heads, width = query.shape[1:]
        # The state before each chunk and its gradient.
        states = [query.new_empty(tokens // DeltaRule.CHUNK, heads, width, width) for _ in "hd"]
        states += [torch.empty_like(t) for t in (query, key, value, value)]
        decay = beta.new_empty(beta.shape, dtype=torch.float32)
        return (*(torch.empty_like(t) for t in (query, key, value)), decay, torch.empty_like(beta))


def delta_rule(query, key, value, g, beta, **_):
    return DeltaRule.apply(query, key, value, g, beta), None


class Convolution(torch.autograd.Function):
    """What causal-conv1d with SiLU keeps and allocates."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class GatedNorm(torch.nn.Module):
    """flash-linear-attention's norm, whose gate is part of it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, values, gate):
        return GatedNormFunction.apply(values, gate, self.weight)


class GatedNormFunction(torch.autograd.Function):
    """What it keeps and allocates."""

    @staticmethod
    def forward(ctx, values, gate, weight):
        ctx.save_for_backward(values, gate, weight)
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class CrossEntropy(torch.autograd.Function):
    """What flash-attn's cross entropy keeps and allocates."""

    @staticmethod
    def forward(ctx, logits, labels, in_place):
        losses, log_sums = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, log_sums, labels)
        ctx.in_place = in_place
        return losses

    @staticmethod
    def backward(ctx, _):
        logits = ctx.saved_tensors[0]
        return (logits if ctx.in_place else torch.empty_like(logits)), None, None
