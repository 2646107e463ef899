"""The room `frameworks`."""

from llmlab.parallelism.frameworks.engines import loss_of

__all__ = [
    "loss_of",
]
