"""What marks the exercises of 05-parallelism/07-hybrid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmlab.checks.parallelism.ranks import (
    either,
    explained,
    numbers_per_rank,
    on_ranks,
)
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.hybrid import Placement

check = Checks("05-parallelism/07-hybrid")
MESHES = (
    {"pp": 2, "dp": 3, "tp": 4},
    {"dp": 5, "tp": 2},
    {"tp": 2, "pp": 3, "dp": 2},
    {"tp": 7},
    {"pp": 2, "dp": 2, "cp": 3, "tp": 2},
)


def _turned(sizes: dict[str, int]) -> dict[str, int]:
    return dict(reversed(sizes.items()))


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "The last axis is innermost: its coordinate is rank modulo its size. What"
            " is left of the rank for the others?"
        ),
        (
            "Go through the axes from the last to the first: coordinate = rank % n,"
            " then rank = rank // n."
        ),
        "for axis, n in reversed(sizes.items()): rank, found[axis] = divmod(rank, n).",
    ),
)
def coordinates(answer):
    """A device's place along each axis."""
    found = []
    for sizes in MESHES:
        place = Placement(sizes)
        for rank in range(place.devices):
            what = f"coordinates({rank}, {sizes})"
            given = dict(sizes)
            got = expect(answer(rank, given), kind=dict, what=what)
            if given != sizes or list(given) != list(sizes):
                raise Mistake(f"{what} changes `sizes`: callers still need it")
            if set(got) != set(sizes):
                raise Mistake(
                    f"{what} has the axes {', '.join(map(str, got)) or 'none'}; those"
                    " of `sizes` are asked, all of them"
                )
            if any(isinstance(v, float) for v in got.values()):
                raise Mistake(
                    f"{what} holds floats; coordinates are integers: `//` divides them"
                )
            found.append(((rank, sizes), got))
    if all(got == Placement(args[1]).coordinates(args[0]) for args, got in found):
        for (rank, sizes), got in found:
            if list(got) != list(sizes):
                raise Mistake(
                    f"coordinates({rank}, {sizes}): the axes are asked in the order of"
                    " sizes"
                )
        return
    explained(found, COORDINATES)
    familiar = [case for case in found if "cp" not in case[0][1]]
    text = "the order of the axes is that of `sizes`, whatever their names"
    explained(familiar, {text: _by_names})
    for (rank, sizes), got in found:
        if got != Placement(sizes).coordinates(rank):
            raise Mistake(
                f"coordinates({rank}, {sizes}) is {got}: with the coordinates as"
                f" digits, the rank must come out as {rank}"
            )


def _by_strides(of: Callable[[int, int, int], int]) -> Callable:
    """Coordinates by `of(rank, stride, size)`, axis by axis."""

    def wrong(rank: int, sizes: dict[str, int]) -> dict[str, int]:
        place = Placement(sizes)
        return {axis: of(rank, place.stride(axis), n) for axis, n in sizes.items()}

    return wrong


def _by_names(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """As if the axes always came in the order pp, dp, tp."""
    ordered = {axis: sizes[axis] for axis in MESHES[0] if axis in sizes}
    return Placement(ordered).coordinates(rank)


COORDINATES = {
    "the last axis is innermost, so devices 0 and 1 differ in it; yours is the first": (
        lambda rank, sizes: Placement(_turned(sizes)).coordinates(rank)
    ),
    "a coordinate is below its axis' size; take it modulo the size": _by_strides(
        lambda rank, stride, n: rank // stride
    ),
    (
        "what the axes further in have used up is still there: divide the rank by their"
        " sizes, then take it modulo the size"
    ): _by_strides(lambda rank, stride, n: rank % n),
    (
        "an axis' own size is divided by as well: only the axes after it are further in"
    ): _by_strides(lambda rank, stride, n: rank // (stride * n) % n),
    "the coordinates count from 1; they begin with 0": _by_strides(
        lambda rank, stride, n: rank // stride % n + 1
    ),
}


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "How far apart are neighbours along an axis? Count how many devices the"
            " axes further in make together."
        ),
        (
            "stride = the product of the sizes of all axes after `axis`. The first of"
            " the group has coordinate 0 along it."
        ),
        (
            "first = rank − (rank // stride % n) · stride; then first + i · stride for"
            " i below n."
        ),
    ),
)
def group(answer):
    """The devices that a device talks to along an axis."""
    found = []
    for sizes in MESHES:
        for axis in sizes:
            for rank in range(Placement(sizes).devices):
                what = f"group({rank}, {axis!r}, {sizes})"
                got = expect(answer(rank, axis, dict(sizes)), kind=list, what=what)
                found.append(((rank, axis, sizes), got))
    if all(got == _group(*args) for args, got in found):
        return
    if all(sorted(got) == _group(*args) for args, got in found):
        raise Mistake("the right devices; increasing order is asked")
    explained(found, GROUPS)
    for args, got in found:
        right = _group(*args)
        if got != right:
            rank, axis, sizes = args
            raise Mistake(
                f"group({rank}, {axis!r}, {sizes}) is {got}, of which"
                f" {len(set(got) & set(right))} of {len(right)} are right"
                + ("" if rank in got else "; the device itself is not among them")
            )


