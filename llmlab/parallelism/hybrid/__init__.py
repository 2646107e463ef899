"""Tensor, pipeline and data parallelism at once.

    hybrid       one rank of such a job
    placement    which device does what: numbering the mesh
    resharding   a sharded checkpoint that any other split can read

Start with `hybrid`.
"""

from llmlab.parallelism.hybrid.hybrid import Hybrid
from llmlab.parallelism.hybrid.placement import Placement, node_links

__all__ = [
    "Hybrid",
    "Placement",
    "node_links",
]
