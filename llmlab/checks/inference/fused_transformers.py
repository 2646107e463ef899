"""Checks of 07-inference/06-fused-transformers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.inference import fused_transformers as fused
from llmlab.inference.fused_transformers import Lifetime

check = Checks("07-inference/06-fused-transformers")

# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "A linear's weight is (out, in): what is to lie side by side are its rows.",
        (
            "With parts, cut each of q, k and v into that many equal blocks of rows:"
            " `x.chunk(parts)`. The first block of all three comes first, then the"
            " second."
        ),
        (
            "`zip(q.chunk(parts), k.chunk(parts), v.chunk(parts))` gives the three"
            " blocks of a part; one `torch.cat` over all of them, along the rows."
        ),
    ),
)
def pack_qkv(answer):
    """Three weights or biases as one, in blocks that devices can share."""
    for H, K, D, extra, parts in (
        (4, 4, 2, (7,), 1),
        (6, 2, 3, (5,), 1),
        (6, 2, 3, (), 1),
        (6, 2, 4, (5,), 2),
        (12, 4, 2, (3,), 4),
        (12, 4, 2, (), 2),
    ):
        q, k, v = (torch.randn(n * D, *extra) for n in (H, K, K))
        rows = (H + 2 * K) * D
        what = f"pack_qkv(q, k, v, parts={parts})"
        if not extra:
            what += " of biases"
        try:
            found = answer(q, k, v, parts)
        except IndexError as error:
            if extra:
                raise
            raise Mistake(f"{what}: they have rows alone, (rows,); {error}") from None
        turned = isinstance(found, Tensor) and found.shape == (*extra, rows)
        if turned and extra and close(found.T, fused.pack_qkv(q, k, v, parts)):
            raise Mistake(f"{what} is transposed: a linear's weight is (out, in)")
        beside = (H * D, *(3 * n for n in extra))
        if extra and isinstance(found, Tensor) and found.shape == beside:
            raise Mistake(
                f"{what} has q, k and v side by side along the input: their rows come"
                " one below the other"
            )
        many = (H + 2 * K * parts) * D
        if isinstance(found, Tensor) and len(found) == many != rows:
            raise Mistake(
                f"{what} has {len(found)} rows, and q, k and v have {rows}: a part has"
                " its own rows of k and of v, not all of them"
            )
        if isinstance(found, Tensor) and len(found) == 3 * H * D != rows:
            raise Mistake(
                f"{what} has {len(found)} rows, and q, k and v have {rows}: k and v"
                " keep their fewer heads, nothing is repeated"
            )
        got = expect(found, shape=(rows, *extra), dtype=torch.float32, what=what)
        diagnose(
            got,
            right=fused.pack_qkv(q, k, v, parts),
            mistakes=wrong_packs(q, k, v, parts),
            what=what,
        )


def wrong_packs(q: Tensor, k: Tensor, v: Tensor, parts: int) -> dict[str, Tensor]:
    """Diagnosis → the weight that this mistake makes."""
    pack = fused.pack_qkv

    def rows_in_turn(x: Tensor) -> Tensor:
        """Row i to part i modulo parts."""
        return torch.cat([x[i::parts] for i in range(parts)])

    wrong = {
        "k and v are exchanged: the order is q, k, v": pack(q, v, k, parts),
        "q comes last: the order is q, k, v": in_order(q, k, v, parts, "kvq"),
        "k comes first: the order is q, k, v": in_order(q, k, v, parts, "kqv"),
        "the order is v, k, q: q, k, v is asked": in_order(q, k, v, parts, "vkq"),
        "the rows are in reverse order": pack(q, k, v, parts).flip(0),
        "q stands in the place of k and v as well": pack(
            q, *(torch.cat([q, q])[: len(k)] for _ in "kv"), parts
        ),
        "k is there twice, and v is missing": pack(q, k, k, parts),
        "v is there twice, and k is missing": pack(q, v, v, parts),
    }
    if parts > 1:
        blocks = pack(q, k, v, parts).chunk(parts)
        wrong |= {
            "`parts` is not taken: each block must hold q, k and v of its own heads": (
                pack(q, k, v)
            ),
            "rows go to the parts in turn, like cards: a part takes rows that lie"
            " together, so that heads stay whole": pack(
                *(rows_in_turn(x) for x in (q, k, v)), parts
            ),
            "q is whole, and only k and v are cut into parts": torch.cat(
                [q, pack(k[:0], k, v, parts)]
            ),
            "k and v are cut into parts of as many rows as q's: each has its own"
            " number": torch.cat(
                [
                    block
                    for i in range(parts)
                    for x in (q, k, v)
                    for block in x.split(len(q) // parts)[i : i + 1]
                ]
            ),
            "the parts come in reverse order": torch.cat(blocks[::-1]),
            "the first part is there in the place of every other": torch.cat(
                [blocks[0]] * parts
            ),
        }
    return wrong


def in_order(q: Tensor, k: Tensor, v: Tensor, parts: int, order: str) -> Tensor:
    """Packed in another order."""
    named = {"q": q.chunk(parts), "k": k.chunk(parts), "v": v.chunk(parts)}
    return torch.cat([named[name][i] for i in range(parts) for name in order])


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "First the sum: it is both the new residual stream and what is normed.",
        (
            "The mean of the squares runs over the last axis, in float32; eps is added"
            " to it, under the root."
        ),
        (
            "With s = residual + x and w = s.float(): w * torch.rsqrt(w.square()"
            ".mean(-1, keepdim=True) + eps), back in the type of s, times weight."
            " Return that and s."
        ),
    ),
)
def add_rms_norm(answer):
    """The sum of a layer's result and the residual stream, normed and as it is."""
    what = "add_rms_norm(x, residual, weight, eps)"
    for N, d, size, eps in ((5, 8, 1.0, 1e-6), (4, 6, 0.5, 0.5), (1, 6, 2.0, 0.1)):
        x, residual = torch.randn(2, N, d) * size
        weight = torch.randn(d) + 2
        found = pair(answer(x, residual, weight, eps), (N, d), x.dtype, what)
        right = fused.add_rms_norm(x, residual, weight, eps)
        if N > 1 and close(found[0], right[1]) and close(found[1], right[0]):
            raise Mistake(
                "the two results are exchanged: first what was normed, then the new"
                " residual stream"
            )
        wrong = wrong_norms(x, residual, weight, eps)
        for i, name in enumerate(("the normed sum", "the new residual stream")):
            diagnose(
                found[i],
                right=right[i],
                mistakes=wrong[i],
                tol=1e-4,
                what=f"{name} of {what}",
            )
    check_halves(answer, what)


