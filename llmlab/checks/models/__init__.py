"""Checks of the part “Models”."""
