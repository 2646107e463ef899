"""Checks of the part “Parameter-efficient fine-tuning”."""
