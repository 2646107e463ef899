"""Checks of the part “Compilers”."""
