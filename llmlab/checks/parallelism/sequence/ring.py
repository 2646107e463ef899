"""What is wrong with a ring attention: the outputs that each usual mistake leads to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlab.checks.parallelism.ranks import either
from llmlab.course.grading.checking import close, diagnose
from llmlab.parallelism.sequence import attend, merge


def check_ring(got: Tensor, qkv: tuple, cut: list[Tensor], r: int, what: str) -> None:
    """The output on rank r, compared with what each mistake would give."""
    ring = _Ring(qkv, cut, r)
    right = ring.over(range(len(cut)))
    if not close(got, right, 1e-4):
        mistakes = {**_whose_keys(ring, got), **_which_mask(ring, got), **_merges(ring)}
        diagnose(got, right=right, mistakes=mistakes, tol=1e-4, what=what)


class _Ring:
    """Attention as rank r computes it; `order` is from whom keys come, step by step."""

    def __init__(self, qkv: tuple, cut: list[Tensor], r: int) -> None:
        self.qkv = qkv
        self.cut = cut
        self.r = r
        self.p = len(cut)
        self.order = [(r - s) % self.p for s in range(self.p)]

    def over(self, sources, positions=None, blind=False) -> Tensor:
        """Attention of rank r's queries over the keys of some ranks; NaN for none.

        `positions`: the ranks from which the keys' positions are taken instead.
        """
        q, k, v = self.qkv
        mine = self.cut[self.r]
        if not sources:
            return torch.full_like(q[:, :, mine], math.nan)
        keys = torch.cat([self.cut[s] for s in sources])
        seen = [
            self.cut[s][: len(self.cut[t])]
            for s, t in zip(positions or sources, sources, strict=True)
        ]
        if sum(map(len, seen)) != len(keys):
            return torch.full_like(q[:, :, mine], math.nan)
        return attend(
            q[:, :, mine],
            k[:, :, keys],
            v[:, :, keys],
            mine,
            torch.cat(seen),
            causal=not blind,
        )[0]

    def log_sum(self, sources: list[int]) -> Tensor:
        """The log-sum-exp of rank r's queries over the keys of some ranks."""
        q, k, v = self.qkv
        mine = self.cut[self.r]
        keys = torch.cat([self.cut[s] for s in sources])
        return attend(q[:, :, mine], k[:, :, keys], v[:, :, keys], mine, keys)[1]

    def masked_by(self, positions: list[Tensor]) -> Tensor:
        """Attention over all keys, where rank s's tokens stand at `positions[s]`."""
        q, k, v = self.qkv
        keys = torch.cat(self.cut)
        return attend(
            q[:, :, self.cut[self.r]],
            k[:, :, keys],
            v[:, :, keys],
            positions[self.r],
            torch.cat(positions),
        )[0]

    def stepwise(self, **changed) -> Tensor:
        """Piece by piece, with something else than the ring's own."""
        return stepwise(*self.qkv, self.cut, self.order, **changed)


def _whose_keys(ring: _Ring, got: Tensor) -> dict[str, Tensor]:
    """Mistakes in what travels, and how far."""
    order, p, r = ring.order, ring.p, ring.r
    mistakes = {}
    if r < p - 1:  # the last rank, marked before, has none after it
        mistakes[
            "ranks after this one were skipped: `cut` may hand out positions in any"
            " order, so a later rank can have earlier tokens"
        ] = ring.over([s for s in order if s <= r])
    return mistakes | {
        "only this rank's own keys were looked at": ring.over([r]),
        "the last step is missing: there are p steps": ring.over(order[:-1]),
        "this rank's own keys are missing": ring.over(order[1:]),
        "the keys travel and the values stay: both are of the same tokens": (
            ring.stepwise(values=[r] * p)
        ),
        "the values travel and the keys stay: both are of the same tokens": (
            ring.stepwise(keys=[r] * p)
        ),
        (
            "this rank's keys were sent, and looked at, again in every step: hand on"
            " what came"
        ): either(
            got,
            ring.over([r, *[(r - 1) % p] * (p - 1)]),
            ring.over([r, *[(r - 1) % p] * (p - 1)], order),
        ),
        "keys and values are exchanged": attend(
            ring.qkv[0][:, :, ring.cut[r]],
            ring.qkv[2][:, :, torch.cat(ring.cut)],
            ring.qkv[1][:, :, torch.cat(ring.cut)],
            ring.cut[r],
            torch.cat(ring.cut),
        )[0],
        "the queries were sent round as well: they stay, and keys and values travel": (
            visiting(*ring.qkv, ring.cut, order)
        ),
    }


