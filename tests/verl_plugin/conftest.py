"""Fixtures of several files here."""

from algorithm_steps import step

__all__ = ["step"]
