"""Recipes: how they are found and composed, and what their keys mean."""
