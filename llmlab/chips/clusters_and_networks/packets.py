"""Runs of ns-3, packet by packet, as `scripts/golden/net_goldens.py` stored them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[1] / "data" / "clusters_and_networks.json"
PAYLOAD = 536  # bytes of data in a packet of ns-3's TCP, and of headers around them
HEADERS = 54


@dataclass(frozen=True)
class Packets:
    """TCP flows between leaves and spines, all cables alike.

    Attributes:
        bandwidth: bytes per second of a cable.
        bytes: of data of each flow; with headers more go over the cables.
        paths: the nodes that each flow passes; 2 leaves of 4 hosts, 4 spines.
        seconds: until each receiver had everything.
        seed: of our hash, with which `routes` gives these paths.
    """

    bandwidth: float
    bytes: float
    paths: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    seed: int

    @property
    def on_the_wire(self) -> float:
        """Bytes of each flow, with headers."""
        return self.bytes * (PAYLOAD + HEADERS) / PAYLOAD


@cache
def packets() -> dict[str, Packets]:
    """All runs, by name."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: Packets(
            kept["rate"] / 8,
            kept["bytes"],
            tuple(map(tuple, case["paths"])),
            tuple(case["seconds"]),
            case["seed"],
        )
        for name, case in kept["cases"].items()
    }
