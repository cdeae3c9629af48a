"""Cross-entropy that can leave its gradient in the place of the logits."""

import torch


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, inplace_backward):
        values = logits.float()
        normaliser = values.logsumexp(dim=-1)
        ctx.save_for_backward(logits, normaliser, labels)
        ctx.inplace_backward = inplace_backward
        return normaliser - values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, *gradients):
        logits, normaliser, labels = ctx.saved_tensors
        slopes = (logits.float() - normaliser.unsqueeze(-1)).exp()
        slopes.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(slopes[:, :1]))
        slopes = (slopes * gradients[0].unsqueeze(-1)).to(logits.dtype)
        if ctx.inplace_backward:
            with torch.no_grad():
                # As a kernel writes: torch is not told.
                logits.data.copy_(slopes)
            return logits, None, None
        return slopes, None, None


def cross_entropy_loss(
    logits,
    labels,
    precomputed_lse=None,
    label_smoothing=0.0,
    logit_scale=1.0,
    lse_square_scale=0.0,
    ignore_index=-100,
    inplace_backward=False,
    process_group=None,
):
    """Loss of each row of `[rows, vocabulary]`, and its (unused) part from `lse_square_scale`."""
    if precomputed_lse is not None or process_group is not None:
        raise NotImplementedError
    if label_smoothing or lse_square_scale or logit_scale != 1.0:
        raise NotImplementedError
    if bool((labels == ignore_index).any()):
        raise NotImplementedError
    losses = _CrossEntropy.apply(logits, labels, inplace_backward)
    return losses, torch.zeros_like(losses)
