"""Ring attention: queries stay, keys and values travel round the ring of ranks, and the
softmax is merged on the way.

Liu, Zaharia & Abbeel 2023, https://arxiv.org/abs/2310.01889. In step s rank r holds the
keys and values of rank r − s:

    forward    p steps, p − 1 hops of K and V       out, ℓ ← merge(out, ℓ, piece)
    backward   p steps, p − 1 hops of K and V, and p hops of dK and dV: what a rank adds
               to them must get home

While a piece is computed, the next one is on the wire. Inside a step, queries and keys
are cut into tiles, so that no score matrix is larger than tile × tile; a tile that no
query may see is skipped. With one rank it is blockwise attention (Rabe & Staats 2021),
with tiles only it is what FlashAttention does on one chip.

    B  batch     H, K  query and key/value heads     D  head_dim     Tr  tokens of this
                                                        rank     p  ranks

Simplified: no dropout, no padding mask. Under NCCL, where a send and a receive posted
apart can wait for each other, each hop is one batched call before the computation, and
does not overlap with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.shards import schedule
from llmlab.parallelism.sequence.softmax_merge import (
    attend,
    attend_backward,
    merge,
    wide,
)


def shift(comm: Communicator, x: Tensor, tag: int = 0) -> Callable[[], Tensor]:
    """Begin to hand x to the right neighbour; call what is returned for the left
    neighbour's.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        return lambda: x
    if comm.device.type == "cuda":
        received = comm.sendrecv(x, right, left, tag)
        return lambda: received
    incoming, outgoing = comm.irecv(left, tag), comm.isend(x, right, tag)

    def arrive() -> Tensor:
        received = incoming.wait()
        outgoing.wait()
        return received

    return arrive


@dataclass(frozen=True)
class RingAttention:
    """Exact attention over a sequence that is cut over ranks: a drop-in for the model's
    attention function.

    Args:
        comm: the ring, in order of rank.
        cut: every rank's positions (`sequence_shards.shards`).
        causal: whether a query sees no later key.
        tile: the longest side of a score matrix.
        pace: virtual seconds that a query-key pair takes, for the ledger's clock
            (backward: 2.5 times that, five products where forward has two).
    """

    comm: Communicator
    cut: list[Tensor]
    causal: bool = True
    tile: int = 128
    pace: float = 0.0

    def __post_init__(self) -> None:
        if len(self.cut) != self.comm.size:
            raise ValueError(
                f"cut has {len(self.cut)} shards; the ring has {self.comm.size} ranks"
            )
        if self.tile < 1 or self.pace < 0:
            raise ValueError(f"tile={self.tile} must be ≥ 1 and pace={self.pace} ≥ 0")

    def __call__(
        self,
        q: Float[Tensor, "B H Tr D"],
        k: Float[Tensor, "B K Tr D"],
        v: Float[Tensor, "B K Tr D"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "B H Tr D"]:
        """Attention of this rank's queries over all ranks' keys.

        Raises:
            ValueError: a mask; H not a multiple of K; as many tokens as the cut does
                not give this rank.
        """
        if mask is not None:
            raise ValueError("mask must be None: the ring masks by position")
        if q.shape[1] % k.shape[1]:
            raise ValueError(
                f"{q.shape[1]} query heads must be a multiple of the {k.shape[1]}"
                " key/value heads"
            )
        if {q.shape[2], k.shape[2], v.shape[2]} != {len(self.cut[self.comm.rank])}:
            raise ValueError(
                f"q has {q.shape[2]} tokens; the cut gives this rank"
                f" {len(self.cut[self.comm.rank])}"
            )
        return _Ring.apply(q, k, v, self)

    def tiles(self, source: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(query rows, key rows, their positions) of every tile in which somebody sees
        something.
        """
        mine, theirs = self.cut[self.comm.rank], self.cut[source]
        for i in range(0, len(mine), self.tile):
            for j in range(0, len(theirs), self.tile):
                rows, keys = slice(i, i + self.tile), slice(j, j + self.tile)
                if not self.causal or theirs[keys].min() <= mine[rows].max():
                    yield rows, keys, mine[rows], theirs[keys]

    def steps(self, cost: float) -> Iterator[tuple[int, int]]:
        """(step, whose keys are here); tells the ledger's clock what each step
        takes.
        """
        rank, p = self.comm.rank, self.comm.size
        pairs = (
            {s: n for r, s, _, n in schedule(self.cut, self.causal) if r == rank}
            if self.pace
            else {}
        )
        for step in range(p):
            source = (rank - step) % p
            if pairs.get(step):
                self.comm.work(
                    cost * self.pace * pairs[step],
                    f"step {step}: keys of rank {source}",
                )
            yield step, source


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ring: RingAttention) -> Tensor:
        comm, kv = ring.comm, torch.stack([k, v])  # (2, B, K, Tr, D): one message a hop
        out = torch.zeros_like(wide(q))
        lse = torch.full_like(out[..., 0], -torch.inf)
        coming = _next(comm, kv, 0)
        for step, source in ring.steps(cost=1.0):
            for rows, keys, q_pos, k_pos in ring.tiles(source):
                piece = attend(
                    q[:, :, rows], *kv[:, :, :, keys], q_pos, k_pos, ring.causal
                )
                out[:, :, rows], lse[:, :, rows] = merge(
                    out[:, :, rows], lse[:, :, rows], *piece
                )
            kv, coming = _arrived(comm, kv, coming, step)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, lse)  # nothing of the other ranks
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        ring, comm, kv = ctx.ring, ctx.ring.comm, torch.stack([k, v])
        do = wide(grad)
        # (B, H, Tr), (B, H, Tr, D)
        delta, dq = (do * out).sum(-1), torch.zeros_like(out)
        coming, home = _next(comm, kv, 0), None
        for step, source in ring.steps(cost=2.5):
            dkv = torch.zeros_like(wide(kv))
            for rows, keys, q_pos, k_pos in ring.tiles(source):
                mine = (
                    q[:, :, rows],
                    *kv[:, :, :, keys],
                    do[:, :, rows],
                    lse[:, :, rows],
                    delta[:, :, rows],
                )
                dq_, dk, dv = attend_backward(*mine, q_pos, k_pos, ring.causal)
                dq[:, :, rows] += dq_
                dkv[:, :, :, keys] += torch.stack([dk, dv])
            # after the last step: one hop more
            home = shift(comm, dkv if home is None else home() + dkv, tag=1)
            kv, coming = _arrived(comm, kv, coming, step)
        dk, dv = home().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None


def _next(comm: Communicator, kv: Tensor, step: int) -> Callable[[], Tensor] | None:
    """Send the keys on while they are used; nobody needs them after the last step."""
    return shift(comm, kv) if step < comm.size - 1 else None


def _arrived(comm: Communicator, kv: Tensor, coming: Callable | None, step: int):
    """The keys of the next step, already on their way further."""
    if coming is None:
        return kv, None
    kv = coming()
    return kv, _next(comm, kv, step + 1)
