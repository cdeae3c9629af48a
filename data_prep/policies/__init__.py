"""Policies to train: the tiny one, SmolLM2 of a package, and those of the hub."""
