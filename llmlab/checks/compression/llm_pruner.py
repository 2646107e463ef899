"""Checks of 06-compression/10-llm-pruner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/10-llm-pruner")


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether all are alike, in shape and in values."""
    return all(x.shape == y.shape and close(x, y) for x, y in zip(a, b, strict=True))


def settle(
    got: object,
    names: Sequence[str],
    right: Sequence[Tensor],
    mistakes: dict[str, Sequence[Tensor]],
    what: str,
) -> None:
    """Several tensors of different shapes: right, a mistake that is known, or which."""
    got = expect(got, kind=type(right), what=what)
    if len(got) != len(right):
        raise Mistake(f"{what} has {len(got)} entries, not {len(right)}")
    got = [
        expect(g, dtype=r.dtype, what=f"{name} of {what}")
        for name, g, r in zip(names, got, right, strict=True)
    ]
    if same(got, right):
        return
    for text, wrong in mistakes.items():
        if same(got, wrong):
            raise Mistake(text)
    for name, g, r in zip(names, got, right, strict=True):
        if g.shape != r.shape:
            raise Mistake(
                f"{name} of {what} has shape {tuple(g.shape)}, not {tuple(r.shape)}"
            )
        if not close(g, r):
            raise Mistake(f"{name} of {what} has the right shape and other values")


# 1 ------------------------------------------------------------------------------------

MLP = ("gate", "up", "down")


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=5,
    hints=(
        "Who makes channel j? A row of gate and a row of up. Who reads it?",
        "down has shape (d, f): it reads the channels, so they are its columns.",
        "`gate[keep], up[keep], down[:, keep]`.",
    ),
)
def cut_mlp(answer):
    """Some channels of an MLP stay: what makes them, and what reads them."""
    for d, f, keep in ((6, 8, [1, 2, 5, 4]), (4, 5, [0, 4, 2]), (5, 4, [3])):
        case = torch.randn(f, d), torch.randn(f, d), torch.randn(d, f)
        keep = torch.tensor(keep)
        what = f"cut_mlp(gate, up, down, {keep.tolist()})"
        settle(
            answer(*case, keep),
            MLP,
            right_mlp(*case, keep),
            wrong_mlps(*case, keep),
            what,
        )


def right_mlp(gate: Tensor, up: Tensor, down: Tensor, keep: Tensor) -> tuple:
    """Rows of gate and up, columns of down."""
    return gate[keep], up[keep], down[:, keep]


def wrong_mlps(gate: Tensor, up: Tensor, down: Tensor, keep: Tensor) -> dict:
    """What usual mistakes leave of the three."""
    gone = torch.tensor([j for j in range(len(gate)) if j not in keep.tolist()])
    order = keep.sort().values
    zeros = torch.zeros(len(gate), 1).index_fill(0, keep, 1.0)
    found = {
        "up still has all its rows: gate ⊙ up would multiply unlike shapes": (
            gate[keep],
            up,
            down[:, keep],
        ),
        "gate still has all its rows: gate ⊙ up would multiply unlike shapes": (
            gate,
            up[keep],
            down[:, keep],
        ),
        "down still has all its columns: it would read channels that nobody makes": (
            gate[keep],
            up[keep],
            down,
        ),
        "the weights have zeros, and are as long as before: leave the channels out": (
            gate * zeros,
            up * zeros,
            down * zeros.T,
        ),
        "nothing is cut": (gate, up, down),
        "down is transposed: it stays (d, n)": (gate[keep], up[keep], down[:, keep].T),
        "up is gate once more": (gate[keep], gate[keep], down[:, keep]),
        "the first channels stay: `keep` says which": right_mlp(
            gate, up, down, torch.arange(len(keep))
        ),
    }
    if order.tolist() != keep.tolist():
        found["the channels are sorted: they stand in the order of `keep`"] = right_mlp(
            gate, up, down, order
        )
        found["gate and up are in the order of `keep`, down's columns are sorted"] = (
            gate[keep],
            up[keep],
            down[:, order],
        )
    if len(gone):
        found["`keep` went and the others stayed: it names those that stay"] = (
            right_mlp(gate, up, down, gone)
        )
    if len(down) > keep.max():
        found["down lost rows: the channels that it reads are its columns"] = (
            gate[keep],
            up[keep],
            down[keep],
        )
        found["columns of gate and up went: they make the channels with their rows"] = (
            gate[:, keep],
            up[:, keep],
            down[keep],
        )
    return found


