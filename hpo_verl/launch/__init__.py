"""Starts a training run: composes a recipe, checks it, makes what is missing, runs verl."""
