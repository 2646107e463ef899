"""Ascend and other accelerators: TODO one line.

TODO the paper, the equation, what is simplified; a table of symbols.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def apply(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """TODO the mathematics, as a pure function.

    Raises:
        ValueError: TODO
    """
    raise NotImplementedError("TODO")
