"""What marks the exercises of 05-parallelism/07-hybrid."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.checks.parallelism.ranks import numbers_per_rank, on_ranks
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.hybrid import Placement

check = Checks("05-parallelism/07-hybrid")
MESHES = (
    {"pp": 2, "dp": 3, "tp": 4},
    {"dp": 5, "tp": 2},
    {"tp": 2, "pp": 3, "dp": 2},
    {"tp": 7},
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
    for sizes in MESHES:
        place = Placement(sizes)
        for rank in range(place.devices):
            what = f"coordinates({rank}, {sizes})"
            got = expect(answer(rank, dict(sizes)), kind=dict, what=what)
            right = place.coordinates(rank)
            if got == right:
                if list(got) != list(right):
                    raise Mistake(f"{what}: the axes are asked in the order of sizes")
                continue
            if got == Placement(_turned(sizes)).coordinates(rank):
                raise Mistake(
                    f"{what}: the last axis is innermost, so devices 0 and 1 differ in"
                    " it; yours is the first"
                )
            if all(
                isinstance(v, int) and v >= n
                for v, n in zip(got.values(), sizes.values(), strict=False)
                if v not in (0, n - 1)
            ):
                raise Mistake(
                    f"{what} is {got}: a coordinate is below its axis' size; take it"
                    " modulo the size"
                )
            raise Mistake(
                f"{what} is {got}: with the coordinates as digits, the rank must come"
                f" out as {rank}"
            )


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
    for sizes in MESHES:
        place = Placement(sizes)
        # along the first axis two mistakes look alike
        for axis in [*list(sizes)[1:], next(iter(sizes))]:
            # at rank 0 several mistakes look alike
            for rank in reversed(range(place.devices)):
                what = f"group({rank}, {axis!r}, {sizes})"
                got = expect(answer(rank, axis, dict(sizes)), kind=list, what=what)
                right = next(list(g) for g in place.groups(axis) if rank in g)
                if got == right:
                    continue
                _wrong_group(got, right, rank, axis, place, what)


def _wrong_group(
    got: list, right: list[int], rank: int, axis: str, place: Placement, what: str
) -> None:
    sizes = place.sizes
    n = sizes[axis]
    turned = Placement(_turned(sizes))
    if sorted(got) == right:
        raise Mistake(f"{what}: the right devices; increasing order is asked")
    if sorted([*got, rank]) == right:
        raise Mistake(f"{what}: the device itself belongs to its group")
    if got == next(list(g) for g in turned.groups(axis) if rank in g):
        raise Mistake(f"{what}: the last axis is innermost; yours is the first")
    if got == [rank // n * n + i for i in range(n)]:
        raise Mistake(
            f"{what}: neighbours along {axis} are {place.stride(axis)} apart, not 1"
        )
    if rank not in got:
        raise Mistake(
            f"{what} is {got}: it does not contain the device itself; start where its"
            f" coordinate along {axis} is 0"
        )
    raise Mistake(
        f"{what} is {got}, of which {len(set(got) & set(right))} of {n} are right"
    )


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
        results, ledger = on_ranks(
            p,
            lambda comm, mine=mine, copies=copies: answer(
                comm, mine[comm.rank], copies
            ),
        )
        shards = [m["shard"] for m in mine if m]
        right = (shared.square().sum() + sum(s.square().sum() for s in shards)).sqrt()
        for got in results:
            got = expect(got, kind=Tensor, shape=(), what=what)
            diagnose(
                got,
                right=right,
                mistakes=_norm_mistakes(mine, shared, shards, copies["norm"]),
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
    mine: list, shared: Tensor, shards: list[Tensor], c: int
) -> dict[str, Tensor]:
    s2 = shared.square().sum()
    h2 = sum(s.square().sum() for s in shards)
    norms = [sum(g.square().sum() for g in m.values()).sqrt() for m in mine if m]
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
        "the squares are right; the root is missing": s2 + h2,
        "this is the mean over ranks; the sum is asked": ((s2 + h2) / len(mine)).sqrt(),
        "divide the *square* by the copies, not the norm": (c * s2 / c**2 + h2).sqrt(),
        "what several ranks hold is left out": torch.as_tensor(h2).sqrt(),
        "this is this rank's norm alone: all-reduce the squares": norms[0],
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
            got = [
                tuple(x) for x in expect(answer(n, old, new, r), kind=list, what=what)
            ]
            right = _sources(n, old, new, r)
            if got == right:
                continue
            each = -(-n // old)
            if got == [(q, a + q * each, b + q * each) for q, a, b in right]:
                raise Mistake(
                    f"{what}: these are positions in the whole; count them inside the"
                    " old piece"
                )
            if [x for x in got if x[1] < x[2]] == right:
                raise Mistake(f"{what}: leave out what is empty")
            if got == [
                (q, a, each) if b == n - q * each else (q, a, b) for q, a, b in right
            ]:
                raise Mistake(
                    f"{what}: the last piece ends with the {n} entries, before its full"
                    " length"
                )
            if sorted(got) == sorted(right):
                raise Mistake(f"{what}: the right parts, in another order")
            if got == _sources(n, new, old, r % old):
                raise Mistake(f"{what}: old and new are swapped")
            if got == _floor(n, old, new, r):
                raise Mistake(
                    f"{what}: a piece has ⌈n/p⌉ entries, rounded up: {n}/{old} is"
                    f" {each}, {n}/{new} is {-(-n // new)}"
                )
            raise Mistake(
                f"{what} is {got}: the new piece is [{min(n, r * -(-n // new))},"
                f" {min(n, (r + 1) * -(-n // new))})"
            )


def _sources(n: int, old: int, new: int, r: int) -> list[tuple[int, int, int]]:
    a = -(-n // old)
    b = -(-n // new)
    ranges = [
        (q, max(min(n, r * b), q * a), min(n, (r + 1) * b, (q + 1) * a))
        for q in range(old)
    ]
    return [(q, low - q * a, high - q * a) for q, low, high in ranges if low < high]


def _floor(n: int, old: int, new: int, r: int) -> list[tuple[int, int, int]]:
    a = max(1, n // old)
    b = max(1, n // new)
    ranges = [(q, max(r * b, q * a), min((r + 1) * b, (q + 1) * a)) for q in range(old)]
    return [(q, low - q * a, high - q * a) for q, low, high in ranges if low < high]
