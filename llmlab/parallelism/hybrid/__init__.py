"""The room `hybrid`."""

from llmlab.parallelism.hybrid.hybrid import Hybrid
from llmlab.parallelism.hybrid.placement import Placement, node_links

__all__ = [
    "Hybrid",
    "Placement",
    "node_links",
]
