"""Kernels that flash-attn writes in Triton."""
