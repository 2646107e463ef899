"""What papers say that compressed models hold, counted again from the shapes.

Each function here is one rule of counting; `OURS` gives them names, for tables that are
kept as data. Sizes:

    d  width of the model; its feed-forward network is 4 d wide
    L  layers
"""

from __future__ import annotations

import math
from collections.abc import Callable


def linear_weights(L: int, d: int) -> int:
    """Weights of all linears in the blocks: 4 d² in the attention, 8 d² in the MLP."""
    return 12 * L * d * d


def weight_bytes(parameters: float, bits: float) -> float:
    """Bytes of that many weights."""
    return parameters * bits / 8


def quantised_bytes(L: int, d: int, vocabulary: int, bits: int) -> float:
    """Linears in a few bits with a 16-bit scale and zero point for each row; embedding
    and output layer in 16 bits.
    """
    rows = 9 * L * d  # q, k, v, o and the second linear have d, the first has 4 d
    linears = linear_weights(L, d) * bits / 8 + 2 * 2 * rows
    return linears + 2 * 2 * vocabulary * d


def cache_bytes(L: int, d: int, tokens: int) -> int:
    """Keys and values of all layers, 16 bits."""
    return 2 * 2 * L * d * tokens


def pruned_weights(L: int, d: int, percent: float) -> float:
    """Zeros among the weights of the linears."""
    return linear_weights(L, d) * percent / 100


def devices(parameters: float, bits: float, memory: float) -> int:
    """How many devices of that many GB the weights alone fill."""
    return math.ceil(weight_bytes(parameters, bits) / (memory * 1e9))


OURS: dict[str, Callable[..., float]] = {
    "weight_bytes": weight_bytes,
    "quantised_bytes": quantised_bytes,
    "cache_bytes": cache_bytes,
    "pruned_weights": pruned_weights,
    "devices": devices,
}
