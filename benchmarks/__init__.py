"""Measurements; run from the root of the repository."""
