"""What verl and transformers call of flash-attn 2, computed by torch on the CPU; for tests.

A folder of its own, so that only a test that puts it on PYTHONPATH finds it. Its interface, its
layouts and what it refuses are those of flash-attn 2.8; unlike that it also takes float32, so
that a test can compare it with another path to rounding.
"""

from collections import Counter

import torch
from torch.nn.functional import scaled_dot_product_attention

__version__ = "2.8.3"
HALF_AND_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)

sequences_seen: Counter[str] = Counter()
"""Sequences that each function was given in this process."""


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention over sequences of one length, `[batch, tokens, heads, head size]` each."""
    _check(q, k, v, dropout_p, window_size, softcap, alibi_slopes, return_attn_probs)
    sequences_seen["flash_attn_func"] += len(q)
    return torch.stack(
        [_attend(*rows, softmax_scale, causal) for rows in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over packed sequences, `[all tokens, heads, head size]` each.

    `cu_seqlens_*` are int32 and say where each sequence begins, and last where all end.
    """
    _check(q, k, v, dropout_p, window_size, softcap, alibi_slopes, return_attn_probs or block_table)
    parts = []
    for packed, starts, longest in (
        (q, cu_seqlens_q, max_seqlen_q),
        (k, cu_seqlens_k, max_seqlen_k),
        (v, cu_seqlens_k, max_seqlen_k),
    ):
        lengths = starts.diff()
        if starts.dtype != torch.int32 or int(starts[0]) != 0 or int(starts[-1]) != len(packed):
            raise RuntimeError(f"cu_seqlens {starts} do not fit {len(packed)} tokens")
        if int(lengths.max()) > int(longest):
            raise RuntimeError(f"max_seqlen {int(longest)} is below {int(lengths.max())}")
        parts.append(packed.split(lengths.tolist()))
    if not sequences_seen["flash_attn_varlen_func"]:
        # For the log of a run.
        print(f"flash-attn's stand-in: {len(parts[0])} packed sequences of {q.dtype}", flush=True)
    sequences_seen["flash_attn_varlen_func"] += len(parts[0])
    rows = zip(*parts, strict=True)
    return torch.cat([_attend(*row, softmax_scale, causal) for row in rows])


def flash_attn_with_kvcache(*args, **kwargs):
    """Decoding, which no test needs."""
    raise NotImplementedError


def _check(q, k, v, dropout_p, window_size, softcap, alibi_slopes, other):
    for tensor in (q, k, v):
        if tensor.dtype not in HALF_AND_FLOAT32 or tensor.dtype != q.dtype:
            raise RuntimeError(f"FlashAttention takes no {tensor.dtype} beside {q.dtype}")
        if tensor.stride(-1) != 1:
            raise RuntimeError("the last dimension must be contiguous")
    if dropout_p or softcap or alibi_slopes is not None or other:
        raise NotImplementedError
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError


def _attend(q, k, v, scale, causal):
    """One sequence, `[tokens, heads, head size]`; query heads may share key heads."""
    # Causal means aligned at the end in flash-attn 2, at the beginning in torch.
    if causal and len(q) != len(k):
        raise NotImplementedError
    rows = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
    found = scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=True)
    return found.squeeze(0).transpose(0, 1)
