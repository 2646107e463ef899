"""Ring attention: keys and values travel round the ring of ranks, queries stay.

Liu, Zaharia & Abbeel 2023, https://arxiv.org/abs/2310.01889. In step s rank r has the
keys and values of rank r − s:

    forward    p steps, p − 1 hops of K and V       (O, ℓ) ← merge((O, ℓ), piece)
    backward   p steps, p − 1 hops of K and V, and p hops of dK and dV

A *piece* of attention is a softmax over some of the keys. Let S be the scores of a
query and A a set of keys. A piece is a pair, both in fp32 at least:

    O_A = Σ_{j ∈ A} e^{S_j − ℓ_A} v_j
    ℓ_A = log Σ_{j ∈ A} e^{S_j}                 (lse, the log-sum-exp)

Two pieces over disjoint sets of keys merge exactly (Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Rabe & Staats 2021):

    ℓ = log(e^{ℓ_A} + e^{ℓ_B})
    O = e^{ℓ_A − ℓ} O_A + e^{ℓ_B − ℓ} O_B

A query that may see none of the keys has O = 0 and ℓ = −∞, which changes nothing when
it is merged. Backward, each piece needs the ℓ of *all* keys, and δ = Σ_c dO_c O_c. With
P = e^{S − ℓ}:

    dV = Pᵀ dO
    dS = P ∘ (dO Vᵀ − δ)
    dQ = dS K / √D
    dK = dSᵀ Q / √D

While one piece is computed, the keys of the next one travel. Inside a step, queries and
keys are cut into tiles, so that no score matrix is larger than tile × tile. A tile in
which no query may see a key is skipped. With one rank it is blockwise attention (Rabe &
Staats 2021); the tiles alone are what FlashAttention does on one chip.

Simplified: no dropout, no padding mask, no packed documents. NCCL can deadlock when a
send and a receive are posted separately. There each hop is one batched call before the
computation, and does not overlap with it.

    B     batch
    H     query heads
    K     key/value heads (in a shape), keys (in an equation)
    G     H/K, query heads per key/value head
    D     head_dim
    Tr    tokens of this rank
    T, S  queries and keys of one piece (in a shape); S: scores (in an equation)
    p     ranks; r is this one
    δ     `delta`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.shards import check_positions, schedule

# Attention in pieces -----------------------------------------------------------------


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    q_pos: Int[Tensor, " T"],
    k_pos: Int[Tensor, " S"],
    causal: bool = True,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """One piece of attention: O and ℓ of these queries over these keys.

    Args:
        q_pos, k_pos: positions in the whole sequence, for the causal mask.
    Returns:
        Both in fp32 at least.
    """
    scores = _scores(q, k, q_pos, k_pos, causal)
    lse = scores.logsumexp(-1)  # (B, K, G, T), −∞ where nothing may be seen
    # −∞ − (−∞) would be NaN. With 0 instead of ℓ, e^{−∞ − 0} is the 0 that is right.
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    P = (scores - finite_lse[..., None]).exp()  # (B, K, G, T, S)
    out = P @ wide(v)[:, :, None]  # (B, K, G, T, S) (B, K, 1, S, D)
    # (B, K, G, T, D) → (B, H, T, D) and (B, K, G, T) → (B, H, T)
    return out.flatten(1, 2), lse.flatten(1, 2)


def merge(
    o_a: Float[Tensor, "B H T D"],
    l_a: Float[Tensor, "B H T"],
    o_b: Float[Tensor, "B H T D"],
    l_b: Float[Tensor, "B H T"],
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """Two pieces over disjoint keys as one: the merged O and ℓ."""
    lse = torch.logaddexp(l_a, l_b)
    # where neither saw a key: e^{−∞ − 0} = 0, and the output is 0 · 0 + 0 · 0
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a = (l_a - finite_lse).exp()[..., None]  # (B, H, T, 1)
    weight_b = (l_b - finite_lse).exp()[..., None]
    return weight_a * o_a + weight_b * o_b, lse


def attend_backward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    do: Float[Tensor, "B H T D"],
    lse: Float[Tensor, "B H T"],
    delta: Float[Tensor, "B H T"],
    q_pos: Int[Tensor, " T"],
    k_pos: Int[Tensor, " S"],
    causal: bool = True,
) -> tuple[
    Float[Tensor, "B H T D"], Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]
]:
    """This piece's part of dQ, dK and dV, in fp32 at least.

    dK and dV are summed over the G query heads of a key head.

    Args:
        do: dO, the gradient of the merged O.
        lse: ℓ over all keys of all pieces.
        delta: Σ_c dO_c O_c, with the merged O.
    """
    K = k.shape[1]
    scale = q.shape[-1] ** -0.5
    lse = lse.unflatten(1, (K, -1))[..., None]  # (B, H, T) → (B, K, G, T, 1)
    delta = delta.unflatten(1, (K, -1))[..., None]
    do = _group_heads(do, K)  # (B, K, G, T, D)
    P = (_scores(q, k, q_pos, k_pos, causal) - lse).exp()  # (B, K, G, T, S)
    dv = (P.transpose(-1, -2) @ do).sum(2)  # (B, K, G, S, D) → (B, K, S, D)
    dP = do @ wide(v)[:, :, None].transpose(-1, -2)  # (B, K, G, T, S)
    dS = P * (dP - delta) * scale
    dq = (dS @ wide(k)[:, :, None]).flatten(1, 2)  # (B, K, G, T, D) → (B, H, T, D)
    dk = (dS.transpose(-1, -2) @ _group_heads(q, K)).sum(2)  # → (B, K, S, D)
    return dq, dk, dv


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least: pieces are merged in it, whatever the model computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group_heads(q: Float[Tensor, "B H T D"], K: int) -> Float[Tensor, "B K G T D"]:
    # (B, K·G, T, D) → (B, K, G, T, D): head h uses key head h // G
    return wide(q).unflatten(1, (K, -1))


def _scores(
    q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, causal: bool
) -> Float[Tensor, "B K G T S"]:
    """Q Kᵀ / √D, −∞ where a key is later than the query."""
    scale = q.shape[-1] ** -0.5
    # (B, K, G, T, D) (B, K, 1, D, S)
    scores = _group_heads(q, k.shape[1]) @ wide(k)[:, :, None].transpose(-1, -2) * scale
    if not causal:
        return scores
    is_later = k_pos.to(scores.device) > q_pos.to(scores.device)[:, None]  # (T, S)
    return scores.masked_fill(is_later, -torch.inf)


# The ring ----------------------------------------------------------------------------


class Hop:
    """x on its way to the right neighbour, while the left neighbour's x comes here.

    Args:
        tag: keeps messages apart that travel at the same time.
    """

    def __init__(self, comm: Communicator, x: Tensor, tag: int = 0) -> None:
        right = (comm.rank + 1) % comm.size
        left = (comm.rank - 1) % comm.size
        self._incoming = None
        self._outgoing = None
        self._received = None
        if comm.size == 1:
            self._received = x
        elif comm.device.type == "cuda":
            # one batched call: NCCL can deadlock on the two that are below
            self._received = comm.sendrecv(x, right, left, tag)
        else:
            self._incoming = comm.irecv(left, tag)
            self._outgoing = comm.isend(x, right, tag)

    def wait(self) -> Tensor:
        """The left neighbour's x."""
        if self._incoming is None:
            return self._received
        received = self._incoming.wait()
        self._outgoing.wait()
        return received