def pair(value, shape: tuple, dtype: torch.dtype, what: str) -> tuple[Tensor, Tensor]:
    """The two tensors of an answer."""
    if value is None:
        raise Mistake(f"{what} returned None: is there a `return` at its end?")
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Mistake(
            f"{what} must return two tensors: what was normed, and the new residual"
            " stream"
        )
    for x, name in zip(value, ("the normed sum", "the residual stream"), strict=True):
        expect(x, shape=shape, dtype=dtype, finite=False, what=f"{name} of {what}")
    return tuple(value)


def check_halves(answer, what: str) -> None:
    """In float16 a square is infinite from 256 on."""
    x, residual = (torch.randn(2, 3, 8) * 300).to(torch.float16)
    weight = (torch.randn(8) + 2).to(torch.float16)
    found = pair(answer(x, residual, weight, 1e-6), (3, 8), torch.float16, what)
    right = fused.add_rms_norm(x, residual, weight, 1e-6)
    if close(found[0].float(), right[0].float(), 2e-2):
        return
    if not found[0].isfinite().all() or (found[0] == 0).float().mean() > 0.5:
        raise Mistake(
            "right in float32, but in float16 the squares of numbers from 256 on are"
            " infinite: take them, and their mean, in float32"
        )
    raise Mistake(
        "right in float32, but not in float16: compute in float32 and go back to the"
        " type of the inputs at the end",
        foreseen=False,
    )


