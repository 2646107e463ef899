"""Wrong answers to the exercises of 05-parallelism/07-hybrid, each with the diagnosis
that it must get.
"""

import torch

from llmlab.parallelism.hybrid.placement import Placement
from tests.checks.rejecting import Wrong, rejects


def first_is_innermost(rank, sizes):
    found = {}
    for axis, n in sizes.items():
        rank, found[axis] = divmod(rank, n)
    return found


def in_another_order(rank, sizes):
    return dict(reversed(Placement(sizes).coordinates(rank).items()))


def never_divided(rank, sizes):
    return {axis: rank % n for axis, n in sizes.items()}


def as_a_list(rank, sizes):
    return list(Placement(sizes).coordinates(rank).values())


COORDINATES = [
    Wrong("coordinates", first_is_innermost, "the last axis is innermost"),
    Wrong("coordinates", in_another_order, "in the order of sizes"),
    Wrong("coordinates", never_divided, "as digits"),
    Wrong("coordinates", as_a_list, "dict"),
]


def right_group(rank, axis, sizes):
    return next(list(g) for g in Placement(sizes).groups(axis) if rank in g)


def always_neighbours(rank, axis, sizes):
    n = sizes[axis]
    return [rank // n * n + i for i in range(n)]


def without_itself(rank, axis, sizes):
    return [r for r in right_group(rank, axis, sizes) if r != rank]


def outermost_last(rank, axis, sizes):
    return right_group(rank, axis, dict(reversed(sizes.items())))


def backwards(rank, axis, sizes):
    return right_group(rank, axis, sizes)[::-1]


def from_here_on(rank, axis, sizes):
    stride = Placement(sizes).stride(axis)
    return [rank + i * stride for i in range(sizes[axis])]


GROUP = [
    Wrong("group", always_neighbours, "apart, not 1"),
    Wrong("group", without_itself, "belongs to its group"),
    Wrong("group", outermost_last, "the last axis is innermost"),
    Wrong("group", backwards, "increasing order"),
    Wrong("group", from_here_on, "are right"),
]


def squares(gradients, copies, power=1):
    return sum(
        (g.square().sum() / copies[n] ** power for n, g in gradients.items()),
        torch.zeros(()),
    )


def copies_ignored(comm, gradients, copies):
    return comm.all_reduce(squares(gradients, copies, 0)).sqrt()


def norms_added(comm, gradients, copies):
    return comm.all_reduce(squares(gradients, copies).sqrt())


def no_root(comm, gradients, copies):
    return comm.all_reduce(squares(gradients, copies))


def mean(comm, gradients, copies):
    return comm.all_reduce(squares(gradients, copies), op="mean").sqrt()


def norm_divided(comm, gradients, copies):
    return comm.all_reduce(squares(gradients, copies, 2)).sqrt()


def alone(comm, gradients, copies):
    return squares(gradients, copies, 0).sqrt()


def only_some_talk(comm, gradients, copies):
    return (
        comm.all_reduce(squares(gradients, copies)).sqrt()
        if gradients
        else torch.zeros(())
    )


def gathers_everything(comm, gradients, copies):
    flat = torch.cat(
        [(g / copies[n] ** 0.5).flatten() for n, g in gradients.items()]
        or [torch.zeros(0)]
    )
    return comm.all_gather(flat).norm()


NORM = [
    Wrong("global_norm", copies_ignored, "divide its square by its copies"),
    Wrong("global_norm", norms_added, "norms do not add up"),
    Wrong("global_norm", no_root, "the root is missing"),
    Wrong("global_norm", mean, "mean over ranks"),
    Wrong("global_norm", norm_divided, "not the norm"),
    Wrong("global_norm", alone, "alone"),
    Wrong("global_norm", only_some_talk, "do not fit together"),
    Wrong("global_norm", gathers_everything, "one number is enough"),
]


def overlaps(n, old, new, r, up=True, inside=True, empty=False, end=True):
    a, b = (-(-n // old), -(-n // new)) if up else (max(1, n // old), max(1, n // new))
    found = []
    for q in range(old):
        low, high = (
            max(r * b, q * a),
            min((r + 1) * b, (q + 1) * a, *([n] if end else [])),
        )
        if low < high or empty:
            found.append((q, low - q * a * inside, high - q * a * inside))
    return found


SOURCES = [
    Wrong(
        "sources",
        lambda n, o, w, r: overlaps(n, o, w, r, inside=False),
        "inside the old piece",
    ),
    Wrong(
        "sources",
        lambda n, o, w, r: overlaps(n, o, w, r, empty=True),
        "leave out what is empty",
    ),
    Wrong(
        "sources",
        lambda n, o, w, r: overlaps(n, o, w, r, end=False),
        "before its full length",
    ),
    Wrong("sources", lambda n, o, w, r: overlaps(n, o, w, r)[::-1], "another order"),
    Wrong("sources", lambda n, o, w, r: overlaps(n, w, o, r % o), "swapped"),
    Wrong(
        "sources",
        lambda n, o, w, r: overlaps(n, o, w, r, up=False, end=False),
        "rounded up",
    ),
    Wrong(
        "sources",
        lambda n, o, w, r: [(q, 0, -(-n // o)) for q in range(o)],
        "the new piece is",
    ),
]

test_wrong_answers = rejects(
    "05-parallelism/07-hybrid", COORDINATES + GROUP + NORM + SOURCES
)
