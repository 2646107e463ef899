"""Checks of 06-compression/15-compression-compared."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import compression_compared as compared
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.models import course_model, language_model, real_model

check = Checks("06-compression/15-compression-compared")

# 1 ------------------------------------------------------------------------------------


def bits(
    shapes,
    code,
    group,
    embedding,
    *,
    scale=16,
    groups=lambda rows, columns, size: rows * math.ceil(columns / size),
    over=lambda linears, embedding: linears + embedding,
    floats=16,
) -> float:
    """Stored bits per parameter, and what comes out with one thing changed."""
    weights = sum(rows * columns for rows, columns in shapes)
    total = floats * embedding
    for rows, columns in shapes:
        size = columns if group is None else group
        total += code * rows * columns + scale * groups(rows, columns, size)
    return total / over(weights, embedding)


def draw_shapes() -> tuple:
    """Matrices whose rows no group divides."""
    sizes = torch.randint(3, 9, (3,)).tolist()
    shapes = [(sizes[0], 13), (7, 8 * sizes[1]), (5, 10 + sizes[2])]
    return shapes, 3, 8, 20 * sizes[0] + 9


def wrong_bits(shapes, code, group, embedding) -> dict:
    """What usual mistakes make of it."""
    args = (shapes, code, group, embedding)
    weights = sum(m * n for m, n in shapes)
    right = bits(*args)
    return {
        "the scales are missing: 16 bits for each group": bits(*args, scale=0),
        "a scale has 16 bits, not 32": bits(*args, scale=32),
        "a scale has 16 bits: 2 are its bytes": bits(*args, scale=2),
        "this is one scale for each weight": bits(
            *args, groups=lambda m, n, size: m * n
        ),
        "this is one scale for each row: a row has several groups": bits(
            *args, groups=lambda m, n, size: m
        ),
        "this is one scale for each matrix": bits(*args, groups=lambda m, n, size: 1),
        "the last group of a row may be shorter, and has a scale, too: round up": bits(
            *args, groups=lambda m, n, size: m * (n // size)
        ),
        "a group does not go on in the next row: round up in each row": bits(
            *args, groups=lambda m, n, size: math.ceil(m * n / size)
        ),
        "groups are fractions here: a shorter last group still has a whole scale": bits(
            *args, groups=lambda m, n, size: m * n / size
        ),
        "groups lie along a row: it is the columns that are cut": bits(
            *args, groups=lambda m, n, size: n * math.ceil(m / size)
        ),
        "the embedding is missing in the bits": bits(*args, floats=0),
        "the embedding is in 16 bits, not 32": bits(*args, floats=32),
        "the embedding stays in 16 bits: it gets no codes": bits(*args, floats=code),
        "the embedding's numbers are parameters, too: divide by all of them": bits(
            *args, over=lambda linears, embedding: linears
        ),
        "the embedding is missing": bits(
            *args, floats=0, over=lambda linears, embedding: linears
        ),
        "these are all the bits: divide by the number of parameters": right
        * (weights + embedding),
        "these are bytes per parameter: 8 bits a byte": right / 8,
        "a plain mean over the matrices: a larger one counts for more": alike(*args),
    }


def alike(shapes, code, group, embedding) -> float:
    """With the bits per weight of each matrix counted alike."""
    each = [bits([shape], code, group, 0) for shape in shapes]
    weights = sum(rows * columns for rows, columns in shapes)
    of_all = sum(each) / len(each) * weights
    return (of_all + 16 * embedding) / (weights + embedding)


def wrong_without_groups(shapes, code, embedding) -> dict:
    """What usual mistakes make of group=None."""
    args = (shapes, code, None, embedding)
    return {
        "with group=None each row has one scale, and here it has none": bits(
            *args, scale=0
        ),
        "group=None is one scale for each row, not for each matrix": bits(
            *args, groups=lambda m, n, size: 1
        ),
        "group=None is one scale for each row, not for each weight": bits(
            *args, groups=lambda m, n, size: m * n
        ),
        "group=None is one scale for each row, not for each column": bits(
            *args, groups=lambda m, n, size: n
        ),
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Add up all bits first: codes, scales, embedding. Divide at the end, once.",
        "A row of n columns has ⌈n / group⌉ groups; with `group=None` it has one.",
        (
            "`bits * m * n + 16 * m * math.ceil(n / group)` for each matrix, and"
            " `16 * embedding`."
        ),
    ),
)
def bits_per_parameter(answer):
    """The bits that a whole model stores for each of its parameters."""
    case = telling(draw_shapes, bits, wrong_bits)
    what = "bits_per_parameter(shapes, 3, 8, …)"
    got = float(expect(answer(*case), kind=(int, float), what=what))
    diagnose(got, right=bits(*case), mistakes=wrong_bits(*case), tol=1e-6, what=what)
    case = ([(4, 64), (2, 128)], 4, None, 100)
    what = "bits_per_parameter([(4, 64), (2, 128)], 4, None, 100)"
    got = float(expect(answer(*case), kind=(int, float), what=what))
    mistakes = wrong_without_groups(case[0], case[1], case[3])
    diagnose(got, right=bits(*case), mistakes=mistakes, tol=1e-6, what=what)
    for case in (
        ([(3, 64)], 8, 64, 0),
        ([(6, 10)], 2, 64, 7),
    ):
        if not close(float(answer(*case)), bits(*case), tol=1e-6):
            raise Mistake(
                f"right for one case, wrong for shapes={case[0]}, bits={case[1]},"
                f" group={case[2]}, embedding={case[3]}: with None a row is one group,"
                " and a group may be longer than a row"
            )


# 2 ------------------------------------------------------------------------------------

TEXTS = ("“Nous voilà”, said the naïve café owner — twice.", "Ωραία! Добро.")


def draw_losses() -> tuple:
    """Of two models, on a text with long characters."""
    floats = 3 + torch.rand(30).double() * 4
    return floats + 0.3 + 0.5 * torch.randn(30).double(), floats, TEXTS[0]


def change(losses: Tensor, floats: Tensor, text: str) -> Tensor:
    """(by how much bits per byte grew, its standard error)."""
    scale = len(losses) / math.log(2) / len(text.encode())
    grown = losses - floats
    return torch.stack([grown.mean(), grown.std() / len(grown) ** 0.5]) * scale


def wrong_changes(losses, floats, text) -> dict:
    """What usual mistakes make of it."""
    right = change(losses, floats, text)
    grown, n = losses - floats, len(losses)
    both = (losses.var() + floats.var()).sqrt()
    size = len(text.encode())
    error = grown.std() / n**0.5
    flip = torch.tensor([-1.0, 1.0]).double()
    one = torch.tensor([1.0, 0.0]).double()

    def with_error(factor) -> Tensor:
        return torch.stack([right[0], right[1] * factor])

    return {
        "these are nats: a nat is 1 / ln 2 bits": right * math.log(2),
        "you multiplied by ln 2: divide by it": right * math.log(2) ** 2,
        "this is per character: in UTF-8 some characters are several bytes": right
        * (len(text.encode()) / len(text)),
        "this is per token: multiply by the tokens, divide by the bytes": right
        * (len(text.encode()) / n),
        "this is for the whole text: divide by its bytes": right * len(text.encode()),
        "the number of tokens is missing: all bits over all bytes is asked": right / n,
        "the sign: positive means that the compressed model is worse": right * flip,
        "the error is that of two texts: the same tokens were judged twice, so take"
        " the differences token by token": with_error(both / grown.std()),
        "this is the standard deviation: the error of a mean is smaller by √n": (
            with_error(n**0.5)
        ),
        "the error of a mean is the deviation over √n, not over n": with_error(
            1 / n**0.5
        ),
        "this is the variance over n: take its root": with_error(
            grown.var() / n / error
        ),
        "these are two standard errors: one is asked": with_error(2.0),
        "the error is still that of a mean in nats per token: scale it as the mean": (
            torch.stack([right[0], error])
        ),
        "the error is that of the compressed model's own losses: take differences": (
            with_error(losses.std() / grown.std())
        ),
        "the first number is the compressed model's own: take differences": (
            torch.stack([right[0] * losses.mean() / grown.mean(), right[1]])
        ),
        "the error is missing": right * one,
        "the error is still that of a mean, in bits per token: scale it as the mean": (
            with_error(size / n)
        ),
        "the error is divided by √bytes: the sample is of tokens": with_error(
            (size / n) ** 0.5
        ),
        "the error of the mean is divided by the bytes, and by the tokens once too"
        " often: scale it as the mean": with_error(1 / n),
        "the deviation of a sample divides by n − 1, not by n": with_error(
            ((n - 1) / n) ** 0.5
        ),
        "differences have signs: where the compressed model is better they count"
        " against": change(grown.abs(), 0 * grown, text),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        "Both models read the same tokens: look at `losses - floats`, token by token.",
        (
            "Mean, and `.std()` over √n. Then both times the same factor, from nats per"
            " token to bits per byte."
        ),
        "The factor is n / ln 2 / `len(text.encode())`.",
    ),
)
def grown(answer):
    """By how many bits per byte a compressed model is worse, and how sure that is."""
    case = telling(draw_losses, change, wrong_changes)
    what = "grown(losses, floats, text)"
    value = expect(answer(*case), kind=(tuple, list), what=what)
    got = pair_of(value)
    diagnose(
        got, right=change(*case), mistakes=wrong_changes(*case), tol=1e-6, what=what
    )
    losses, floats = torch.rand(7).double() * 5, torch.rand(7).double() * 5
    got = pair_of(answer(losses, floats, TEXTS[1]))
    if not close(got, change(losses, floats, TEXTS[1]), tol=1e-6):
        raise Mistake(
            "right for 30 tokens, wrong for 7 of another text: the sample deviation"
            " divides by n − 1, and bytes are those of the text given"
        )


def pair_of(value) -> Tensor:
    """Two numbers as a tensor."""
    if len(value) != 2:
        raise Mistake(f"two numbers are asked, and these are {len(value)}")
    numbers = []
    for v, name in zip(value, ("the growth", "its standard error"), strict=True):
        v = v.item() if isinstance(v, Tensor) and v.dim() == 0 else v
        numbers.append(float(expect(v, kind=float, what=name)))
    return torch.tensor(numbers, dtype=torch.float64)


# 3 ------------------------------------------------------------------------------------


def draw_points() -> tuple:
    """With ties, and two points twice."""
    points = torch.randint(-3, 4, (16, 3)).float()
    best = points[compared.pareto(points, [1])]
    points = torch.cat([points, best[:2]])
    return points[torch.randperm(len(points))], [1]


def signed(points: Tensor, larger) -> Tensor:
    """Less is better in all coordinates."""
    sign = torch.ones(points.shape[1])
    sign[list(larger)] = -1
    return points * sign


def wrong_fronts(points: Tensor, larger) -> dict:
    """What usual mistakes make of the front."""
    x = signed(points, larger)
    n = len(x)
    no_worse = (x[:, None] <= x).all(-1)
    strictly = (x[:, None] < x).all(-1)
    better = (x[:, None] < x).any(-1)
    return {
        "`larger` is not looked at: there more is better": compared.pareto(points),
        "one strict comparison is enough to dominate: equal in the others will do": (
            ~strictly.any(0)
        ),
        "equal points do not dominate each other": ~(
            no_worse & ~torch.eye(n, dtype=torch.bool)
        ).any(0),
        "these are the dominated ones: return the others": (no_worse & better).any(0),
        "these dominate nobody: the two axes of the table of pairs are swapped, or the"
        " signs are turned the wrong way": ~(no_worse & better).any(1),
        "only the first two coordinates are compared": compared.pareto(x[:, :2]),
        "the last coordinate alone decides": x[:, -1] == x[:, -1].min(),
        "the sum decides: the coordinates have no common unit": (
            x.sum(-1) == x.sum(-1).min()
        ),
        "only the best of each coordinate are kept: the front has more": (
            (x == x.amin(0)).any(-1)
        ),
        "each is compared with its neighbour alone: any other may dominate it": (
            after_neighbour(no_worse & better)
        ),
        "1 / x turns numbers of one sign around, and these have both": compared.pareto(
            reciprocal(points, larger)
        ),
        "one sweep along the first coordinate looks at it and the last alone: the front"
        " has more": one_sweep(x),
        "all are kept": torch.ones(n, dtype=torch.bool),
        "none is kept: better somewhere is not enough, it must be no worse everywhere;"
        " and no point dominates itself": torch.zeros(n, dtype=torch.bool),
    }


def after_neighbour(dominates: Tensor) -> Tensor:
    """Kept are those that the row before them does not dominate."""
    kept = torch.ones(len(dominates), dtype=torch.bool)
    kept[1:] = ~dominates.diagonal(1)
    return kept


def one_sweep(x: Tensor) -> Tensor:
    """In the order of the first coordinate, kept where the last one falls."""
    kept, least = torch.zeros(len(x), dtype=torch.bool), math.inf
    for i in x[:, 0].argsort(stable=True).tolist():
        if x[i, -1] < least:
            kept[i], least = True, x[i, -1].item()
    return kept


def reciprocal(points: Tensor, larger) -> Tensor:
    """1 / x in the columns of which more is better."""
    x = points.clone()
    x[:, larger] = 1 / x[:, larger]
    return x


def draw_two() -> tuple:
    """Two coordinates, in both of which more is better."""
    return torch.randint(-2, 3, (9, 2)).float(), [0, 1]


def wrong_twos(points: Tensor, larger) -> dict:
    """What comes out when not all of `larger` is looked at."""
    return {
        "`larger` has two columns here, and only the first is turned around": (
            compared.pareto(points, larger[:1])
        ),
        "`larger` has two columns here, and only the last is turned around": (
            compared.pareto(points, larger[-1:])
        ),
        "`larger` has two columns here, and neither is turned around": (
            compared.pareto(points)
        ),
    }


def judge_front(got: Tensor, points: Tensor, larger, mistakes: dict, what: str):
    """A foreseen mistake, or a row that is wrongly kept or dropped."""
    right = compared.pareto(points, larger)
    if any(torch.equal(got, value) for value in mistakes.values()):
        diagnose(got, right=right, mistakes=mistakes, what=what)
    for i in (got != right).nonzero()[:1, 0].tolist():
        row = points[i].tolist()
        text = f"{what} drops row {i}, {row}, which no other dominates"
        if got[i]:
            x = signed(points, larger)
            j = int(((x <= x[i]).all(-1) & (x < x[i]).any(-1)).int().argmax())
            text = f"{what} keeps row {i}, {row}, which {points[j].tolist()} dominates"
        raise Mistake(text, foreseen=False)


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "First turn the coordinates of `larger` around, so that less is better in all.",
        (
            "`x[:, None] <= x` is (n, n, k): is i no worse than j, for each coordinate?"
            " `.all(-1)` asks for all of them, `.any(-1)` for one."
        ),
        "`~((x[:, None] <= x).all(-1) & (x[:, None] < x).any(-1)).any(0)`.",
    ),
)
def front(answer):
    """The methods that none dominates, in any number of coordinates."""
    points, larger = telling(draw_points, compared.pareto, wrong_fronts)
    what = "front(points, [1])"
    value = answer(points, larger)
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        raise Mistake("these are places: return True or False for each method")
    got = expect(value, shape=(len(points),), dtype=torch.bool, what=what)
    judge_front(got, points, larger, wrong_fronts(points, larger), what)
    points, larger = telling(draw_two, compared.pareto, wrong_twos)
    what = "front(points, [0, 1])"
    got = expect(answer(points, larger), shape=(9,), dtype=torch.bool, what=what)
    judge_front(got, points, larger, wrong_twos(points, larger), what)
    for k, larger in ((1, []), (4, [0, 3])):
        points = torch.randint(-1, 2, (9, k)).float()
        what = f"front(points, {larger}), of {k} coordinates,"
        got = expect(answer(points, larger), shape=(9,), dtype=torch.bool, what=what)
        judge_front(got, points, larger, {}, what)


# 4 ------------------------------------------------------------------------------------


def rate(
    linears,
    table,
    vocabulary,
    tied,
    cache,
    past,
    bandwidth,
    fixed,
    *,
    read=lambda table, vocabulary, tied: table if tied else table + table / vocabulary,
    cached=lambda cache, past: cache * past,
    time=lambda traffic, bandwidth, fixed: traffic / bandwidth + fixed,
) -> float:
    """Tokens per second, and what comes out with one thing changed."""
    traffic = linears + read(table, vocabulary, tied) + cached(cache, past)
    return 1 / time(traffic, bandwidth, fixed)


def draw_machine(tied: bool = False) -> tuple:
    """All terms of a like size."""
    u = (1 + torch.rand(6)).tolist()
    return (
        50e6 * u[0],
        20e6 * u[1],
        5 + int(4 * u[2]),
        tied,
        2e6 * u[3],
        30,
        10e9 * u[4],
        0.012 * u[5],
    )


def wrong_rates(*args) -> dict:
    """What usual mistakes make of it."""
    fixed = args[-1]
    right = rate(*args)
    return {
        "these are seconds per token: the inverse is asked": 1 / right,
        "the fixed time is missing, or added to bytes: seconds are added to seconds": (
            rate(*args, time=lambda q, b, t: q / b)
        ),
        "brackets: bytes over bandwidth and the fixed time are added before 1 / …": (
            rate(*args, time=lambda q, b, t: q) / args[-2] + fixed
        ),
        "`past` tokens are read, not one more": rate(
            *args, cached=lambda c, p: c * (p + 1)
        ),
        "the fixed time is taken off: it comes on top": rate(
            *args, time=lambda q, b, t: q / b - t
        ),
        "the slower of the two is not asked: reading and the fixed time add up": rate(
            *args, time=lambda q, b, t: max(q / b, t)
        ),
        "rates do not add up: times do": rate(*args, time=lambda q, b, t: q / b)
        + 1 / fixed,
        "bandwidth is in bytes, and so is all else: no factor of 8": rate(
            *args, time=lambda q, b, t: 8 * q / b + t
        ),
        "the cache is missing": rate(*args, cached=lambda c, p: 0),
        "`cache` is for one token: times `past`": rate(*args, cached=lambda c, p: c),
        "keys and values are both in `cache` already: no factor of 2": rate(
            *args, cached=lambda c, p: 2 * c * p
        ),
        "the head is missing: all of it is read for each token": rate(
            *args, read=lambda t, v, tied: t / v
        ),
        "untied, two tables are held, but of the embedding one row is read": rate(
            *args, read=lambda t, v, tied: 2 * t
        ),
        "the row of the embedding is missing: untied, it is read beside the head": rate(
            *args, read=lambda t, v, tied: t
        ),
        "neither table is counted": rate(*args, read=lambda t, v, tied: 0),
        "the linears are missing": rate(0.0, *args[1:]),
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "Three things are read: linears, tables, cache. Then bytes over bandwidth.",
        (
            "The head is multiplied by every token: all of it. An embedding is looked"
            " up: table / vocabulary. Tied, that row is in the head."
        ),
        "`1 / (traffic / bandwidth + fixed)`.",
    ),
)
def tokens_per_second(answer):
    """How fast the memory lets a model decode."""
    case = telling(draw_machine, rate, wrong_rates)
    what = "tokens_per_second(…, tied=False, …)"
    got = float(expect(answer(*case), kind=(int, float), what=what))
    tied_case = draw_machine(tied=True)
    both = rate(*tied_case, read=lambda t, v, tied: t + t / v)
    no_row = close(got, rate(*case, read=lambda t, v, tied: t), tol=1e-7)
    if no_row and close(float(answer(*tied_case)), both, tol=1e-7):
        raise Mistake("tied and untied are the wrong way round")
    less = rate(*case, time=lambda q, b, t: q / b) - case[-1]
    if close(got, less, tol=1e-7):
        raise Mistake("seconds are taken off a rate: add them to seconds, then invert")
    diagnose(got, right=rate(*case), mistakes=wrong_rates(*case), tol=1e-7, what=what)
    case = tied_case
    got = float(answer(*case))
    what = "tokens_per_second(…, tied=True, …)"
    mistakes = {
        "tied, the row of the embedding is one of the head's: it counts once": both,
        "tied, the table is read once": rate(*case, read=lambda t, v, tied: 2 * t),
        "tied, the whole table is read, as the head": rate(
            *case, read=lambda t, v, tied: t / v
        ),
    }
    diagnose(got, right=rate(*case), mistakes=mistakes, tol=1e-7, what=what)
    first = (*case[:5], 0, case[6], 0.0)
    if not close(float(answer(*first)), rate(*first), tol=1e-7):
        raise Mistake("right with a cache, wrong for the first token: past=0, fixed=0")


# 5: the part's challenge --------------------------------------------------------------

BUDGET = 87.0  # MB, of 1e6 bytes
LIMIT = 3.83  # nats per token
JUDGED = 256  # tokens
Plan = tuple[tuple[str, QuantConfig], ...]  # what a cache can keep


@cache
def judge():
    """The real model, and the text that it is judged by."""
    model = real_model.load()
    text = course_model.corpus("addresses", "valid")[:6000]
    ids = torch.tensor(real_model.load_tokenizer().encode(text).ids)
    return model, ids[: JUDGED + 1]


def megabytes(plan: Plan) -> float:
    """What the model holds with floats in 16 bits; nothing is compressed for it."""
    model, _ = judge()
    return compared.planned_bytes(model, dict(plan), torch.float16) / 1e6


@cache
def loss_of(plan: Plan) -> float:
    """The loss of the model on the text, rounded by the plan."""
    model, ids = judge()
    rounded = compared.rounded(model, dict(plan))
    losses = language_model.token_losses(rounded, ids, context=256)
    return losses.double().mean().item()


def matrices() -> dict[str, tuple[int, int]]:
    """Name → (out, in) of every matrix of the real model, the embedding first."""
    model, _ = judge()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            found[name.removesuffix(".weight")] = tuple(parameter.shape)
    return found


def checked(plan, names: dict) -> Plan:
    """The plan as the check follows it; or what is wrong with it."""
    if not isinstance(plan, dict):
        raise Mistake(
            f"return a dict from names to QuantConfig, not a {type(plan).__name__}: the"
            " check compresses the model itself"
        )
    found = []
    for name, grid in plan.items():
        if name == "lm_head":
            raise Mistake(
                "lm_head is the embedding in this model: its name is"
                " model.embed_tokens, and it counts once"
            )
        if name not in names:
            raise Mistake(f"{name!r} is no matrix of the model: take names from shapes")
        if type(grid) is not QuantConfig:
            raise Mistake(f"{name}: its value must be a QuantConfig, not {grid!r}")
        found.append((name, replace(grid)))  # validated anew
    return tuple(sorted(found, key=lambda item: item[0]))


def costly(plan: dict[str, QuantConfig], left: float) -> str:
    """What in a plan is likely to cost loss, or else that `left` MB are not used."""
    table = plan.get("model.embed_tokens")
    coarse = sum(grid.per == "tensor" for grid in plan.values())
    if coarse:
        return f" (matrices with one scale for all their numbers: {coarse})"
    if table is not None and table.bits <= 4:
        return f" (the embedding has {table.bits} bits, and it is the head, too)"
    return f" (and {left:.1f} MB are left to spend)" if left >= 0.1 else ""


@check.exercise(
    points=6,
    minutes=40,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Count before you compress. Which part of the model takes most when the"
            " linears have 4 bits? It need not stay in 16."
        ),
        (
            "Not all matrices are equally large, nor equally sensitive. Those of the"
            " attention are a quarter of the linears: what do they cost at 6 bits?"
        ),
        (
            "4 bits do better with a zero point (`symmetric=False`). The embedding"
            " hardly suffers at 6 bits, and much at 4."
        ),
    ),
)
def mix(answer, *, budget=BUDGET, limit=LIMIT):
    """A model within 87 MB whose loss is at most 3.83."""
    names = matrices()
    plan = checked(answer(dict(names)), names)
    try:
        size = megabytes(plan)
        if not size <= budget:
            raise Mistake(too_large(dict(plan), names, size, budget))
        loss = loss_of(plan)
    except ValueError as problem:
        raise Mistake(f"this plan cannot be followed: {problem}") from None
    if not loss <= limit:
        note = costly(dict(plan), budget - size)
        raise Mistake(
            f"your plan takes {size:.1f} MB (at most {budget:.0f}) and has a loss of"
            f" {loss:.3f} (at most {limit:.2f}): a loss that is {loss - limit:.3f} too"
            f" high{note}"
        )


def too_large(plan: dict[str, QuantConfig], names: dict, size: float, budget: float):
    """A plan over the budget in words; its loss is not looked at."""
    note = ""
    if "model.embed_tokens" not in plan:
        rows, columns = names["model.embed_tokens"]
        note = f" (the embedding alone takes {2 * rows * columns / 1e6:.1f} MB)"
    return (
        f"your plan takes {size:.1f} MB (at most {budget:.0f}):"
        f" {size - budget:.1f} MB too much{note}"
    )
