"""What is pruned, how much of it, and in which pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmlab.compression.quantization_basics import QuantConfig

METHODS = ("magnitude", "wanda", "sparsegpt")


def n_and_m(pattern: str) -> tuple[int, int]:
    """(N, M) of "N:M": N weights of each M in a row are kept.

    Raises:
        ValueError: it is no such pattern.
    """
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 1 <= n < m:
        raise ValueError(
            f"pattern={pattern!r} must be 'N:M' with 1 ≤ N < M, as '2:4': N of each M"
            " weights are kept"
        )
    return n, m


@dataclass(frozen=True)
class PruneConfig:
    """Either `sparsity`, the share of weights that go, or a `pattern`."""

    method: str = "wanda"
    sparsity: float | None = None
    pattern: str | None = None  # "2:4": 2 of each 4 neighbours in a row are kept
    # Among which weights the worst are looked for: each "row", or the whole "matrix".
    # As in the papers if it is not said: magnitude the matrix, Wanda each row.
    per: str | None = None
    # What only SparseGPT reads.
    damping: float = 0.01  # this much of H's mean diagonal is added to the diagonal
    mask_block: int = 128  # B_s: columns whose mask is chosen together
    block_size: int = 128  # B: columns whose errors are passed on together; for speed
    grid: QuantConfig | None = None  # what is left is rounded to it, in the same pass

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {METHODS}")
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                f"sparsity={self.sparsity} and pattern={self.pattern!r}: one of them"
                " must be given, and only one"
            )
        if self.pattern is not None:
            n_and_m(self.pattern)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be at least 0 and below 1")
        if self.per not in (None, "row", "matrix"):
            raise ValueError(f"per={self.per!r} must be 'row', 'matrix' or None")
        if self.per and (self.method == "sparsegpt" or self.pattern):
            raise ValueError(
                f"per={self.per!r} must be None with method={self.method!r} and"
                f" pattern={self.pattern!r}: it says itself what is compared"
            )
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more")
        for name in ("mask_block", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.grid is not None:
            self.check_grid()

    def check_grid(self) -> None:
        """Raises: ValueError: `grid` cannot be worked with."""
        if self.method != "sparsegpt":
            raise ValueError(
                f"grid={self.grid} must be None with method={self.method!r}: only"
                " SparseGPT rounds as it prunes"
            )
        if self.grid.per != "row":
            raise ValueError(f"grid.per={self.grid.per!r} must be 'row'")