def _which_mask(ring: _Ring, got: Tensor) -> dict[str, Tensor]:
    """Mistakes in the positions that are masked with."""
    order, p, r, cut = ring.order, ring.p, ring.r, ring.cut
    local = [torch.arange(len(c)) for c in cut]
    # rank after rank, as if nobody had shuffled
    row = list(torch.arange(sum(map(len, cut))).split([len(c) for c in cut]))
    masks = [(cut[r], cut[r]), *[(local[r], local[s]) for s in order[1:]]]
    return {
        (
            "the positions are those of rank r + s; in step s the keys of rank r − s"
            " are here"
        ): ring.over(order, [(r + s) % p for s in range(p)]),
        "every step used this rank's own positions for the keys": ring.over(
            order, [r] * p
        ),
        (
            "the mask counts from 0 on every rank: use the positions in the whole"
            " sequence"
        ): either(got, ring.masked_by(local), ring.stepwise(masks=masks)),
        (
            "the mask takes the ranks' tokens for one stretch after another: `cut`"
            " says where they are"
        ): ring.masked_by(row),
        "there is no causal mask between ranks": ring.over(order, blind=True),
    }


def _merges(ring: _Ring) -> dict[str, Tensor]:
    """Mistakes in how the pieces become one."""
    pieces = [ring.over([s]) for s in ring.order]
    last = next((x for x in reversed(pieces) if x.count_nonzero()), pieces[0])
    return {
        "the pieces were added: merge them by their log-sum-exp": sum(pieces),
        "the pieces were averaged: merge them by their log-sum-exp": (
            sum(pieces) / ring.p
        ),
        "an empty beginning has a log-sum-exp of −∞: with 0 it weighs like a key": (
            ring.over(ring.order) * torch.sigmoid(ring.log_sum(ring.order))[..., None]
        ),
        "the last piece overwrote the others": last,
        (
            "the log-sum-exp is not carried along: each merge returns a new one, and"
            " the next merge needs it"
        ): ring.stepwise(carries_lse=False),
    }


def stepwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cut: list[Tensor],
    order: list[int],
    keys: list[int] | None = None,
    values: list[int] | None = None,
    masks: list[tuple[Tensor, Tensor]] | None = None,
    carries_lse: bool = True,
) -> Tensor:
    """Attention of the first rank in `order`, piece by piece; NaN where sizes differ.

    Args:
        order: whose positions are masked with, step by step.
        keys, values: whose keys and values are looked at instead.
        masks: positions of queries and keys, step by step, instead.
    """
    mine = cut[order[0]]
    o = torch.full_like(q[:, :, mine], math.nan)
    lse = None
    masks = masks or [(mine, cut[where]) for where in order]
    for (q_at, k_at), a, b in zip(masks, keys or order, values or order, strict=True):
        if len({len(k_at), len(cut[a]), len(cut[b])}) > 1:
            return torch.full_like(o, math.nan)
        piece = attend(q[:, :, mine], k[:, :, cut[a]], v[:, :, cut[b]], q_at, k_at)
        if lse is None:
            o, lse = piece
            continue
        o, merged = merge(o, lse, *piece)
        lse = merged if carries_lse else lse
    return o


def visiting(
    q: Tensor, k: Tensor, v: Tensor, cut: list[Tensor], order: list[int]
) -> Tensor:
    """All ranks' queries over the first rank's keys, merged; NaN where sizes differ."""
    mine = cut[order[0]]
    if len({len(cut[s]) for s in order}) > 1:
        return torch.full_like(q[:, :, mine], math.nan)
    o, lse = attend(q[:, :, mine], k[:, :, mine], v[:, :, mine], mine, mine)
    for s in order[1:]:
        piece = attend(q[:, :, cut[s]], k[:, :, mine], v[:, :, mine], cut[s], mine)
        o, lse = merge(o, lse, *piece)
    return o
