"""Checks of the part “Chips and clusters”."""
