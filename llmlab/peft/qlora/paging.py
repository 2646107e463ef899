"""Paged optimizers: unified memory in small, counted page by page.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3: Adam's state lives in
CUDA's unified memory. While the GPU has room nothing happens. When an activation spike
does not fit, the least recently used pages go to the host, and they come back when the
optimizer touches them:

    free = capacity − pinned − Σ resident pages

    pinned    weights, gradients, activations: memory that cannot move (in bytes)
    managed   named tensors of unified memory (in pages)

Simplified: one GPU, page faults take no time but the bytes that they move, and a
tensor's pages are alike, so that only their number is kept. bitsandbytes asks for such
memory with `optim.PagedAdamW32bit`; on a CPU it falls back to Adam.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 2 * 2**20  # bytes; what the driver moves at once ranges from 4 KiB to 2 MiB


@dataclass
class UnifiedMemory:
    """A GPU's memory of `capacity` bytes, some of it pinned and some in pages that may
    be evicted.
    """

    capacity: int
    page: int = PAGE
    pinned: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # pages of each managed tensor
    # of these on the GPU; the least recently used first
    resident: dict[str, int] = field(default_factory=dict)
    moved_in: int = 0  # bytes, host to GPU
    moved_out: int = 0  # bytes, GPU to host

    def __post_init__(self) -> None:
        for name in ("capacity", "page"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be at least 1 byte"
                )

    @property
    def free(self) -> int:
        """Bytes of the GPU that nothing holds."""
        return self.capacity - self.pinned - self.page * sum(self.resident.values())

    def pin(self, nbytes: int) -> int:
        """Take memory that cannot move, evicting pages as needed.

        Returns the bytes moved out.

        Raises:
            MemoryError: it does not fit even with all pages on the host.
        """
        if self.pinned + nbytes > self.capacity:
            raise MemoryError(
                f"{nbytes:,} bytes do not fit: {self.pinned:,} of {self.capacity:,} are"
                " pinned"
            )
        moved = self._evict(nbytes - self.free)
        self.pinned += nbytes
        return moved

    def unpin(self, nbytes: int) -> None:
        """Give pinned memory back.

        Evicted pages stay on the host until they are touched.
        """
        if nbytes > self.pinned:
            raise ValueError(
                f"nbytes={nbytes:,} is more than the {self.pinned:,} pinned"
            )
        self.pinned -= nbytes

    def allocate(self, name: str, nbytes: int) -> None:
        """A managed tensor. Its pages are on the host until they are touched."""
        if name in self.sizes:
            raise ValueError(f"name={name!r} is allocated already")
        self.sizes[name], self.resident[name] = -(-nbytes // self.page), 0

    def touch(self, name: str) -> int:
        """Use a managed tensor on the GPU: missing pages come in, others go out.
        Returns the bytes moved, both ways.

        Raises:
            MemoryError: the tensor alone is larger than what is not pinned.
        """
        if self.sizes[name] * self.page > self.capacity - self.pinned:
            raise MemoryError(
                f"{name} has {self.sizes[name]} pages; there is no room for them beside"
                f" {self.pinned:,} pinned"
            )
        here = self.resident.pop(name)
        missing = (self.sizes[name] - here) * self.page
        moved = self._evict(missing - (self.free - here * self.page))
        self.resident[name] = self.sizes[name]  # last in the dict: most recently used
        self.moved_in += missing
        return moved + missing

    def _evict(self, nbytes: int) -> int:
        """Move at least `nbytes` to the host, the least recently used tensors first."""
        moved = 0
        for name in self.resident:
            pages = min(self.resident[name], max(0, -(-(nbytes - moved) // self.page)))
            self.resident[name] -= pages
            moved += pages * self.page
        self.moved_out += moved
        return moved


def training_step(memory: UnifiedMemory, activations: int, states: list[str]) -> int:
    """Forward and backward with `activations` bytes pinned for their time, then Adam
    over its states. Returns bytes moved.

    Raises:
        MemoryError: the activations do not fit even with all states on the host.
    """
    moved = memory.pin(activations)
    memory.unpin(activations)
    return moved + sum(memory.touch(name) for name in states)