def _group(rank: int, axis: str, sizes: dict[str, int]) -> list[int]:
    return next(list(g) for g in Placement(sizes).groups(axis) if rank in g)


def _apart(axis: str, sizes: dict[str, int], stride: int, first: int) -> list[int]:
    return [first + i * stride for i in range(sizes[axis])]


def _coordinate(rank: int, axis: str, sizes: dict[str, int]) -> int:
    return Placement(sizes).coordinates(rank)[axis]


GROUPS = {
    "the device itself belongs to its group": lambda rank, axis, sizes: [
        r for r in _group(rank, axis, sizes) if r != rank
    ],
    "the last axis is innermost; yours is the first": lambda rank, axis, sizes: _group(
        rank, axis, _turned(sizes)
    ),
    (
        "neighbours along an axis are as many apart as the axes further in have devices"
        " together, not 1"
    ): lambda rank, axis, sizes: _apart(
        axis, sizes, 1, rank // sizes[axis] * sizes[axis]
    ),
    (
        "these devices share their coordinate along `axis`; those of a group share all"
        " the others"
    ): lambda rank, axis, sizes: [
        r
        for r in range(Placement(sizes).devices)
        if _coordinate(r, axis, sizes) == _coordinate(rank, axis, sizes)
    ],
    (
        "the axis is taken for the outermost: its stride is the product of the sizes"
        " after it, not of all others"
    ): lambda rank, axis, sizes: [
        r
        for r in range(Placement(sizes).devices)
        if (r - rank) % (Placement(sizes).devices // sizes[axis]) == 0
    ],
    "this is the group of device 0, whatever the rank": lambda rank, axis, sizes: (
        _group(0, axis, sizes)
    ),
    (
        "the group begins with device rank % stride: the axes further out are forgotten"
    ): lambda rank, axis, sizes: _apart(
        axis,
        sizes,
        Placement(sizes).stride(axis),
        rank % Placement(sizes).stride(axis),
    ),
    "the group begins where the coordinate along `axis` is 0, not with the rank": (
        lambda rank, axis, sizes: _apart(
            axis, sizes, Placement(sizes).stride(axis), rank
        )
    ),
    "these are coordinates along `axis`; devices are asked": lambda rank, axis, sizes: (
        list(range(sizes[axis]))
    ),
    "one device too many: an axis has as many as its size": (
        lambda rank, axis, sizes: [
            *_group(rank, axis, sizes),
            _group(rank, axis, sizes)[-1] + Placement(sizes).stride(axis),
        ]
    ),
    "these are all devices": lambda rank, axis, sizes: list(
        range(Placement(sizes).devices)
    ),
}


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Squares of norms add up over ranks and over tensors. The root is taken"
            " once, at the very end."
        ),
        (
            "A tensor that c ranks hold is summed c times by the all-reduce: divide its"
            " square by c first."
        ),
        (
            "comm.all_reduce(Σ g.square().sum() / copies[name]).sqrt(); begin the sum"
            " with torch.zeros(()) for a rank without tensors."
        ),
    ),
)
def global_norm(answer):
    """The norm of a gradient that lies on several ranks."""
    for p, empty in ((2, False), (4, False), (3, True)):
        shared = torch.randn(5)
        mine = [
            {} if empty and r == 1 else {"norm": shared, "shard": torch.randn(3, r + 2)}
            for r in range(p)
        ]
        copies = {"norm": p - empty, "shard": 1}
        what = f"global_norm on {p} ranks" + (
            ", one of which holds nothing" if empty else ""
        )
        try:
            results, ledger = on_ranks(
                p,
                lambda comm, mine=mine, copies=copies: answer(
                    comm, mine[comm.rank], copies
                ),
            )
        except (RuntimeError, TypeError, AttributeError, Mistake) as error:
            if not empty:
                raise
            raise Mistake(
                f"{what}: that rank takes part as well, with a sum of squares that is"
                f" 0, in the same dtype\n{error}"
            ) from error
        shards = [m["shard"] for m in mine if m]
        right = (shared.square().sum() + sum(s.square().sum() for s in shards)).sqrt()
        for rank, got in enumerate(results):
            got = expect(got, kind=Tensor, shape=(), what=what)
            diagnose(
                got,
                right=right,
                mistakes=_norm_mistakes(
                    got, mine, shared, shards, copies["norm"], rank
                ),
                tol=1e-4,
                what=what,
            )
        sent = max(numbers_per_rank(ledger))
        if sent > 2:
            raise Mistake(
                f"{what}: right, but a rank sends {sent:.0f} numbers; one all-reduce of"
                " one number is enough"
            )


