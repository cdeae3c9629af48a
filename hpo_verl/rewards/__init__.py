"""Verifiable rewards; standard library only."""
