"""Chips and what connects them, as data, for planning.

Columns of the table, all figures of vendors:

    name
    chip       of `llmlab.models.chips`, with its dense 16-bit peak, the printed
               gigabytes as 10⁹ bytes (a little less than the chip has, because the
               driver and the libraries need some), and NVLink in one direction
    network    bytes per second of one device: one InfiniBand port per device (HDR 200
               Gbit/s, NDR 400 Gbit/s), as in NVIDIA's DGX machines
    changes    A800 and H800 are sold with slower links

`efficiency` is the one number that is fitted: with 0.644 the cost model gives 13.75 s
for the 175B step of Korthikanti et al. 2022 on 64 A100 (table 5). For other chips it is
an assumption: measure one step, and pass your own. Sources: NVIDIA's data sheets of
V100, A100, H100, H200, B200, and of DGX-1, DGX A100 and DGX H100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmlab.models.chips import chips
from llmlab.parallelism.runtime import Link


@dataclass(frozen=True)
class Machine:
    """A cluster of one kind of device.

    `node` devices share fast links, and nodes share a slower network.

    Raises:
        ValueError: a figure is out of its range, named in the message.
    """

    name: str
    flops: float  # dense 16-bit FLOP/s
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    link: float  # within a node, bytes per second and device, one way
    network: float  # between nodes, bytes per second and device, one way
    node: int = 8
    efficiency: float = 0.644  # of the peak, in matrix products; see above
    latency: float = 5e-6  # of a message, seconds

    def __post_init__(self) -> None:
        for name in ("flops", "memory", "bandwidth", "link", "network", "node"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 < self.efficiency <= 1:
            raise ValueError(
                f"efficiency={self.efficiency} must be above 0 and at most 1"
            )

    def wire(self, span: int, devices: int | None = None) -> Link:
        """The link that limits groups of `span` consecutive devices.

        The slowest group counts. In nodes of eight, groups of three are 0–2, 3–5 and
        6–8, and the third lies in two nodes.

        Args:
            devices: how many there are in all; None: one group.
        """
        one_node = (devices or span) <= self.node
        groups_fit = self.node % span == 0
        inside = groups_fit or one_node
        return Link(self.latency, self.link if inside else self.network)


# fmt: off
_ROWS = [
    # name          chip         network  changes
    ("v100-32gb",   "V100",      12.5e9,  {}),
    ("a100-40gb",   "A100 40GB", 25e9,    {}),
    ("a100-80gb",   "A100",      25e9,    {}),
    ("a800-80gb",   "A100",      25e9,    {"link": 200e9}),
    ("h100-80gb",   "H100",      50e9,    {}),
    ("h800-80gb",   "H100",      50e9,    {"link": 200e9}),
    ("h200-141gb",  "H200",      50e9,    {}),
    ("b200-180gb",  "B200",      50e9,    {}),
]
# fmt: on


def _of_chip(name: str, chip: str, network: float, changes: dict) -> Machine:
    """Eight of one chip to a node."""
    one = chips()[chip]
    speed = one.speed("bf16", "fp16")
    made = Machine(name, speed, one.memory, one.bandwidth, one.link, network)
    return replace(made, **changes)


MACHINES = {row[0]: _of_chip(*row) for row in _ROWS}


def machine(name: str, **changes: float) -> Machine:
    """The machine of that name, with some of its figures changed.

    >>> machine("a100-80gb", network=12.5e9).network
    12500000000.0

    Raises:
        ValueError: there is none of that name.
    """
    if name not in MACHINES:
        raise ValueError(
            f"name={name!r} is not a known machine: use one of {', '.join(MACHINES)}"
        )
    return replace(MACHINES[name], **changes)