# 2 ------------------------------------------------------------------------------------

HEADS = ("q", "k", "v", "o")


@check.exercise(
    points=4,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "How many query heads share a key/value head? Their rows in q stand beside"
            " each other, as do the rows of one head."
        ),
        (
            "`k.view(K, head_dim, -1)[keep].flatten(0, 1)` keeps whole heads. For q the"
            " first axis is K, too, and the second `shared * head_dim`."
        ),
        (
            "o reads what q's heads put out: what you do with the rows of q, do with"
            " the columns of o, by `o.T` and back."
        ),
    ),
)
def cut_heads(answer):
    """Key/value heads leave with the query heads that share them."""
    for d, D, K, shared, keep in (
        (28, 3, 3, 3, [0, 2]),
        (8, 2, 4, 2, [1, 3]),
        (7, 4, 3, 1, [1, 2]),
        (6, 2, 2, 3, [1]),
    ):
        case = heads_of(d, D, K, shared)
        keep = torch.tensor(keep)
        what = f"cut_heads(q, k, v, o, keep={keep.tolist()}, head_dim={D})"
        mistakes = wrong_heads(*case, keep, D)
        settle(
            answer(*case, keep, D), HEADS, right_heads(*case, keep, D), mistakes, what
        )


def heads_of(d: int, D: int, K: int, shared: int) -> tuple[Tensor, ...]:
    """q, k, v and o of an attention with K key/value heads."""
    return (
        torch.randn(K * shared * D, d),
        torch.randn(K * D, d),
        torch.randn(K * D, d),
        torch.randn(d, K * shared * D),
    )


