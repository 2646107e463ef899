"""Checks of the part “Training”."""
