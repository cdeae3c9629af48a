"""Kernels of flash-attn outside of attention."""