def rows_of(heads: Tensor, head_dim: int) -> Tensor:
    """The rows of these heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def right_heads(q, k, v, o, keep: Tensor, D: int) -> tuple[Tensor, ...]:
    """Rows of q, k and v, columns of o."""
    shared = len(q) // len(k)
    queries = rows_of(keep, shared * D)
    few = rows_of(keep, D)
    return q[queries], k[few], v[few], o[:, queries]


def wrong_heads(q, k, v, o, keep: Tensor, D: int) -> dict[str, tuple]:
    """What usual mistakes leave of the four."""
    shared = len(q) // len(k)
    K = len(k) // D
    few = rows_of(keep, D)
    queries = rows_of(keep, shared * D)
    gone = torch.tensor([u for u in range(K) if u not in keep.tolist()])
    interleaved = (torch.arange(D)[:, None] * K + keep).flatten()  # row i·K + head
    wide = (torch.arange(shared * D)[:, None] * K + keep).flatten()
    its = rows_of(keep, shared)  # the query heads
    apart = (torch.arange(D)[:, None] * K * shared + its).flatten()
    cut_k, cut_v = k[few], v[few]
    found = {
        "o still has all its columns: it would read heads that are gone": (
            q[queries],
            cut_k,
            cut_v,
            o,
        ),
        "k still has all its heads": (q[queries], k, cut_v, o[:, queries]),
        "v still has all its heads": (q[queries], cut_k, v, o[:, queries]),
        "k and v still have all their heads": (q[queries], k, v, o[:, queries]),
        "q still has all its heads": (q, cut_k, cut_v, o[:, queries]),
        "nothing is cut": (q, k, v, o),
        "single rows stay: a head has `head_dim` of them": (
            q[keep],
            k[keep],
            v[keep],
            o[:, keep],
        ),
        "`keep` went and the others stayed: it names those that stay": right_heads(
            q, k, v, o, gone, D
        ),
        "the rows of a head stand beside each other: you took every K-th": (
            q[wide],
            k[interleaved],
            v[interleaved],
            o[:, wide],
        ),
        "the rows of a head stand beside each other: you took the first row of"
        " each head, then the second of each": (
            q[apart],
            k[interleaved],
            v[interleaved],
            o[:, apart],
        ),
        "only k and v are cut: their query heads go, too, in q and in o": (
            q,
            cut_k,
            cut_v,
            o,
        ),
        "only the rows of q and k are cut: v and o have the same heads": (
            q[queries],
            cut_k,
            v,
            o,
        ),
    }
    if len(o) > queries.max():
        found["o lost rows: the heads that it reads are its columns"] = (
            q[queries],
            cut_k,
            cut_v,
            o[queries],
        )
    if shared > 1:
        found |= wrong_queries(q, k, v, o, keep, D)
    return found


def wrong_queries(q, k, v, o, keep: Tensor, D: int) -> dict[str, tuple]:
    """The same where several query heads share a key/value head."""
    shared = len(q) // len(k)
    K = len(k) // D
    few = rows_of(keep, D)
    queries = rows_of(keep, shared * D)
    strided = torch.cat([keep + j * K for j in range(shared)]).sort().values
    strided = rows_of(strided, D)  # head h with key/value head h mod K
    cut_k, cut_v = k[few], v[few]
    firsts = rows_of(keep * shared, D)
    single = rows_of(keep, shared)
    two = rows_of(keep, 2 * D)
    found = {
        "only the first query head of each group stays: all that share a head do": (
            q[firsts],
            cut_k,
            cut_v,
            o[:, firsts],
        ),
        "a row of q stands for a head here: a head has `head_dim` of them": (
            q[single],
            k[keep],
            v[keep],
            o[:, single],
        ),
        "q keeps as many heads as k: each key/value head has several query heads": (
            q[few],
            cut_k,
            cut_v,
            o[:, few],
        ),
        "q is right, and o keeps only as many heads as k": (
            q[queries],
            cut_k,
            cut_v,
            o[:, few],
        ),
        "query heads that share a head are neighbours: h belongs to h // shared,"
        " not to h mod K": (q[strided], cut_k, cut_v, o[:, strided]),
        "no error would tell, but o keeps the columns of other heads than q": (
            q[queries],
            cut_k,
            cut_v,
            o[:, strided],
        ),
        "no error would tell, but q keeps other heads than o reads": (
            q[strided],
            cut_k,
            cut_v,
            o[:, queries],
        ),
    }
    if len(q) > two.max() and shared != 2:
        found[
            "two query heads are taken for each: the shapes say how many share one"
        ] = (q[two], cut_k, cut_v, o[:, two])
    return found


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "For each member: g ⊙ w, its absolute value, and a sum over the *other* axis.",
        "With axis 0 the units are rows, so sum over dimension 1: `dim=1 - axis`.",
        "`total = total + (g * w).abs().sum(dim=1 - axis)`, in a loop over all three.",
    ),
)
def group_importance(answer):
    """What a unit is worth: |g w| of all its weights in all members."""

    def draw() -> tuple[list, list, list]:
        weights = [torch.randn(5, 5) for _ in range(3)]
        grads = [torch.randn(5, 5) for _ in range(3)]
        return weights, grads, [0, 0, 1]

    case = telling(draw, right_importance, wrong_importances)
    what = "group_importance(weights, grads, [0, 0, 1])"
    got = expect(answer(*case), shape=(5,), dtype=torch.float32, what=what)
    diagnose(
        got,
        right=right_importance(*case),
        mistakes=wrong_importances(*case),
        what=what,
    )
    shapes = [(4, 7), (3, 4), (4, 2), (6, 4)]
    weights = [torch.randn(shape) for shape in shapes]
    grads = [torch.randn(shape) for shape in shapes]
    axes = [0, 1, 0, 1]
    what = "group_importance of four members"
    got = expect(answer(weights, grads, axes), shape=(4,), what=what)
    if not close(got, right_importance(weights, grads, axes)):
        raise Mistake(
            "right for three square members, wrong for four that are not: take the"
            " number of members and each axis from the arguments"
        )


def right_importance(weights: list, grads: list, axes: list) -> Tensor:
    """Σ |g w| of each unit."""
    return members_of(
        weights, grads, axes, lambda w, g, dim: (g * w).abs().sum(dim)
    ).sum(0)


def members_of(weights: list, grads: list, axes: list, score: Callable) -> Tensor:
    """(members, units)"""
    found = [
        score(w, g, 1 - axis) for w, g, axis in zip(weights, grads, axes, strict=True)
    ]
    return torch.stack(found)


def wrong_importances(weights: list, grads: list, axes: list) -> dict[str, Tensor]:
    """What usual mistakes make of the importance."""

    def members(score: Callable, axes: list = axes) -> Tensor:
        return members_of(weights, grads, axes, score)

    each = members(lambda w, g, dim: (g * w).abs().sum(dim))
    other = [1 - axis for axis in axes]
    all_rows = [0] * len(axes)
    return {
        "take |·| of each weight and then the sum: now terms of unlike sign"
        " cancel": members(lambda w, g, dim: (g * w).sum(dim).abs()).sum(0),
        "|·| is missing: a slope of either sign is a loss": members(
            lambda w, g, dim: (g * w).sum(dim)
        ).sum(0),
        "|·| stands around all: each weight has its own": (
            members(lambda w, g, dim: (g * w).sum(dim)).sum(0).abs()
        ),
        "the mean of a row: the sum is asked": members(
            lambda w, g, dim: (g * w).abs().mean(dim)
        ).sum(0),
        "the mean of the members: the sum is asked": each.mean(0),
        "the largest member: the sum is asked": each.amax(0),
        "the product of the members: the sum is asked": each.prod(0),
        "only the first member counts: a unit is all of them": each[0],
        "only the last member counts: a unit is all of them": each[-1],
        "the slopes are missing: this is Σ |w|": members(
            lambda w, g, dim: w.abs().sum(dim)
        ).sum(0),
        "this is Σ w²: the slopes are missing": members(
            lambda w, g, dim: w.square().sum(dim)
        ).sum(0),
        "the weights are missing: this is Σ |g|": members(
            lambda w, g, dim: g.abs().sum(dim)
        ).sum(0),
        "the absolute values are summed before the product: multiply each weight with"
        " its own slope": members(
            lambda w, g, dim: w.abs().sum(dim) * g.abs().sum(dim)
        ).sum(0),
        "each term is squared: |g w| is asked": members(
            lambda w, g, dim: (g * w).square().sum(dim)
        ).sum(0),
        "the wrong axis: with axis 0 a unit is a row, so sum over the columns": members(
            lambda w, g, dim: (g * w).abs().sum(dim), other
        ).sum(0),
        "all members are read by rows: with axis 1 a unit is a column": members(
            lambda w, g, dim: (g * w).abs().sum(dim), all_rows
        ).sum(0),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=12,
    difficulty=3,
    importance=3,
    hints=(
        "A loop over the layers with their numbers; two cases.",
        (
            "Of a layer in the middle `int(n * ratio)` units go. `argsort` puts the"
            " lowest first."
        ),
        "`s.argsort()[count:].sort().values`, where `count` is 0 in the outer layers.",
    ),
)
def kept_units(answer):
    """Which units stay: all in the outer layers, the best in the others."""
    for sizes, ratio, first, last in (
        ((5, 10, 7, 6, 5, 8), 0.3, 1, 2),
        ((8, 4, 4, 6), 0.5, 0, 1),
        ((5, 7, 6, 3, 5), 0.25, 2, 0),
    ):
        scores = [torch.rand(n) + 0.5 * i for i, n in enumerate(sizes)]
        what = f"kept_units(scores, {ratio}, {first}, {last})"
        got = expect(answer(scores, ratio, first, last), kind=list, what=what)
        if len(got) == len(sizes) - first - last:
            raise Mistake(
                "only the layers in the middle have an entry: outer layers have one,"
                " too, with all their units"
            )
        settle(
            got,
            [f"entry {i}" for i in range(len(sizes))],
            right_units(scores, ratio, first, last),
            wrong_units(scores, ratio, first, last),
            what,
        )


def right_units(
    scores: list[Tensor],
    ratio: float,
    first: int,
    last: int,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """All of the outer layers, what `choose` takes of the others: the best."""

    def best(s: Tensor) -> Tensor:
        return s.argsort()[int(len(s) * ratio) :].sort().values

    choose = choose or best
    return [
        choose(s) if first <= i < len(scores) - last else torch.arange(len(s))
        for i, s in enumerate(scores)
    ]


def wrong_units(
    scores: list[Tensor], ratio: float, first: int, last: int
) -> dict[str, list[Tensor]]:
    """What usual mistakes keep. None is right here: `right` is looked at first."""
    middle = torch.cat(scores[first : len(scores) - last])
    border = middle.sort().values[int(len(middle) * ratio)]
    overall = torch.cat(scores).sort().values[int(len(torch.cat(scores)) * ratio)]

    def with_(choose: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return right_units(scores, ratio, first, last, choose)

    def goes(s: Tensor) -> int:
        return int(len(s) * ratio)

    return {
        "the worst stay: those of most importance are to": with_(
            lambda s: s.argsort(descending=True)[goes(s) :].sort().values
        ),
        "these are the units that go": with_(
            lambda s: s.argsort()[: goes(s)].sort()[0]
        ),
        "the units stand in the order of their importance: sort their numbers": with_(
            lambda s: s.argsort()[goes(s) :]
        ),
        "the units stand in the order of their importance, best first: sort their"
        " numbers": with_(lambda s: s.argsort(descending=True)[: len(s) - goes(s)]),
        "`ratio` is the share that goes, not the share that stays": with_(
            lambda s: s.argsort(descending=True)[: goes(s)].sort().values
        ),
        "one too many goes: int(n · ratio), cut off": with_(
            lambda s: s.argsort()[goes(s) + 1 :].sort().values
        ),
        "what stays is cut off, so too many go: int(n · ratio) go": with_(
            lambda s: s.argsort()[len(s) - int(len(s) * (1 - ratio)) :].sort().values
        ),
        "the number that goes is rounded: it is cut off, int(n · ratio)": with_(
            lambda s: s.argsort()[round(len(s) * ratio) :].sort().values
        ),
        "all layers stay whole: `[-0:]` is all of them, and keep_last is 0": (
            right_units(scores, ratio, first, last if last else len(scores))
        ),
        "one border for all layers: each layer loses its own share": with_(
            lambda s: (s >= border).nonzero().flatten()
        ),
        "one border for all layers, outer ones as well: each layer loses its own"
        " share": with_(lambda s: (s >= overall).nonzero().flatten()),
        "where int(n · ratio) is 0 nothing goes: `[:-0]` is empty": with_(
            lambda s: s.argsort(descending=True)[: -goes(s)].sort().values
        ),
        "all layers are pruned: the first and the last stay whole": right_units(
            scores, ratio, 0, 0
        ),
        "the last layers are pruned, too": right_units(scores, ratio, first, 0),
        "the first layers are pruned, too": right_units(scores, ratio, 0, last),
        "one layer too few stays whole at the start": right_units(
            scores, ratio, first - 1, last
        ),
        "one layer too many stays whole at the start": right_units(
            scores, ratio, first + 1, last
        ),
        "one layer too few stays whole at the end": right_units(
            scores, ratio, first, last - 1
        ),
        "one layer too many stays whole at the end": right_units(
            scores, ratio, first, last + 1
        ),
        "keep_first and keep_last are in each other's place": right_units(
            scores, ratio, last, first
        ),
    }
