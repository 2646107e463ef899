"""Checks of the part “Compression”."""
