"""Wrong answers to the exercises of 06-compression/15-compression-compared, each with
the diagnosis that it must get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from llmlab.checks.compression import compression_compared as checks
from llmlab.checks.compression.compression_compared import check, matrices
from llmlab.compression.quantization_basics import QuantConfig
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def counted(groups=None, scale=16, floats=16, over_all=True, times=1.0):
    """bits_per_parameter with something changed."""

    def answer(shapes, bits, group, embedding):
        total, weights = floats * embedding, 0
        for m, n in shapes:
            size = group or n
            here = m * math.ceil(n / size) if groups is None else groups(m, n, size)
            total += bits * m * n + scale * here
            weights += m * n
        return times * total / (weights + embedding * over_all)

    return answer


def bits_by_loops(shapes, bits, group, embedding):
    total = count = 0
    for m, n in shapes:
        for _ in range(m):
            total += sum(16 for _ in range(0, n, group or n)) + n * bits
            count += n
    return (total + embedding * 16) / (count + embedding)


def bits_with_minus(shapes, bits, group, embedding):
    groups = sum(m * -(-n // (group or n)) for m, n in shapes)
    weights = sum(m * n for m, n in shapes)
    stored = torch.tensor([bits * weights, 16 * groups, 16 * embedding])
    return stored.sum().item() / (weights + embedding)


def bits_in_float32(shapes, bits, group, embedding):
    total = torch.tensor(16 * embedding)
    for m, n in shapes:
        total += m * (n * bits + 16 * len(range(0, n, group or n)))
    return (total / (sum(m * n for m, n in shapes) + embedding)).item()


def none_is(groups):
    """bits_per_parameter with other groups where group is None."""

    def answer(shapes, bits, group, embedding):
        return counted(groups if group is None else None)(
            shapes, bits, group, embedding
        )

    return answer


def plain_mean(shapes, bits, group, embedding):
    each = [counted()([shape], bits, group, 0) for shape in shapes]
    weights = sum(m * n for m, n in shapes)
    total = weights * sum(each) / len(each) + 16 * embedding
    return total / (weights + embedding)


def group_needed(shapes, bits, group, embedding):
    return counted()(shapes, bits, group or 64, embedding)


# 2 ------------------------------------------------------------------------------------


UNIT = 1 / math.log(2)


def change(error=None, size=None, unit=UNIT, sign=1.0):
    """grown with something changed."""

    def answer(losses, floats, text):
        d = sign * (losses - floats)
        factor = unit * len(d) / (size or (lambda t: len(t.encode())))(text)
        spread = d.std() / len(d) ** 0.5 if error is None else error(losses, floats)
        return d.mean().item() * factor, float(spread) * factor

    return answer


def grown_in_a_loop(losses, floats, text):
    d = [
        (a - b) / math.log(2)
        for a, b in zip(losses.tolist(), floats.tolist(), strict=True)
    ]
    n, size = len(d), len(bytes(text, "utf-8"))
    mean = sum(d) / n
    variance = sum((x - mean) ** 2 for x in d) / (n - 1)
    return [sum(d) / size, math.sqrt(variance * n) / size]


def grown_in_base_two(losses, floats, text):
    bits = (losses.exp().log2() - floats.exp().log2()) / len(text.encode())
    return bits.sum().item(), (bits.var() * len(bits)).sqrt().item()


def per_token(a, b):
    """The error of the mean, in bits per token when it is scaled by n / bytes."""
    return (a - b).std() / len(a) ** 0.5


def error_per_token(losses, floats, text):
    mean, _ = change()(losses, floats, text)
    return mean, per_token(losses, floats).item() * UNIT


def error_over_bytes(losses, floats, text):
    mean, _ = change()(losses, floats, text)
    return mean, per_token(losses, floats).item() * UNIT / len(text.encode())


def root_of_bytes(losses, floats, text):
    mean, _ = change()(losses, floats, text)
    spread = (losses - floats).std().item()
    return mean, spread * UNIT / len(text.encode()) ** 0.5


def without_sign(losses, floats, text):
    d = (losses - floats).abs()
    return change()(d, 0 * d, text)


def grown_as_text(losses, floats, text):
    return tuple(str(v) for v in change()(losses, floats, text))


def grown_in_lists(losses, floats, text):
    return [[v] for v in change()(losses, floats, text)]


def grown_as_tensors(losses, floats, text):
    return [torch.tensor(v) for v in change()(losses, floats, text)]


def three_numbers(losses, floats, text):
    return (*change()(losses, floats, text), 0.0)


def whole_population(losses, floats, text):
    d = losses - floats
    return change(lambda a, b: d.std(correction=0) / len(d) ** 0.5)(
        losses, floats, text
    )


# 3 ------------------------------------------------------------------------------------


def fronts(rule, sign=-1.0):
    """front by a rule for (no worse everywhere, better somewhere, everywhere)."""

    def answer(points, larger):
        x = points.clone()
        x[:, larger] *= sign
        no_worse = (x[:, None] <= x).all(-1)
        better = x[:, None] < x
        return rule(no_worse, better.any(-1), better.all(-1))

    return answer


def front_by_loops(points, larger):
    rows = []
    for p in points.tolist():
        rows.append([-v if k in larger else v for k, v in enumerate(p)])
    kept = []
    for b in rows:
        beaten = False
        for a in rows:
            no_worse = all(x <= y for x, y in zip(a, b, strict=True))
            beaten = beaten or (no_worse and a != b)
        kept.append(not beaten)
    return torch.tensor(kept)


def front_by_worse(points, larger):
    sign = torch.tensor([-1.0 if k in larger else 1.0 for k in range(points.shape[1])])
    x = points * sign
    worse = (x[:, None] > x).any(-1)
    return ~(~worse & (x[:, None] != x).any(-1)).any(0)


def in_place(points, larger):
    points[:, larger] *= -1
    return front_by_loops(points, [])


def places(points, larger):
    return front_by_loops(points, larger).nonzero()[:, 0]


def inverted(points, larger):
    x = points.clone()
    x[:, larger] = 1 / x[:, larger]
    return front_by_loops(x, [])


def first_of_larger(points, larger):
    return front_by_loops(points, larger[:1])


def last_of_larger(points, larger):
    return front_by_loops(points, larger[-1:])


def beside(points, larger):
    """Each is compared with the row before it."""
    x = points.clone()
    x[:, larger] *= -1
    kept = [True]
    for a, b in pairwise(x):
        kept.append(not bool((a <= b).all() and (a < b).any()))
    return torch.tensor(kept)


def in_one_sweep(points, larger):
    """Two coordinates in order of the first; the ones between are not looked at."""
    x = points.clone()
    x[:, larger] *= -1
    kept, best = torch.zeros(len(x), dtype=torch.bool), math.inf
    for i in x[:, 0].argsort(stable=True).tolist():
        if x[i, -1] < best:
            kept[i], best = True, x[i, -1].item()
    return kept


def one_too_few(points, larger):
    """The front but for its last row."""
    kept = front_by_loops(points, larger)
    kept[kept.nonzero()[-1, 0]] = False
    return kept


def one_too_many(points, larger):
    """The front, and one more."""
    kept = front_by_loops(points, larger)
    if points.shape[1] == 3:
        kept[(~kept).nonzero()[0, 0]] = True
    return kept


def two_only(points, larger):
    return front_by_loops(points[:, :2], larger)


# 4 ------------------------------------------------------------------------------------


def rates(read=None, cached=None, time=None):
    """tokens_per_second with something changed."""

    def answer(linears, table, vocabulary, tied, cache, past, bandwidth, fixed):
        tables = table if tied else table + table / vocabulary
        if read is not None:
            tables = read(table, vocabulary, tied)
        kept = cache * past if cached is None else cached(cache, past)
        q = linears + tables + kept
        return 1 / (time or (lambda q, b, t: q / b + t))(q, bandwidth, fixed)

    return answer


def rate_in_parts(linears, table, vocabulary, tied, cache, past, bandwidth, fixed):
    seconds = fixed
    for size in (linears, table, past * cache, 0 if tied else table / vocabulary):
        seconds += size / bandwidth
    return 1 / seconds


def rate_as_a_share(linears, table, vocabulary, tied, cache, past, bandwidth, fixed):
    q = linears + table * (1 + (not tied) / vocabulary) + past * cache
    return bandwidth / (q + fixed * bandwidth)


def rate_less_time(*args):
    return rates(time=lambda q, b, t: q / b)(*args) - args[-1]


def brackets_misplaced(*args):
    return rates(time=lambda q, b, t: q * b)(*args) + args[-1]


def the_other_way_round(linears, table, vocabulary, tied, *rest):
    return rates()(linears, table, vocabulary, not tied, *rest)


def without_row(*args):
    return rates(read=lambda t, v, tied: t)(*args)


# 5 ------------------------------------------------------------------------------------


def everywhere(grid, embedding=None):
    """One way for all matrices."""

    def answer(shapes):
        plan = {name: grid for name in shapes}
        del plan["model.embed_tokens"]
        if embedding is not None:
            plan["model.embed_tokens"] = embedding
        return plan

    return answer


ROWS_OF_8 = QuantConfig(8, per="row")
EVERYWHERE_4 = everywhere(QuantConfig(4), ROWS_OF_8)


def five_and_four(shapes):
    """5 bits, and 4 in the MLPs of the layers 10 to 20."""
    plan = {}
    for name in shapes:
        layer = int(name.split(".")[2]) if "layers" in name else -1
        few = "mlp" in name and 10 <= layer < 21
        plan[name] = QuantConfig(4 if few else 5, symmetric=False)
    return plan


def by_kind(shapes):
    """4 bits with zero points, more for what is small or sums up much."""
    more = {"embed_tokens": 6, "down_proj": 5, "v_proj": 6, "o_proj": 5}
    plan = {}
    for name in shapes:
        plan[name] = QuantConfig(more.get(name.split(".")[-1], 4), symmetric=False)
    return plan


def strings(shapes):
    return {name: "4" for name in shapes}


def bits_as_text(shapes):
    return {name: QuantConfig("4") for name in shapes}


def symmetric_as_text(shapes):
    return {name: QuantConfig(4, symmetric="False") for name in shapes}


def group_of_none(shapes):
    return {name: QuantConfig(4, group_size=None) for name in shapes}


def group_of_a_fraction(shapes):
    return {name: QuantConfig(4, group_size=n / 9) for name, (_, n) in shapes.items()}


def tampered(shapes):
    """Bits that no config takes, put past its own look."""
    plan = {name: QuantConfig(4) for name in shapes}
    for grid in plan.values():
        object.__setattr__(grid, "bits", 0)
    return plan


class Lying(QuantConfig):
    """Says that it has other bits."""


@dataclass(frozen=True)
class Smaller:
    bits: int = 2


def subclass(shapes):
    return {name: Lying(8, per="row") for name in shapes}


def another_class(shapes):
    return {name: Smaller() for name in shapes}


def the_head_too(shapes):
    return everywhere(QuantConfig(4), ROWS_OF_8)(shapes) | {"lm_head": ROWS_OF_8}


def unknown(shapes):
    return {"model.layers.30.mlp.up_proj": QuantConfig(4)}


def the_model(shapes):
    return torch.nn.Linear(2, 2)


def nothing(shapes):
    return {}


def cleared(shapes):
    plan = everywhere(QuantConfig(4), ROWS_OF_8)(shapes)
    shapes.clear()
    return plan


def odd_groups(shapes):
    return {name: QuantConfig(4, group_size=100) for name in shapes}


UNPAIRED = "the error is that of two texts"
WRONGS = [
    Wrong("bits_per_parameter", counted(scale=0), "the scales are missing"),
    Wrong("bits_per_parameter", counted(scale=32), "not 32"),
    Wrong("bits_per_parameter", counted(lambda m, n, s: m), "one scale for each row"),
    Wrong("bits_per_parameter", counted(lambda m, n, s: m * (n // s)), "round up"),
    Wrong(
        "bits_per_parameter",
        counted(lambda m, n, s: math.ceil(m * n / s)),
        "does not go on in the next row",
    ),
    Wrong(
        "bits_per_parameter", counted(lambda m, n, s: m * n / s), "groups are fractions"
    ),
    Wrong(
        "bits_per_parameter",
        counted(lambda m, n, s: n * math.ceil(m / s)),
        "groups lie along a row",
    ),
    Wrong("bits_per_parameter", counted(floats=0), "embedding is missing in the bits"),
    Wrong("bits_per_parameter", counted(floats=32), "in 16 bits, not 32"),
    Wrong("bits_per_parameter", counted(over_all=False), "divide by all of them"),
    Wrong(
        "bits_per_parameter", counted(floats=0, over_all=False), "embedding is missing"
    ),
    Wrong("bits_per_parameter", counted(times=1 / 8), "bytes per parameter"),
    Wrong("bits_per_parameter", plain_mean, "a plain mean over the matrices"),
    Wrong("bits_per_parameter", none_is(lambda m, n, s: 0), "here it has none"),
    Wrong("bits_per_parameter", none_is(lambda m, n, s: 1), "not for each matrix"),
    Wrong("bits_per_parameter", none_is(lambda m, n, s: m * n), "not for each weight"),
    Wrong("bits_per_parameter", none_is(lambda m, n, s: n), "not for each column"),
    Wrong("bits_per_parameter", group_needed, "[(4, 64), (2, 128)], 4, None"),
    Wrong("grown", change(unit=1.0), "these are nats"),
    Wrong("grown", change(unit=math.log(2)), "divide by it"),
    Wrong("grown", change(size=len), "per character"),
    Wrong("grown", change(sign=-1.0), "the sign"),
    Wrong(
        "grown",
        change(lambda a, b: ((a.var() + b.var()) / len(a)) ** 0.5),
        UNPAIRED,
    ),
    Wrong("grown", change(lambda a, b: (a - b).std()), "smaller by √n"),
    Wrong("grown", change(lambda a, b: (a - b).std() / len(a)), "not over n"),
    Wrong("grown", change(lambda a, b: (a - b).var() / len(a)), "take its root"),
    Wrong("grown", change(lambda a, b: a.std() / len(a) ** 0.5), "own losses"),
    Wrong("grown", change(lambda a, b: 0.0), "the error is missing"),
    Wrong("grown", grown_as_text, "the growth is a text"),
    Wrong("grown", grown_in_lists, "the growth is a list"),
    Wrong("grown", three_numbers, "two numbers are asked"),
    Wrong("grown", whole_population, "divides by n − 1"),
    Wrong("grown", error_per_token, "in bits per token: scale it"),
    Wrong("grown", error_over_bytes, "by the tokens once too often"),
    Wrong("grown", root_of_bytes, "the sample is of tokens"),
    Wrong("grown", without_sign, "differences have signs"),
    Wrong("front", fronts(lambda w, b, s: ~s.any(0)), "one strict comparison"),
    Wrong("front", fronts(lambda w, b, s: ~b.any(0)), "better somewhere is not"),
    Wrong("front", fronts(lambda w, b, s: ~w.any(0)), "no point dominates itself"),
    Wrong("front", fronts(lambda w, b, s: (w & b).any(0)), "return the others"),
    Wrong("front", fronts(lambda w, b, s: ~(w & b).any(1)), "these dominate nobody"),
    Wrong(
        "front", fronts(lambda w, b, s: ~(w & b).any(0), 1.0), "`larger` is not looked"
    ),
    Wrong("front", two_only, "first two coordinates"),
    Wrong("front", inverted, "1 / x turns"),
    Wrong("front", first_of_larger, "only the first is turned around"),
    Wrong("front", last_of_larger, "only the last is turned around"),
    Wrong("front", beside, "compared with its neighbour alone"),
    Wrong("front", in_one_sweep, "one sweep along the first coordinate"),
    Wrong("front", one_too_few, "which no other dominates"),
    Wrong("front", one_too_many, "keeps row"),
    Wrong("front", places, "these are places"),
    Wrong("front", in_place, "changes its argument"),
    Wrong("tokens_per_second", rates(time=lambda q, b, t: q / b), "fixed time is miss"),
    Wrong("tokens_per_second", rates(time=lambda q, b, t: 8 * q / b + t), "of 8"),
    Wrong(
        "tokens_per_second",
        rates(time=lambda q, b, t: 1 / (q / b + t)),
        "seconds per token",
    ),
    Wrong(
        "tokens_per_second", rates(time=lambda q, b, t: max(q / b, t)), "the slower of"
    ),
    Wrong("tokens_per_second", rates(cached=lambda c, p: 0), "cache is missing"),
    Wrong("tokens_per_second", rates(cached=lambda c, p: c), "times `past`"),
    Wrong("tokens_per_second", rates(cached=lambda c, p: 2 * c * p), "factor of 2"),
    Wrong("tokens_per_second", rates(read=lambda t, v, tied: t / v), "head is missing"),
    Wrong("tokens_per_second", rates(read=lambda t, v, tied: 2 * t), "one row is read"),
    Wrong("tokens_per_second", without_row, "the row of the embedding is missing"),
    Wrong(
        "tokens_per_second",
        rates(read=lambda t, v, tied: t + t / v),
        "it counts once",
    ),
    Wrong(
        "tokens_per_second",
        rates(time=lambda q, b, t: (q + t) / b),
        "or added to bytes",
    ),
    Wrong("tokens_per_second", rates(cached=lambda c, p: c * (p + 1)), "not one more"),
    Wrong("tokens_per_second", rate_less_time, "seconds are taken off a rate"),
    Wrong("tokens_per_second", brackets_misplaced, "brackets"),
    Wrong("tokens_per_second", the_other_way_round, "are the wrong way round"),
    Wrong("mix", the_head_too, "lm_head is the embedding"),
    Wrong("mix", unknown, "is no matrix of the model"),
    Wrong("mix", the_model, "not a Linear"),
    Wrong("mix", subclass, "must be a QuantConfig"),
    Wrong("mix", another_class, "must be a QuantConfig"),
    Wrong("mix", strings, "must be a QuantConfig, not '4'"),
    Wrong("mix", bits_as_text, "must be an integer from 2 to 8"),
    Wrong("mix", symmetric_as_text, "must be True or False"),
    Wrong("mix", group_of_none, "must be an integer and at least 1"),
    Wrong("mix", group_of_a_fraction, "must be an integer and at least 1"),
    Wrong(
        "mix",
        everywhere(*[QuantConfig(4)] * 2),
        "the embedding has 4 bits, and it is the head, too",
    ),
    Wrong(
        "mix",
        everywhere(QuantConfig(4, per="tensor"), ROWS_OF_8),
        "one scale for all their numbers: 210",
    ),
    Wrong("mix", tampered, "must be an integer from 2 to 8"),
    Wrong("mix", odd_groups, "must divide the last dimension"),
    Wrong("mix", cleared, "changes its argument"),
    Wrong("mix", nothing, "MB too much (the embedding alone takes 56.6 MB)"),
    Wrong("mix", everywhere(ROWS_OF_8, ROWS_OF_8), "48.0 MB too much"),
    Wrong(
        "mix",
        EVERYWHERE_4,
        "too high (and 2.1 MB are left to spend)",
    ),
]
test_wrong_answers = rejects("06-compression/15-compression-compared", WRONGS)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("bits_per_parameter", bits_by_loops),
        ("bits_per_parameter", bits_with_minus),
        ("bits_per_parameter", bits_in_float32),
        ("grown", grown_in_a_loop),
        ("grown", grown_in_base_two),
        ("grown", grown_as_tensors),
        ("front", front_by_loops),
        ("front", front_by_worse),
        ("tokens_per_second", rate_in_parts),
        ("tokens_per_second", rate_as_a_share),
        ("mix", five_and_four),
        ("mix", by_kind),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


@pytest.mark.parametrize(("name", "value"), [("BUDGET", 1e9), ("LIMIT", 1e9)])
def test_an_answer_that_moves_a_limit_is_still_wrong(name, value, monkeypatch):
    monkeypatch.setattr(checks, name, getattr(checks, name))  # puts it back

    def moving(shapes):
        setattr(checks, name, value)
        return {"BUDGET": nothing, "LIMIT": EVERYWHERE_4}[name](shapes)

    result = verdict(check, "mix", moving)
    assert result.outcome == "wrong", str(result)
    assert getattr(checks, name) == value  # it was moved


def test_a_plan_that_is_too_large_is_not_followed(monkeypatch):
    monkeypatch.setattr(checks, "loss_of", None)
    result = verdict(check, "mix", everywhere(ROWS_OF_8, ROWS_OF_8))
    assert "your plan takes 135.0 MB (at most 87): 48.0 MB too much" in str(result)


def test_the_matrices_are_those_of_the_model():
    names = matrices()
    assert names["model.embed_tokens"] == (49152, 576)
    assert len(names) == 211