@dataclass(frozen=True)
class RingAttention:
    """Exact attention over a sequence that is cut over ranks.

    It takes the place of the model's attention function.

    Args:
        comm: the ring, in order of rank.
        cut: every rank's positions (from `shards`).
        causal: whether a query sees no later key.
        tile: the longest side of a score matrix.
        pace: virtual seconds per query-key pair, for the ledger's clock (backward: 2.5
            times that, five products where forward has two).
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
            ValueError: a mask is given; H is not a multiple of K; the number of tokens
                is not what the cut gives this rank.
        """
        if mask is not None:
            raise ValueError(
                "mask must be None: the ring masks by position, and keeps no documents"
                " apart"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(
                f"{q.shape[1]} query heads must be a multiple of the {k.shape[1]}"
                " key/value heads"
            )
        expected_tokens = len(self.cut[self.comm.rank])
        if {q.shape[2], k.shape[2], v.shape[2]} != {expected_tokens}:
            raise ValueError(
                f"q has {q.shape[2]} tokens; the cut gives this rank {expected_tokens}"
            )
        return RingAttentionFunction.apply(q, k, v, self)

    def check_positions(self, position_ids: Int[Tensor, "B Tr"]) -> None:
        """Raises: ValueError: they are not the positions that the cut says."""
        check_positions(position_ids, self.cut[self.comm.rank])

    def source(self, step: int) -> int:
        """The rank whose keys are here in a step."""
        return (self.comm.rank - step) % self.comm.size

    def tiles(self, source: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """The tiles over a rank's keys in which some query may see some key.

        Yields:
            Rows of the queries, rows of the keys, and the positions of both.
        """
        q_pos = self.cut[self.comm.rank]
        k_pos = self.cut[source]
        for i in range(0, len(q_pos), self.tile):
            queries = slice(i, i + self.tile)
            for j in range(0, len(k_pos), self.tile):
                keys = slice(j, j + self.tile)
                if self.causal and k_pos[keys].min() > q_pos[queries].max():
                    continue  # every key is later than every query
                yield queries, keys, q_pos[queries], k_pos[keys]

    def pairs_per_step(self) -> list[int]:
        """This rank's query-key pairs in each step; zeros without a `pace`."""
        pairs_per_step = [0] * self.comm.size
        if self.pace:
            for rank, step, _, pairs in schedule(self.cut, self.causal):
                if rank == self.comm.rank:
                    pairs_per_step[step] = pairs
        return pairs_per_step

    def work(self, step: int, pairs: int, times: float = 1.0) -> None:
        """Tell the ledger's clock how long a step takes: `times` the forward pass."""
        if pairs:
            seconds = times * self.pace * pairs
            self.comm.work(seconds, f"step {step}: keys of rank {self.source(step)}")


class RingAttentionFunction(torch.autograd.Function):
    """The p steps of ring attention, forward and backward."""

    @staticmethod
    def forward(
        ctx,
        q: Float[Tensor, "B H Tr D"],
        k: Float[Tensor, "B K Tr D"],
        v: Float[Tensor, "B K Tr D"],
        ring: RingAttention,
    ) -> Float[Tensor, "B H Tr D"]:
        """Merge the pieces over the keys of all ranks."""
        comm = ring.comm
        last_step = comm.size - 1
        pairs = ring.pairs_per_step()
        kv = torch.stack([k, v])  # (2, B, K, Tr, D): one message per hop
        out = torch.zeros_like(wide(q))
        lse = torch.full_like(out[..., 0], -torch.inf)
        for step in range(comm.size):
            # The keys travel on while they are used here. After the last step nobody
            # needs them.
            if step < last_step:
                kv_in_flight = Hop(comm, kv)
            ring.work(step, pairs[step])
            for rows, keys, q_pos, k_pos in ring.tiles(ring.source(step)):
                piece_out, piece_lse = attend(
                    q[:, :, rows],
                    kv[0, :, :, keys],
                    kv[1, :, :, keys],
                    q_pos,
                    k_pos,
                    ring.causal,
                )
                out[:, :, rows], lse[:, :, rows] = merge(
                    out[:, :, rows], lse[:, :, rows], piece_out, piece_lse
                )
            if step < last_step:
                kv = kv_in_flight.wait()
        ctx.ring = ring
        # Nothing of the other ranks is kept: their keys come round again in backward.
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "B H Tr D"]):
        """dQ is summed here; dK and dV are summed on their way round the ring."""
        q, k, v, out, lse = ctx.saved_tensors
        ring = ctx.ring
        comm = ring.comm
        last_step = comm.size - 1
        pairs = ring.pairs_per_step()
        kv = torch.stack([k, v])  # (2, B, K, Tr, D)
        do = wide(grad)
        delta = (do * out).sum(-1)  # (B, H, Tr)
        dq = torch.zeros_like(out)
        dkv_in_flight = None
        for step in range(comm.size):
            if step < last_step:
                kv_in_flight = Hop(comm, kv)
            # five products where forward has two
            ring.work(step, pairs[step], times=2.5)
            dkv = torch.zeros_like(wide(kv))
            for rows, keys, q_pos, k_pos in ring.tiles(ring.source(step)):
                # P comes from the ℓ of all keys, so no pieces are merged here
                dq_piece, dk_piece, dv_piece = attend_backward(
                    q[:, :, rows],
                    kv[0, :, :, keys],
                    kv[1, :, :, keys],
                    do[:, :, rows],
                    lse[:, :, rows],
                    delta[:, :, rows],
                    q_pos,
                    k_pos,
                    ring.causal,
                )
                dq[:, :, rows] += dq_piece
                dkv[:, :, :, keys] += torch.stack([dk_piece, dv_piece])
            # dK and dV travel one step behind their keys: the left neighbour's sum for
            # these keys arrives after it was computed there, and this rank adds to it.
            if dkv_in_flight is not None:
                dkv = dkv_in_flight.wait() + dkv
            # They travel after the last step, too. In that step this rank has the keys
            # of its right neighbour: one hop more brings their gradients home.
            dkv_in_flight = Hop(comm, dkv, tag=1)
            if step < last_step:
                kv = kv_in_flight.wait()
        dk, dv = dkv_in_flight.wait().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None
