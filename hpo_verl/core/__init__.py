"""Primitives of the policy update, each defined once; torch only."""
