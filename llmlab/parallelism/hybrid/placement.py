"""Which device does what: numbering a mesh of pp × dp × tp, and its groups' links.

    sizes     of the axes by name, outermost first. The last axis is innermost: its
              neighbours are neighbouring devices
    stride    how far apart neighbours along an axis are numbered
    node      devices that share the fast link

A ring over a group uses the slow link as soon as two of its devices lie in
different nodes (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 3:
tensor parallelism inside the node, so tp is innermost).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from llmlab.parallelism.runtime import Link


@dataclass(frozen=True)
class Placement:
    """Sizes of the axes by name, outermost first.

    >>> Placement({"pp": 2, "dp": 2, "tp": 4}).devices
    16
    """

    sizes: dict[str, int]

    def __post_init__(self) -> None:
        wrong = {
            name: n for name, n in self.sizes.items() if not isinstance(n, int) or n < 1
        }
        if wrong:
            raise ValueError(
                f"sizes={self.sizes}: {', '.join(wrong)} must be at least 1"
            )

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return prod(self.sizes.values())

    def stride(self, axis: str) -> int:
        """How far apart neighbours along an axis are numbered."""
        names = list(self.sizes)
        return prod(self.sizes[name] for name in names[names.index(axis) + 1 :])

    def coordinates(self, rank: int) -> dict[str, int]:
        """A device's place along each axis."""
        return {axis: rank // self.stride(axis) % n for axis, n in self.sizes.items()}

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The groups that talk along an axis, each in its own order."""
        stride = self.stride(axis)
        length = self.sizes[axis]
        groups = []
        for first in range(self.devices):
            if self.coordinates(first)[axis] == 0:
                groups.append(tuple(first + i * stride for i in range(length)))
        return groups

    def nodes(self, axis: str, node: int) -> int:
        """How many nodes the widest group along an axis touches.

        Args:
            node: devices per node.
        """
        return max(len(_nodes_of(group, node)) for group in self.groups(axis))


def _nodes_of(ranks: Iterable[int], node: int) -> set[int]:
    return {rank // node for rank in ranks}


def node_links(node: int, fast: Link, slow: Link) -> Callable[[Iterable[int]], Link]:
    """The link of a group of ranks, for `World(n, link=…)`.

    Args:
        node: ranks per node.
        fast: the link inside a node.
        slow: the link of a group that touches several nodes.
    """

    def link(ranks: Iterable[int]) -> Link:
        return fast if len(_nodes_of(ranks, node)) == 1 else slow

    return link
