"""Ascend and other accelerators: TODO what lies where in this room, and where to start reading."""

from llmlab.chips.ascend_and_other_accelerators import ascend_and_other_accelerators

__all__ = ["ascend_and_other_accelerators"]
