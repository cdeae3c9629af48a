"""Compares finished runs: a table, intervals over seeds, and a picture. Reads files only."""
