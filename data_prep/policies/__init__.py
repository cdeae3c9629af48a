"""Policies to train: the tiny one, and those of the hub."""
