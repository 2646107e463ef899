"""Checks of the part “Inference”."""