def wrong_norms(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Diagnosis → what this mistake makes of the normed sum, and of the stream."""
    total = residual + x
    mean = total.square().mean(-1, keepdim=True)

    def normed(value: Tensor, by: Tensor) -> Tensor:
        return value * torch.rsqrt(by + eps) * weight

    def rms(value: Tensor) -> Tensor:
        return normed(value, value.square().mean(-1, keepdim=True))

    right = normed(total, mean)
    centred = total - total.mean(-1, keepdim=True)
    first = {
        "x alone was normed: the sum is to be": rms(x),
        "the residual stream was normed without x": rms(residual),
        "each of the two was normed, and then they were added": rms(x) + rms(residual),
        "x was normed, and then added to the stream": residual + rms(x),
        "the scale is that of x alone: the sum's is asked": normed(
            total, x.square().mean(-1, keepdim=True)
        ),
        "the scale is that of the old residual stream: the sum's is asked": normed(
            total, residual.square().mean(-1, keepdim=True)
        ),
        "the difference was normed: x is added": rms(residual - x),
        "`weight` is missing": right / weight,
        "`weight` is there twice": right * weight,
        "1 + weight was taken: weight is asked": right / weight * (1 + weight),
        "eps is missing, or it is not the one that was given": (
            total * torch.rsqrt(mean) * weight
        ),
        "eps is added behind the root: it belongs under it": (
            total / (mean.sqrt() + eps) * weight
        ),
        "eps is squared, or added to the root of the mean before it is squared": (
            total / (mean + eps**2).sqrt() * weight
        ),
        "eps is subtracted": total * weight / (mean - eps).clamp(min=1e-9).sqrt(),
        "the squares are summed: their mean is asked": normed(
            total, total.square().sum(-1, keepdim=True)
        ),
        "the root is missing: divide by the root of the mean square": (
            total / (mean + eps) * weight
        ),
        "it is multiplied by the root: divide by it": (
            total * (mean + eps).sqrt() * weight
        ),
        "the mean was subtracted: that is LayerNorm": normed(
            centred, centred.square().mean(-1, keepdim=True)
        ),
        "the square of the mean was taken: the mean of the squares is asked": normed(
            total, total.mean(-1, keepdim=True).square()
        ),
        "the mean runs over all tokens at once: each token has its own": normed(
            total, total.square().mean()
        ),
        "the sum is not normed": total,
    }
    if len(total) > 1:
        first["the mean runs over the tokens: it runs over a token's channels"] = (
            normed(total, total.square().mean(0, keepdim=True))
        )
    second = {
        "it is the old one: x must be added to it": residual,
        "it is x: the sum is asked": x,
        "it is the normed sum: the stream itself is never normed": right,
        "the normed sum was added to the old stream: x is": residual + right,
        "the normed sum was added to the sum": total + right,
        "x is there twice": total + x,
        "x was subtracted": residual - x,
        "x was scaled by `weight` before it was added": residual + weight * x,
        "the mean of x and the stream was taken: their sum is asked": total / 2,
    }
    return first, second


# 3 ------------------------------------------------------------------------------------

LENGTHS = ((3, 1, 2), (2, 4, 0, 3), (5,))


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Flatten table and mask: the token of text b at place t stands at b T + t."
            " The places where the mask is 1 are what is asked, in this order."
        ),
        (
            "`nonzero` of the flattened mask gives the places, and they pick the tokens"
            " out of the flattened table."
        ),
        (
            "starts are the lengths, summed up from the front, with a 0 before them:"
            " mask.sum(1).cumsum(0). There is one more than there are texts."
        ),
    ),
)
def remove_padding(answer):
    """The tokens of a padded table, their places, and where each text begins."""
    what = "remove_padding(x, mask)"
    for lengths in LENGTHS:
        for side in ("right", "left"):
            x, mask = padded(lengths, side)
            kind = torch.bool if side == "left" else torch.int64
            found = triple(answer(x, mask.to(kind)), what)
            right = fused.remove_padding(x, mask)
            wrong = wrong_removals(x, mask)
            for i, name in enumerate(("places", "starts", "tokens")):
                at = (1, 2, 0)[i]
                compare_one(found[at], right[at], wrong[at], f"{name} of {what}", side)


def padded(lengths: Sequence[int], side: str) -> tuple[Tensor, Tensor]:
    """A table of two channels, and 1 where there is a token."""
    T = max(lengths) + 1
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    return torch.randn(len(lengths), T, 2), mask.long()


def triple(value, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of an answer."""
    if value is None:
        raise Mistake(f"{what} returned None: is there a `return` at its end?")
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise Mistake(f"{what} must return three tensors: tokens, places, starts")
    for x, name in zip(value, ("tokens", "places", "starts"), strict=True):
        kind = torch.float32 if name == "tokens" else torch.int64
        if not isinstance(x, Tensor):
            raise Mistake(f"{name} of {what} is a {type(x).__name__}, not a tensor")
        if x.dtype != kind:
            raise Mistake(f"{name} of {what} is {x.dtype}: it must be {kind}")
    return tuple(value)


def compare_one(
    found: Tensor, right: Tensor, wrong: dict[str, Tensor], what: str, side: str
) -> None:
    """Shapes differ between mistakes, so they are compared before the shape is."""
    if found.shape == right.shape and torch.equal(found, right):
        return
    for words, value in wrong.items():
        differs = value.shape != right.shape or not torch.equal(value, right)
        if differs and found.shape == value.shape and torch.equal(found, value):
            raise Mistake(f"{what}: {words}")
    if found.shape != right.shape:
        raise Mistake(
            f"{what} has shape {tuple(found.shape)}, where {tuple(right.shape)} is"
            " asked",
            foreseen=False,
        )
    raise Mistake(f"{what} is wrong, with padding on the {side}", foreseen=False)


def wrong_removals(
    x: Tensor, mask: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Diagnosis → what this mistake makes of tokens, places and starts."""
    B, T = mask.shape
    lengths = mask.sum(1)
    tokens, places, starts = fused.remove_padding(x, mask)
    row, column = mask.nonzero(as_tuple=True)
    front = fused.remove_padding(x, torch.arange(T) < lengths[:, None])
    by_time = (column * B + row).sort().values
    along = x.transpose(0, 1).flatten(0, 1)[by_time]
    upside = fused.remove_padding(x, 1 - mask)
    turned = torch.cat([n.flip(0) for n in torch.arange(len(row)).split([*lengths])])
    some = lengths > 0
    filled = torch.cat([torch.zeros(1, dtype=torch.long), lengths[some].cumsum(0)])
    wrong_tokens = {
        "padding is kept, and the tokens are left out: the mask is 1 for a token": (
            upside[0]
        ),
        "padding is still there": x.flatten(0, 1),
        "padding was set to 0: it is to be left out": (
            x * mask[..., None].float()
        ).flatten(0, 1),
        "the first entries of each row were taken: padding may be on the left": (
            front[0]
        ),
        "they go by time first: text after text is asked": along,
        "they are in reverse order": tokens.flip(0),
        "each text runs from right to left": tokens[turned],
    }
    if B > 1:
        wrong_tokens["numbers as an index pick rows 0 and 1: make the mask bool"] = x[
            mask
        ]
    wrong_places = {
        "the mask is 1 for a token and 0 for padding: these are the places of the"
        " padding": upside[1],
        "they count within each row: the place in the flattened table is b T + t": (
            column
        ),
        "these are the numbers of the texts": row,
        "they count the tokens, which needs no mask: the place in the table is asked": (
            torch.arange(len(places))
        ),
        "the table was flattened along time first: b T + t is asked": (
            column * B + row
        ),
        "they go by time first: text after text is asked": by_time,
        "a text has N places here: a row of the table has T": (
            row * len(places) + column
        ),
        "they are pairs (b, t): one number for each, b T + t": mask.nonzero(),
        "each text runs from right to left": places[turned],
        "they begin at 1: the first place is 0": places + 1,
        "padding may be on the left: these are the first places of each row": front[1],
        "all places are there, those of padding, too": torch.arange(B * T),
    }
    wrong_starts = {
        "the 0 at the front is missing": starts[1:],
        "the end is missing: after the last text stands the number of tokens": (
            starts[:-1]
        ),
        "these are the lengths: each start is the sum of those before": lengths,
        "these are the lengths, with a 0: each start is the sum of those before": (
            torch.cat([torch.zeros(1, dtype=torch.long), lengths])
        ),
        "texts begin every T places only in the padded table": torch.arange(B + 1) * T,
        "the padding was summed up, not the tokens": upside[2],
        "the last token of each text is asked for by nobody: the next one's begin is": (
            starts[1:] - 1
        ),
        "a text without tokens is left out: it begins where the next one does": filled,
        "they begin at 1": starts + 1,
    }
    return wrong_tokens, wrong_places, wrong_starts


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=4,
    hints=(
        (
            "`sorted(results, key=lambda r: -r.size)` keeps the order of equal sizes."
            " Keep a list of (offset, result) of those that are placed."
        ),
        (
            "Go through the placed ones that meet the new one, by rising offset, and"
            " remember where the highest so far ends. Between that and the next offset"
            " is a gap."
        ),
        (
            "A gap fits when it is at least as large as the result; keep the smallest"
            " that fits, by `<`. If none fits, the offset is the end of the highest."
        ),
    ),
)
def plan_buffers(answer):
    """The offset of each result in one arena: largest first, the smallest gap."""
    found = []
    for results in cases():
        what = f"plan_buffers of {len(results)} results"
        plan = answer(list(results))
        if plan is None:
            raise Mistake(f"{what} returned None: is there a `return` at its end?")
        if not isinstance(plan, dict) or set(plan) != {r.name for r in results}:
            raise Mistake(
                f"{what} must be a dict with an offset for each result's name"
            )
        offsets = {name: whole(at, f"{what}[{name!r}]") for name, at in plan.items()}
        found.append(offsets)
    right = [fused.plan_buffers(results) for results in cases()]
    if found == right:
        return
    for words, plan in wrong_plans().items():
        if found == [plan(results) for results in cases()]:
            raise Mistake(words)
    for results, got, wanted in zip(cases(), found, right, strict=True):
        if got != wanted:
            raise Mistake(first_difference(results, got, wanted), foreseen=False)


def whole(value, what: str) -> int:
    """An offset as a whole number."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise Mistake(f"{what} is {value!r}, where an int is asked")
    return plain


def first_difference(
    results: Sequence[Lifetime], got: dict[str, int], wanted: dict[str, int]
) -> str:
    """Where a plan goes wrong, without the right one."""
    told = ", ".join(f"{r.name} {r.size} ({r.first}–{r.last})" for r in results)
    what = f"of {told}, size (first–last)"
    if min(got.values()) < 0:
        return f"{what}: an offset is negative"
    for i, a in enumerate(results):
        for b in results[:i]:
            start = max(got[a.name], got[b.name])
            stop = min(got[a.name] + a.size, got[b.name] + b.size)
            if a.meets(b) and start < stop:
                return f"{what}: {b.name} and {a.name} overlap, and both are needed"
    for r in sorted(results, key=lambda r: -r.size):
        if got[r.name] != wanted[r.name]:
            return f"{what}: {r.name} is the first, by size, that lies elsewhere"
    return what


@cache
def cases() -> tuple[tuple[Lifetime, ...], ...]:
    """By hand, and drawn: the same in every run."""
    dice = random.Random(1)
    always, early = (0, 5), (0, 1)
    gaps = (
        Lifetime("a", 9, *always),
        Lifetime("b", 8, *early),
        Lifetime("c", 7, *always),
        Lifetime("d", 3, *early),
        Lifetime("e", 2, *always),
        Lifetime("new", 1, 3, 5),
        Lifetime("fits", 3, 2, 2),
    )
    twins = (
        Lifetime("a", 9, *always),
        Lifetime("b", 6, *early),
        Lifetime("s", 6, *always),
        Lifetime("c", 6, *early),
        Lifetime("t", 5, *always),
        Lifetime("new", 2, 3, 5),
    )
    touching = (Lifetime("x", 4, 0, 1), Lifetime("y", 4, 1, 2), Lifetime("z", 4, 3, 3))
    drawn = []
    for n in (5, 7, 8, 9, 10, 12):
        results = []
        for i in range(n):
            first = dice.randrange(6)
            last = first + dice.randrange(4)
            results.append(Lifetime(f"r{i}", dice.randrange(1, 9), first, last))
        drawn.append(tuple(results))
    return ((Lifetime("only", 5, 0, 0),), touching, gaps, twins, *drawn)


def planned(
    order: Callable[[Lifetime], float | tuple] = lambda r: -r.size,
    meets: Callable[[Lifetime, Lifetime], bool] = Lifetime.meets,
    better: Callable[[int, int], bool] = lambda gap, best: gap < best,
    fits: Callable[[int, int], bool] = lambda gap, size: gap >= size,
    gaps: bool = True,
    top: bool = True,
    at_end: bool = False,
    front: bool = True,
    by_offset: bool = True,
    behind_all: bool = False,
) -> Callable[[Sequence[Lifetime]], dict[str, int]]:
    """plan_buffers with one thing changed.

    Args:
        order: what comes first has the least.
        gaps: False puts everything behind the highest that it meets.
        top: False takes the end of the last one for the end of the highest.
        at_end: the result lies at the upper end of its gap.
        front: False leaves the gap below the first one empty.
        by_offset: False goes through the placed ones as they were placed.
        behind_all: without a gap it lies behind all, not those that it meets.
    """

    def plan(results: Sequence[Lifetime]) -> dict[str, int]:
        placed: list[tuple[int, Lifetime]] = []
        for result in sorted(results, key=order):
            end = 0
            found: tuple[int, int] | None = None  # gap, offset
            up = sorted(placed, key=lambda pair: pair[0]) if by_offset else placed
            for offset, other in up:
                if not meets(result, other):
                    continue
                gap = offset - end
                usable = gaps and gap > 0 and fits(gap, result.size)
                usable &= front or end > 0
                if usable and (found is None or better(gap, found[0])):
                    found = (gap, offset - result.size if at_end else end)
                stop = offset + other.size
                end = max(end, stop) if top else stop
            if behind_all:
                end = max([offset + r.size for offset, r in placed], default=0)
            placed.append((end if found is None else found[1], result))
        return {result.name: offset for offset, result in placed}

    return plan


def wrong_plans() -> dict[str, Callable[[Sequence[Lifetime]], dict[str, int]]]:
    """Diagnosis → the plan that this mistake leads to."""
    return {
        "nothing shares memory: results whose times do not meet can lie in one place": (
            planned(meets=lambda a, b: True)
        ),
        "nothing shares memory, and all lie in a row in the order given": planned(
            meets=lambda a, b: True, order=lambda r: 0
        ),
        "everything lies at 0: results that are needed at once must not overlap": (
            lambda results: {r.name: 0 for r in results}
        ),
        "results are placed in the order given: the largest comes first": planned(
            order=lambda r: 0
        ),
        "the smallest comes first: the largest does": planned(order=lambda r: r.size),
        "results are placed by the launch that makes them: the largest comes first": (
            planned(order=lambda r: r.first)
        ),
        "of equal sizes the one that is made first comes first: keep the order given": (
            planned(order=lambda r: (-r.size, r.first))
        ),
        "results are placed by how long they live: the largest comes first": planned(
            order=lambda r: r.first - r.last
        ),
        "one that is read by the launch that makes the other shares its memory: `last`"
        " is included": planned(
            meets=lambda a, b: a.first < b.last and b.first < a.last
        ),
        "the lowest gap that fits was taken: the smallest is asked": planned(
            better=lambda gap, best: False
        ),
        "the highest gap that fits was taken: the smallest is asked": planned(
            better=lambda gap, best: True
        ),
        "the largest gap was taken: the smallest that fits is asked": planned(
            better=lambda gap, best: gap > best
        ),
        "of equal gaps the highest was taken: the lowest is asked": planned(
            better=lambda gap, best: gap <= best
        ),
        "a gap as large as the result is left empty: it fits": planned(
            fits=lambda gap, size: gap > size
        ),
        "gaps are taken that are too small: the result runs into the next one": planned(
            fits=lambda gap, size: True
        ),
        "gaps are left empty: everything lies behind the highest that it meets": (
            planned(gaps=False)
        ),
        "the gap below the first one is left empty: gaps begin at 0": planned(
            front=False
        ),
        "the placed ones are not gone through by their offsets: sort them": planned(
            by_offset=False
        ),
        "without a gap it lies behind all that are placed: behind those that it"
        " meets": planned(behind_all=True),
        "the gap begins where the last one ends: one before it may reach higher": (
            planned(top=False)
        ),
        "the result lies at the upper end of its gap: at the lower one is asked": (
            planned(at_end=True)
        ),
        "of equal sizes the last given comes first: keep the order given": (
            lambda results: fused.plan_buffers(results[::-1])
        ),
    }
