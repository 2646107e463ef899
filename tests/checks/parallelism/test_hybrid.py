"""Wrong answers to the exercises of 05-parallelism/07-hybrid, each with the diagnosis
that it must get.
"""

import math

import pytest
import torch

from llmlab.checks.parallelism.hybrid import check
from llmlab.parallelism.hybrid.placement import Placement
from tests.checks.rejecting import Wrong, rejects, verdict


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
    Wrong("coordinates", never_divided, "divide the rank by their"),
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
    Wrong("group", always_neighbours, "not 1"),
    Wrong("group", without_itself, "belongs to its group"),
    Wrong("group", outermost_last, "the last axis is innermost"),
    Wrong("group", backwards, "increasing order"),
    Wrong("group", from_here_on, "not with the rank"),
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
    Wrong("global_norm", only_some_talk, "takes part as well"),
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


def by_strides(rank, sizes, of):
    found, stride = {}, 1
    for axis, n in reversed(sizes.items()):
        found[axis] = of(rank, stride, n)
        stride *= n
    return {axis: found[axis] for axis in sizes}


def without_modulo(rank, sizes):
    return by_strides(rank, sizes, lambda rank, stride, n: rank // stride)


def without_division(rank, sizes):
    return by_strides(rank, sizes, lambda rank, stride, n: rank % n)


def own_size_divided_too(rank, sizes):
    return by_strides(rank, sizes, lambda rank, stride, n: rank // (stride * n) % n)


def counted_from_one(rank, sizes):
    return by_strides(rank, sizes, lambda rank, stride, n: rank // stride % n + 1)


def real_numbers(rank, sizes):
    return by_strides(rank, sizes, lambda rank, stride, n: float(rank // stride % n))


def three_axes(rank, sizes):
    found = by_strides(rank, sizes, lambda rank, stride, n: rank // stride % n)
    return dict(list(found.items())[:3])


def known_names(rank, sizes):
    order = [axis for axis in ("pp", "dp", "tp") if axis in sizes]
    inside = {axis: sizes[axis] for axis in order}
    found = by_strides(rank, inside, lambda rank, stride, n: rank // stride % n)
    return {axis: found.get(axis, 0) for axis in sizes}


def sizes_overwritten(rank, sizes):
    found = by_strides(rank, sizes, lambda rank, stride, n: rank // stride % n)
    sizes.update(found)
    return found


def products_of_slices(rank, sizes):
    """Right: the stride is the product of the sizes behind."""
    n = list(sizes.values())
    return {axis: rank // math.prod(n[i + 1 :]) % n[i] for i, axis in enumerate(sizes)}


def members(rank, axis, sizes):
    own = products_of_slices(rank, sizes)
    devices = range(math.prod(sizes.values()))
    return [
        r for r in devices if products_of_slices(r, sizes) | {axis: own[axis]} == own
    ]


def shares_the_axis(rank, axis, sizes):
    own = products_of_slices(rank, sizes)[axis]
    devices = range(math.prod(sizes.values()))
    return [r for r in devices if products_of_slices(r, sizes)[axis] == own]


def outermost_stride(rank, axis, sizes):
    devices = math.prod(sizes.values())
    stride = devices // sizes[axis]
    return list(range(rank % stride, devices, stride))


def group_of_device_0(rank, axis, sizes):
    return members(0, axis, sizes)


def strided(rank, axis, sizes, first):
    n = list(sizes.values())
    stride = math.prod(n[list(sizes).index(axis) + 1 :])
    return [first(rank, stride) + i * stride for i in range(sizes[axis])]


def outer_axes_forgotten(rank, axis, sizes):
    return strided(rank, axis, sizes, lambda rank, stride: rank % stride)


def from_the_rank_on(rank, axis, sizes):
    return strided(rank, axis, sizes, lambda rank, stride: rank)


def coordinates_not_devices(rank, axis, sizes):
    return list(range(sizes[axis]))


def all_devices(rank, axis, sizes):
    return list(range(math.prod(sizes.values())))


def squares_of(gradients, copies, of=lambda square, c: square / c):
    squares = [of(g.square().sum(), copies[k]) for k, g in gradients.items()]
    return sum(squares, torch.zeros(()))


def times_the_copies(comm, gradients, copies):
    return comm.all_reduce(squares_of(gradients, copies, lambda s, c: s * c)).sqrt()


def largest_rank(comm, gradients, copies):
    return comm.all_reduce(squares_of(gradients, copies), "max").sqrt()


def this_rank_alone(comm, gradients, copies):
    return squares_of(gradients, copies).sqrt()


def all_ranks_are_copies(comm, gradients, copies):
    def share(square, c):
        return square / comm.size if c > 1 else square

    return comm.all_reduce(squares_of(gradients, copies, share)).sqrt()


def absolute_values(comm, gradients, copies):
    own = [g.abs().sum() / copies[k] for k, g in gradients.items()]
    return comm.all_reduce(sum(own, torch.zeros(())))


def norms_of_tensors_added(comm, gradients, copies):
    own = [g.norm() / copies[k] for k, g in gradients.items()]
    return comm.all_reduce(sum(own, torch.zeros(())).square()).sqrt()


def stays_away(comm, gradients, copies):
    if not gradients:
        return torch.zeros(())
    return comm.all_reduce(squares_of(gradients, copies)).sqrt()


def in_float64(comm, gradients, copies):
    """Right: plain numbers, added in float64."""
    own = sum(float(g.norm()) ** 2 / copies[k] for k, g in gradients.items())
    return comm.all_reduce(torch.tensor(own, dtype=torch.float64)).sqrt()


def rounded_up(n, p):
    length = math.ceil(n / p)
    return [(min(n, i * length), min(n, (i + 1) * length)) for i in range(p)]


def inside(low, high, a, c, d):
    return low - c, high - c


def parts(n, old, new, r, cut=rounded_up, form=inside):
    a, b = cut(n, new)[r]
    found = []
    for q, (c, d) in enumerate(cut(n, old)):
        low, high = max(a, c), min(b, d)
        if low < high:
            found.append((q, *form(low, high, a, c, d)))
    return found


def in_the_new_piece(*args):
    return parts(*args, form=lambda low, high, a, *_: (low - a, high - a))


def last_ones(*args):
    return parts(*args, form=lambda low, high, a, c, d: (low - c, high - c - 1))


def lengths(*args):
    return parts(*args, form=lambda low, high, a, c, d: (low - c, high - low))


def whole_pieces(*args):
    return parts(*args, form=lambda low, high, a, c, d: (0, d - c))


def rest_in_the_last(*args):
    def cut(n, p):
        return [
            (i * (n // p), (i + 1) * (n // p) if i < p - 1 else n) for i in range(p)
        ]

    return parts(*args, cut=cut)


def evenly(*args):
    def cut(n, p):
        ends = [(i + 1) * (n // p) + min(i + 1, n % p) for i in range(p)]
        return list(zip([0, *ends], ends, strict=False))

    return parts(*args, cut=cut)


def to_the_nearest(*args):
    def cut(n, p):
        return [(round(i * n / p), round((i + 1) * n / p)) for i in range(p)]

    return parts(*args, cut=cut)


def first_piece_only(*args):
    return parts(*args)[:1]


def step_by_step(n, old, new, r):
    """Right: from one border to the next; pairs of lists will do."""
    length = -(-n // old)
    at, end = (min(n, (r + i) * -(-n // new)) for i in (0, 1))
    found = []
    while at < end:
        q = at // length
        stop = min(end, (q + 1) * length)
        found.append([q, at - q * length, stop - q * length])
        at = stop
    return found


def one_too_many(rank, axis, sizes):
    found = members(rank, axis, sizes)
    return [*found, found[-1] + found[1] - found[0]]


def whole_norm_divided(comm, gradients, copies):
    total = comm.all_reduce(squares_of(gradients, copies, lambda s, c: s))
    return total.sqrt() / max(copies.values())


def mean_of_norms(comm, gradients, copies):
    return comm.all_reduce(squares_of(gradients, copies).sqrt(), "mean")


MORE = [
    Wrong("coordinates", without_modulo, "modulo the size"),
    Wrong("coordinates", without_division, "divide the rank by their"),
    Wrong("coordinates", own_size_divided_too, "own size"),
    Wrong("coordinates", counted_from_one, "begin with 0"),
    Wrong("coordinates", real_numbers, "holds floats"),
    Wrong("coordinates", three_axes, "all of them"),
    Wrong("coordinates", known_names, "whatever their names"),
    Wrong("coordinates", sizes_overwritten, "changes `sizes`"),
    Wrong("group", shares_the_axis, "share all the others"),
    Wrong("group", outermost_stride, "taken for the outermost"),
    Wrong("group", group_of_device_0, "group of device 0"),
    Wrong("group", outer_axes_forgotten, "rank % stride"),
    Wrong("group", from_the_rank_on, "not with the rank"),
    Wrong("group", coordinates_not_devices, "devices are asked"),
    Wrong("group", all_devices, "all devices"),
    Wrong("global_norm", times_the_copies, "multiplied by its copies"),
    Wrong("global_norm", largest_rank, "largest of the ranks"),
    Wrong("global_norm", this_rank_alone, "norm alone"),
    Wrong("global_norm", all_ranks_are_copies, "need not be as many"),
    Wrong("global_norm", absolute_values, "absolute values"),
    Wrong("global_norm", norms_of_tensors_added, "norms of tensors"),
    Wrong("global_norm", stays_away, "takes part as well"),
    Wrong("sources", in_the_new_piece, "in the new piece"),
    Wrong("sources", last_ones, "these are the last"),
    Wrong("sources", lengths, "these are lengths"),
    Wrong("sources", whole_pieces, "whole old pieces"),
    Wrong("sources", rest_in_the_last, "takes what is left"),
    Wrong("sources", evenly, "differ by one"),
    Wrong("sources", to_the_nearest, "to the nearest"),
    Wrong("sources", first_piece_only, "first old piece"),
    Wrong("group", one_too_many, "one device too many"),
    Wrong("global_norm", whole_norm_divided, "whole norm is divided"),
    Wrong("global_norm", mean_of_norms, "mean of the ranks' norms"),
]

test_wrong_answers = rejects(
    "05-parallelism/07-hybrid", COORDINATES + GROUP + NORM + SOURCES + MORE
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("coordinates", products_of_slices),
        ("group", members),
        ("global_norm", in_float64),
        ("sources", step_by_step),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
