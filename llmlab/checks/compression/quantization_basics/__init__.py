"""The room `quantization_basics`."""

from llmlab.checks.compression.quantization_basics.exercises import check

__all__ = [
    "check",
]
