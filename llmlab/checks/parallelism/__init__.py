"""Checks of the part “Parallelism”."""
