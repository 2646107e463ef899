"""Which device does what: numbering a mesh of pp × dp × tp, and the wires that its
groups run over.

    order     names of the axes, outermost first; the last one is innermost: its
              neighbours are neighbouring devices
    node      devices that share the fast wire

A ring over a group goes over the slow wire as soon as two of its devices lie in
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
    """Sizes of the axes by name, outermost first: `Placement({"pp": 2, "dp": 2, "tp":
    4})`.
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
        """How many there are."""
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
        step, n = self.stride(axis), self.sizes[axis]
        firsts = [r for r in range(self.devices) if self.coordinates(r)[axis] == 0]
        return [tuple(first + i * step for i in range(n)) for first in firsts]

    def nodes(self, axis: str, node: int) -> int:
        """How many nodes the widest group along an axis touches."""
        return max(len({r // node for r in group}) for group in self.groups(axis))


def node_links(node: int, fast: Link, slow: Link) -> Callable[[Iterable[int]], Link]:
    """The wire of a group of ranks, for `World(n, link=…)`: fast inside a node of
    `node` ranks, else slow.
    """
    return lambda ranks: fast if len({r // node for r in ranks}) == 1 else slow
