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
    q, k, v = qkv
    p = len(cut)

    def over(sources, positions=None, blind=False):
        """Attention of rank r's queries over the keys of some ranks.

        `positions`: the ranks from which the keys' positions are taken instead.
        """
        if not sources:
            return torch.full_like(got, math.nan)
        keys = torch.cat([cut[s] for s in sources])
        seen = torch.cat(
            [
                cut[s][: len(cut[t])]
                for s, t in zip(positions or sources, sources, strict=True)
            ]
        )
        if len(seen) != len(keys):
            return torch.full_like(got, math.nan)
        return attend(
            q[:, :, cut[r]],
            k[:, :, keys],
            v[:, :, keys],
            cut[r],
            seen,
            causal=not blind,
        )[0]

    right = over(range(p))
    if close(got, right, 1e-4):
        return
    order = [(r - s) % p for s in range(p)]
    pieces = [over([s]) for s in order]
    last = next((x for x in reversed(pieces) if x.count_nonzero()), pieces[0])
    local = [torch.arange(len(c)) for c in cut]
    keys = torch.cat(cut)
    short = attend(
        q[:, :, cut[r]], k[:, :, keys], v[:, :, keys], local[r], torch.cat(local)
    )[0]
    local_later = stepwise(
        q,
        k,
        v,
        cut,
        order,
        masks=[(cut[r], cut[r]), *[(local[r], local[s]) for s in order[1:]]],
    )
    # rank after rank, as if nobody had shuffled
    row = torch.arange(len(keys)).split([len(c) for c in cut])
    stretch = attend(
        q[:, :, cut[r]], k[:, :, keys], v[:, :, keys], row[r], torch.cat(row)
    )[0]
    mistakes = {}
    if r < p - 1:  # the last rank, marked before, has none after it
        mistakes[
            "ranks after this one were skipped: `cut` may hand out positions in any"
            " order, so a later rank can have earlier tokens"
        ] = over([s for s in order if s <= r])
    mistakes |= {
        "only this rank's own keys were looked at": pieces[0],
        "the last step is missing: there are p steps": over(order[:-1]),
        "this rank's own keys are missing": over(order[1:]),
        (
            "the positions are those of rank r + s; in step s the keys of rank r − s"
            " are here"
        ): over(order, [(r + s) % p for s in range(p)]),
        "every step used this rank's own positions for the keys": over(order, [r] * p),
        (
            "the mask counts from 0 on every rank: use the positions in the whole"
            " sequence"
        ): either(got, short, local_later),
        (
            "the mask takes the ranks' tokens for one stretch after another: `cut`"
            " says where they are"
        ): stretch,
        "there is no causal mask between ranks": over(order, blind=True),
        "the pieces were added: merge them by their log-sum-exp": sum(pieces),
        "the pieces were averaged: merge them by their log-sum-exp": sum(pieces) / p,
        "the last piece overwrote the others": last,
        (
            "the log-sum-exp is not carried along: each merge returns a new one, and"
            " the next merge needs it"
        ): stepwise(q, k, v, cut, order, carries_lse=False),
        "the keys travel and the values stay: both are of the same tokens": stepwise(
            q, k, v, cut, order, values=[r] * p
        ),
        "the values travel and the keys stay: both are of the same tokens": stepwise(
            q, k, v, cut, order, keys=[r] * p
        ),
        (
            "this rank's keys were sent, and looked at, again in every step: hand on"
            " what came"
        ): either(
            got,
            over([r, *[(r - 1) % p] * (p - 1)]),
            over([r, *[(r - 1) % p] * (p - 1)], order),
        ),
        "the queries were sent round as well: they stay, and keys and values travel": (
            visiting(q, k, v, cut, order)
        ),
    }
    diagnose(got, right=right, mistakes=mistakes, tol=1e-4, what=what)


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