def _norm_mistakes(
    got: Tensor, mine: list, shared: Tensor, shards: list[Tensor], c: int, rank: int
) -> dict[str, Tensor]:
    s2 = shared.square().sum()
    h2 = sum(s.square().sum() for s in shards)
    norms = [sum(g.square().sum() for g in m.values()).sqrt() for m in mine if m]
    own = mine[rank]
    alone = sum((g.square().sum() / (c if k == "norm" else 1) for k, g in own.items()))
    alone = torch.as_tensor(alone, dtype=torch.float32)
    twice = torch.as_tensor(sum(g.square().sum() for g in own.values()))
    added = torch.stack([shared.norm() / c + m["shard"].norm() for m in mine if m])
    fair = [
        (sum(s.square().sum() for s in [m["shard"]]) + s2 / c).sqrt() for m in mine if m
    ]
    return {
        (
            "a tensor that several ranks hold is counted once for each of them: divide"
            " its square by its copies"
        ): (c * s2 + h2).sqrt(),
        "norms do not add up, squares do: take the root after the all-reduce": sum(
            fair
        ),
        "norms do not add up, squares do, and copies count once": sum(norms),
        "this is the mean of the ranks' norms; their squares add up": (
            sum(fair) / len(mine)
        ),
        "the squares are right; the root is missing": s2 + h2,
        "this is the mean over ranks; the sum is asked": ((s2 + h2) / len(mine)).sqrt(),
        "divide the *square* by the copies, not the norm": (c * s2 / c**2 + h2).sqrt(),
        "what several ranks hold is left out": torch.as_tensor(h2).sqrt(),
        "this is this rank's norm alone: all-reduce the squares": either(
            got, alone.sqrt(), twice.sqrt()
        ),
        "the whole norm is divided by the copies; divide a copied tensor's square": (
            (c * s2 + h2).sqrt() / c
        ),
        "a copied tensor's square is multiplied by its copies; divide it": (
            (c * c * s2 + h2).sqrt()
        ),
        "this is the largest of the ranks' norms: their squares add up": (
            torch.stack(fair).max()
        ),
        (
            "a tensor's copies are those of `copies`, which need not be as many as the"
            " ranks"
        ): (c * s2 / len(mine) + h2).sqrt(),
        "these are absolute values: a norm is the root of a sum of squares": (
            shared.abs().sum() + sum(s.abs().sum() for s in shards)
        ),
        "norms of tensors do not add up, squares do: one root, at the very end": (
            added.square().sum().sqrt()
        ),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Where in the whole does the new piece begin and end? Where does each old one?",
        (
            "Two intervals overlap from max of the beginnings to min of the ends; both"
            " ends are cut at n."
        ),
        (
            "low, high = max(r·new, q·old), min((r+1)·new, (q+1)·old, n) in entries; if"
            " low < high: (q, low − q·old, high − q·old)."
        ),
    ),
)
def sources(answer):
    """Which parts of old pieces make a new piece."""
    found = []
    for n, old, new in (
        (8, 2, 4),
        (8, 4, 2),
        (37, 2, 4),
        (10, 3, 2),
        (5, 4, 3),
        (6, 6, 1),
        (7, 1, 3),
    ):
        for r in range(new):
            what = f"sources({n}, {old}, {new}, r={r})"
            got = expect(answer(n, old, new, r), kind=list, what=what)
            if not all(isinstance(x, tuple | list) and len(x) == 3 for x in got):
                raise Mistake(
                    f"{what} must hold (old rank, first, one past the last), three"
                    " integers each"
                )
            found.append(((n, old, new, r), [tuple(x) for x in got]))
    if all(got == _sources(*args) for args, got in found):
        return
    if all([x for x in got if x[1] < x[2]] == _sources(*args) for args, got in found):
        raise Mistake("leave out what is empty")
    if all(sorted(got) == _sources(*args) for args, got in found):
        raise Mistake("the right parts, in another order")
    explained(found, SOURCES)
    if all(got == _sources(n, new, old, r % old) for (n, old, new, r), got in found):
        raise Mistake("old and new are swapped")
    for (n, old, new, r), got in found:
        if got != _sources(n, old, new, r):
            b = -(-n // new)
            raise Mistake(
                f"sources({n}, {old}, {new}, r={r}) is {got}: the new piece is"
                f" [{min(n, r * b)}, {min(n, (r + 1) * b)}), old ones have"
                f" {-(-n // old)}"
            )


Cut = Callable[[int, int], list[tuple[int, int]]]


def _rounded_up(n: int, p: int) -> list[tuple[int, int]]:
    """Where each of p pieces begins and ends."""
    length = -(-n // p)
    return [(min(n, i * length), min(n, (i + 1) * length)) for i in range(p)]


def _rounded_down(n: int, p: int) -> list[tuple[int, int]]:
    length = max(1, n // p)
    return [(i * length, (i + 1) * length) for i in range(p)]


def _rest_in_the_last(n: int, p: int) -> list[tuple[int, int]]:
    cut = [(i * (n // p), (i + 1) * (n // p)) for i in range(p)]
    return [*cut[:-1], (cut[-1][0], n)]


def _even(n: int, p: int) -> list[tuple[int, int]]:
    each, more = divmod(n, p)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(p)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _not_cut(n: int, p: int) -> list[tuple[int, int]]:
    length = -(-n // p)
    return [(i * length, (i + 1) * length) for i in range(p)]


def _to_the_nearest(n: int, p: int) -> list[tuple[int, int]]:
    return [(round(i * n / p), round((i + 1) * n / p)) for i in range(p)]


def _sources(
    n: int,
    old: int,
    new: int,
    r: int,
    cut: Cut = _rounded_up,
    form: Callable = lambda low, high, piece, mine: (low - piece[0], high - piece[0]),
) -> list[tuple[int, int, int]]:
    """What to read; `form` turns positions in the whole into what is returned."""
    mine = cut(n, new)[r]
    found = []
    for q, piece in enumerate(cut(n, old)):
        low, high = max(mine[0], piece[0]), min(mine[1], piece[1])
        if low < high:
            found.append((q, *form(low, high, piece, mine)))
    return found


SOURCES = {
    "these are positions in the whole; count them inside the old piece": partial(
        _sources, form=lambda low, high, piece, mine: (low, high)
    ),
    "these are positions in the new piece; count them inside the old one": partial(
        _sources, form=lambda low, high, piece, mine: (low - mine[0], high - mine[0])
    ),
    "the third number is one past the last; these are the last": partial(
        _sources,
        form=lambda low, high, piece, mine: (low - piece[0], high - piece[0] - 1),
    ),
    "the third number is one past the last; these are lengths": partial(
        _sources, form=lambda low, high, piece, mine: (low - piece[0], high - low)
    ),
    "these are whole old pieces; read only what the new one has": partial(
        _sources, form=lambda low, high, piece, mine: (0, piece[1] - piece[0])
    ),
    "the last piece ends with the n entries, before its full length": partial(
        _sources, cut=_not_cut
    ),
    "a piece has ⌈n/p⌉ entries, rounded up; these are rounded down": partial(
        _sources, cut=_rounded_down
    ),
    "a piece has ⌈n/p⌉ entries, rounded up; here the last takes what is left": partial(
        _sources, cut=_rest_in_the_last
    ),
    "a piece has ⌈n/p⌉ entries, but for the last; these differ by one at most": partial(
        _sources, cut=_even
    ),
    "a piece has ⌈n/p⌉ entries, rounded up; these are rounded to the nearest": partial(
        _sources, cut=_to_the_nearest
    ),
    "old and new are swapped": lambda n, old, new, r: _sources(
        n, new, old, min(r, old - 1)
    ),
    "only the first old piece is there; a new one may need several": lambda *args: (
        _sources(*args)[:1]
    ),
}
