"""Checks of the part “Applications”."""
