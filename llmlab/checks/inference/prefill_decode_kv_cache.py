"""Checks of 07-inference/01-prefill-decode-kv-cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.inference import prefill_decode_kv_cache as cached

check = Checks("07-inference/01-prefill-decode-kv-cache")

# 1 ------------------------------------------------------------------------------------

# layers, heads, head_dim, and what the kinds need: no two sizes the same
SHAPES = (
    (3, 12, 10, {"groups": 4, "latent": 21, "rope": 6, "bytes_each": 0.625}),
    (5, 6, 7, {"groups": 3, "latent": 11, "rope": 8, "bytes_each": 4}),
    (7, 8, 5, {"groups": 2, "latent": 9, "rope": 4, "bytes_each": 2}),
)


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=5,
    hints=(
        "Count the numbers that one layer keeps for one token, then multiply.",
        (
            "A key and a value each have head_dim numbers. MHA keeps a pair for every"
            " head, GQA one for every group, MQA one pair in all."
        ),
        "MLA keeps latent + rope numbers for all heads together: no pair, no heads.",
    ),
)
def cache_bytes(answer):
    """Bytes that one token takes in the cache, by the kind of attention."""
    for kind in cached.KINDS:
        for *sizes, more in SHAPES:
            what = f"cache_bytes({kind!r}, {', '.join(map(str, sizes))}, …)"
            got = expect(answer(kind, *sizes, **more), kind=float, what=what)
            diagnose(
                got,
                right=cached.cache_bytes(kind, *sizes, **more),
                mistakes=wrong_bytes(kind, *sizes, **more),
                what=what,
            )
    try:
        answer("mha", 1, 1, 1)
    except ValueError:
        return
    except Exception as error:
        raise Mistake(
            f"a kind that is none of the four must be a ValueError, and it was"
            f" {type(error).__name__}"
        ) from error
    raise Mistake("cache_bytes('mha', …) went through: another kind is a ValueError")


def wrong_bytes(
    kind: str,
    layers: int,
    heads: int,
    head_dim: int,
    *,
    groups: int,
    latent: int,
    rope: int,
    bytes_each: float,
) -> dict[str, float]:
    """Diagnosis → what this mistake gives."""
    right = cached.cache_bytes(
        kind,
        layers,
        heads,
        head_dim,
        groups=groups,
        latent=latent,
        rope=rope,
        bytes_each=bytes_each,
    )
    each = layers * bytes_each
    wrong = {
        f"{kind}: that is one layer, and each layer has a cache": right / layers,
        f"{kind}: numbers were counted, bytes are asked: times bytes_each": (
            right / bytes_each
        ),
        f"{kind}: multiplied by bytes_each twice": right * bytes_each,
        f"{kind}: divided by bytes_each": right / bytes_each**2,
    }
    if kind == "MLA":
        return wrong | {
            "MLA: the key with positions is missing: it is cached, too": latent * each,
            "MLA: doubled, but there is no pair: key and value both come from one"
            " latent": 2 * right,
            "MLA: only the latent is doubled; key and value both come from it": (
                (2 * latent + rope) * each
            ),
            "MLA: a key with positions for each head was counted: all heads share"
            " one": (latent + heads * rope) * each,
            "MLA: counted for each head: all heads share one latent": heads * right,
            "MLA: latent · rope, where the two are stored side by side": (
                latent * rope * each
            ),
            "MLA: a head's own key and value were counted: they are not cached": (
                2 * heads * head_dim * each
            ),
        }
    wrong |= {
        f"{kind}: half of it: a key and a value are kept": right / 2,
        f"{kind}: head_dim is missing: a key has that many numbers": right / head_dim,
    }
    many = {
        "MHA": 2 * heads * head_dim * each,
        "GQA": 2 * groups * head_dim * each,
        "MQA": 2 * head_dim * each,
    }
    says = {
        "MHA": "every head has a key and a value of its own",
        "GQA": "there is a key and a value for each of `groups` groups",
        "MQA": "all heads share one key and one value",
    }
    for other, value in many.items():
        if other != kind:
            wrong[f"{kind}: that is the cache of {other}: here {says[kind]}"] = value
    if kind == "GQA":
        wrong["GQA: `groups` is the number of groups, not of heads in one"] = (
            2 * heads / groups * head_dim * each
        )
    return wrong


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Row b's new tokens go to places lengths[b] … lengths[b] + counts[b] − 1.",
        (
            "A loop over the rows is fine: `buffer[b, :, start:stop] = new[b, :,"
            " :count]`."
        ),
        (
            "Look for a full row first: `(lengths + counts > C).any()`. Return"
            " lengths + counts, a new tensor."
        ),
    ),
    in_place=True,
)
def append(answer):
    """New keys behind those that each row has, in a buffer for a whole batch."""
    what = "append(buffer, new, lengths, counts)"
    for lengths, counts, T, C in (
        ([3, 1, 5], [2, 4, 1], 4, 9),  # padding in two rows
        ([2, 6], [3, 3], 3, 9),  # the last place of a row is filled
        ([4, 1, 0], [1, 1, 0], 1, 5),  # decoding; one row rests, another is full then
        ([3, 1], [1, 2], 3, 5),  # the padding of a row has no place
    ):
        lengths, counts = torch.tensor(lengths), torch.tensor(counts)
        buffer, new, right = case(lengths, counts, T, C)
        given = buffer.clone()
        lengths_before, new_before = lengths.clone(), new.clone()
        try:
            after = answer(buffer, new, lengths, counts)
        except ValueError as error:
            raise Mistake(
                f"ValueError ({error}), though every row fits: {why(lengths, T, C)}"
            ) from error
        untouched(lengths, lengths_before, new, new_before)
        diagnose(
            buffer,
            right=right,
            mistakes=wrong_places(given, new, lengths, counts),
            what="the buffer after append(…)",
        )
        after = expect(after, shape=(len(lengths),), what=what)
        diagnose(
            after.float(),
            right=(lengths + counts).float(),
            mistakes={
                "the lengths that are returned count padding: a row grows by counts[b]"
                " tokens": (lengths + T).float(),
                "the old lengths are returned: the new ones are asked": lengths.float(),
                "counts are returned: they must be added to the lengths": (
                    counts.float()
                ),
                "all rows get the length of the longest: each has its own": (
                    (lengths + counts).max().expand(len(lengths)).float()
                ),
                "the lengths are one too small": (lengths + counts - 1).float(),
                "the lengths are one too large": (lengths + counts + 1).float(),
            },
            what="the lengths that are returned",
        )
    full_row(answer)


def why(lengths: Tensor, T: int, C: int) -> str:
    """What an answer may have missed that refuses rows that fit."""
    if (lengths + T > C).any():
        return "a row grows by counts[b] tokens, and padding needs no place"
    return "a row may have C tokens, in the places 0 to C − 1"


def case(
    lengths: Tensor, counts: Tensor, T: int, C: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer whose every number is another, new keys, and the right buffer."""
    B, K, D = len(lengths), 2, 3
    buffer = torch.randn(B, K, C, D)
    new = torch.randn(B, K, T, D) + 5
    right = buffer.clone()
    cached.append(right, new, lengths, counts)
    return buffer, new, right


def untouched(lengths: Tensor, before: Tensor, new: Tensor, new_before: Tensor) -> None:
    """The check looks at the buffer, and the rest may not change."""
    if not torch.equal(lengths, before):
        raise Mistake("`lengths` was changed in place: return new ones")
    if not torch.equal(new, new_before):
        raise Mistake("`new` was changed: only the buffer may be")


def full_row(answer) -> None:
    """A row that does not fit: an error, and no row is changed."""
    buffer = torch.randn(3, 2, 5, 3)
    before = buffer.clone()
    lengths, counts = torch.tensor([1, 4, 0]), torch.tensor([2, 2, 1])
    try:
        answer(buffer, torch.randn(3, 2, 2, 3), lengths, counts)
    except ValueError:
        if not torch.equal(buffer, before):
            raise Mistake(
                "a full row is an error, but other rows were written before: look at"
                " all rows first"
            ) from None
        return
    except Exception as error:
        raise Mistake(
            f"a row with too many tokens must be a ValueError, and it was"
            f" {type(error).__name__}"
        ) from error
    raise Mistake("a row got more tokens than it has places, and nothing was said")


def wrong_places(
    buffer: Tensor, new: Tensor, lengths: Tensor, counts: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Diagnosis → what this mistake makes of the buffer."""
    T, C = new.shape[2], buffer.shape[2]

    def written(
        start: Callable[[int], int],
        count: Callable[[int], int] = lambda b: int(counts[b]),
        first: Callable[[int], int] = lambda b: 0,
        row: Callable[[int], int] = lambda b: b,
    ) -> Callable[[], Tensor]:
        def make() -> Tensor:
            out = buffer.clone()
            for b in range(len(out)):
                for i in range(count(b)):
                    place = start(b) + i
                    if 0 <= place < C:
                        out[b, :, place] = new[row(b), :, first(b) + i]
            return out

        return make

    own = lengths.tolist()
    longest, shortest = max(own), min(own)
    many = counts.tolist()
    return {
        "the buffer is as it was: write into it": buffer.clone,
        "padding was written: row b has only counts[b] new tokens": written(
            lambda b: own[b], lambda b: T
        ),
        "one place too late: the first free place of row b is lengths[b]": written(
            lambda b: own[b] + 1
        ),
        "one place too early: place lengths[b] − 1 holds the row's last token": written(
            lambda b: own[b] - 1
        ),
        "one token too few: the last new token of each row is missing": written(
            lambda b: own[b], lambda b: max(many[b] - 1, 0)
        ),
        "one token too many: counts[b] tokens, from 0 to counts[b] − 1": written(
            lambda b: own[b], lambda b: min(many[b] + 1, T)
        ),
        "all rows were written behind the longest one: each has its own length": (
            written(lambda b: longest)
        ),
        "all rows were written behind the shortest one: each has its own length": (
            written(lambda b: shortest)
        ),
        "all rows were written at the length of row 0": written(lambda b: own[0]),
        "written from place 0 on: the tokens that a row had are lost": written(
            lambda b: 0
        ),
        "every row got the new tokens of row 0": written(
            lambda b: own[b], row=lambda b: 0
        ),
        "written at places counts[b] …: the places begin at lengths[b]": written(
            lambda b: many[b]
        ),
        "new is padded on the right: the tokens are the first counts[b], not the"
        " last": written(lambda b: own[b], first=lambda b: T - many[b]),
        "every row got as many tokens as row 0": written(
            lambda b: own[b], lambda b: many[0]
        ),
        "written at the end of the row: the places behind lengths[b] are free": written(
            lambda b: C - many[b]
        ),
        "only keys of the first head were written": lambda: torch.cat(
            [
                written(lambda b: own[b])()[:, :1],
                buffer[:, 1:],
            ],
            dim=1,
        ),
    }


# 3 ------------------------------------------------------------------------------------

STEPS = (
    # the limit: bandwidth, speed, bandwidth for long contexts, speed for a single row
    (3, 50, {"weights": 700.0, "cache": 2.0, "work": 90.0}, 10.0, 40.0),
    (40, 5, {"weights": 700.0, "cache": 2.0, "work": 90.0}, 10.0, 17.0),
    (6, 400, {"weights": 300.0, "cache": 3.0, "work": 70.0}, 20.0, 9.0),
    (1, 9, {"weights": 500.0, "cache": 4.0, "work": 300.0}, 8.0, 3.0),
)


@check.exercise(
    points=2,
    minutes=8,
    difficulty=2,
    importance=5,
    hints=(
        "Two times: of reading and of computing. The longer one counts.",
        "Weights are read once for all rows; every row has a cache of its own.",
        "Each of the `batch` rows costs `work`: batch · work / speed.",
    ),
)
def decode_time(answer):
    """Seconds of one decoding step, by the roofline."""
    found = []
    right = []
    made: dict[str, list[float]] = {}
    for batch, context, sizes, bandwidth, speed in STEPS:
        rates = {"bandwidth": bandwidth, "speed": speed}
        value = answer(batch, context, **sizes, **rates)
        what = f"decode_time({batch}, {context}, …)"
        found.append(expect(value, kind=float, what=what))
        right.append(cached.decode_time(batch, context, **sizes, **rates))
        for words, x in wrong_times(batch, context, **sizes, **rates).items():
            made.setdefault(words, []).append(x)
    diagnose(found, right=right, mistakes=made, what="decode_time(…)")


def wrong_times(
    batch: int,
    context: int,
    *,
    weights: float,
    cache: float,
    work: float,
    bandwidth: float,
    speed: float,
) -> dict[str, float]:
    """Diagnosis → what this mistake gives."""
    reading = (weights + batch * context * cache) / bandwidth
    computing = batch * work / speed
    right = max(reading, computing)

    def longer(read: float, compute: float = computing) -> float:
        return max(read, compute)

    return {
        "the two times were added: reading and computing overlap, so the longer one"
        " counts": reading + computing,
        "the shorter of the two times: the longer one is the limit": min(
            reading, computing
        ),
        "only reading is counted: with enough rows computing takes longer": reading,
        "only computing is counted: with few rows reading takes longer": computing,
        "the weights are read for every row: one read serves all rows": longer(
            batch * (weights + context * cache) / bandwidth
        ),
        "the cache of one row: each of the `batch` rows has its own": longer(
            (weights + context * cache) / bandwidth
        ),
        "the cache is missing: all its tokens are read in every step": longer(
            weights / bandwidth
        ),
        "one token per row was counted in the cache: all `context` are read": longer(
            (weights + batch * cache) / bandwidth
        ),
        "the work of one row: every row gets a token": longer(reading, work / speed),
        "the work was multiplied by the context: only the new tokens are computed": (
            longer(reading, computing * context)
        ),
        "that is tokens per second: seconds are asked": batch / right,
        "that is steps per second: seconds are asked": 1 / right,
        "that is the time per token: the time of the step is asked": right / batch,
        "bandwidth and speed are swapped": max(
            reading * bandwidth / speed, computing * speed / bandwidth
        ),
    }


# 4 ------------------------------------------------------------------------------------


class Largest(TorchFunctionMode):
    """The numbers in the largest tensor that any of torch's functions returned.

    A view counts what it is a view of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            stored = out.untyped_storage().nbytes() // out.element_size()
            self.numbers = max(self.numbers, stored)
        return out


def heads(
    T: int, S: int, seed: int = 0, d_n: int = 5, d_v: int = 6
) -> dict[str, Tensor]:
    """Queries, latents and matrices: every size another."""
    B, H, d_r, d_c = 2, 3, 4, 7
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    return {
        "q": torch.randn(B, H, T, d_n),
        "q_rope": torch.randn(B, H, T, d_r),
        "c": torch.randn(B, S, d_c),
        "k_rope": torch.randn(B, S, d_r),
        "W_UK": torch.randn(H, d_n, d_c) * 0.7,
        "W_UV": torch.randn(H, d_v, d_c),
        "mask": mask,
    }


@check.exercise(
    points=4,
    minutes=20,
    difficulty=4,
    importance=4,
    hints=(
        (
            "Each head's query goes down into the latent space: Σ_n q_n W_UK[n, c]. Its"
            " dot product with c is then the score."
        ),
        (
            "Add q_rope · k_rope, then scale by (d_n + d_r)^−½, then mask, then softmax"
            " over S. The weights sum the latents c; W_UV brings the sum up."
        ),
        (
            "With `torch.einsum`: 'bhtn,hnc->bhtc', 'bhtc,bsc->bhts',"
            " 'bhtr,bsr->bhts', 'bhts,bsc->bhtc' and 'bhtc,hvc->bhtv'."
        ),
    ),
)
def absorbed(answer):
    """Latent attention without a key or a value for each head."""
    what = "absorbed(q, q_rope, c, k_rope, W_UK, W_UV, mask)"
    for T, S, d_n, d_v in ((4, 6, 5, 6), (1, 5, 6, 5), (3, 3, 5, 5)):
        given = heads(T, S, d_n=d_n, d_v=d_v)
        got = expect(
            answer(*given.values()),
            shape=(2, 3, T, d_v),
            dtype=torch.float32,
            finite=False,
            what=what,
        )
        if not got.isfinite().all():
            raise Mistake(
                "NaN or infinity: mask with −∞ before the softmax, where mask is False"
            )
        diagnose(
            got,
            right=cached.absorbed(**given),
            mistakes=wrong_heads(**given),
            tol=1e-4,
            what=what,
        )
    given = heads(1, 400)
    limit = 2 * 3 * 400 * 4  # less than all heads' keys
    with Largest() as watch:
        answer(*given.values())
    if watch.numbers >= limit:
        raise Mistake(
            f"the values are right, but with 400 tokens in the cache a tensor of"
            f" {watch.numbers:,} numbers was made: as much as a vector per head and"
            " cached token. Bring the query down instead, and the sum up at the end"
        )


def wrong_heads(
    q: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    W_UK: Tensor,
    W_UV: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Diagnosis → what this mistake gives."""
    d_n, d_r, d_c = q.shape[-1], q_rope.shape[-1], c.shape[-1]
    content = torch.einsum("bhtn,hnc,bsc->bhts", q, W_UK, c)
    place = torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)

    def out(
        scores: Tensor, scale: float = (d_n + d_r) ** -0.5, mask: Tensor = mask
    ) -> Tensor:
        p = (scores * scale).masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bsc,hvc->bhtv", p, c, W_UV)

    def other_axis() -> Tensor:
        scores = (content + place) * (d_n + d_r) ** -0.5
        p = scores.masked_fill(~mask, -1e9).softmax(-2)
        return torch.einsum("bhts,bsc,hvc->bhtv", p, c, W_UV)

    both = content + place
    masked_late = (both * (d_n + d_r) ** -0.5).softmax(-1) * mask
    wrong = {
        "the part with positions is missing: add q_rope · k_rope to the scores": out(
            content
        ),
        "the part without positions is missing: q, through W_UK, and c": out(place),
        "the scale is 1/√d_n: both parts count, d_n + d_r channels": out(
            both, d_n**-0.5
        ),
        "the scale is 1/√d_c: it stays that of the heads' own keys, d_n + d_r": out(
            both, d_c**-0.5
        ),
        "the scale is 1/√(d_c + d_r): it stays that of the heads' own keys,"
        " d_n + d_r": out(both, (d_c + d_r) ** -0.5),
        "the scale is missing: 1/√(d_n + d_r)": out(both, 1.0),
        "the scale is there twice": out(both, 1 / (d_n + d_r)),
        "only the part without positions is scaled": out(
            content + place * (d_n + d_r) ** 0.5
        ),
        "only the part with positions is scaled": out(
            content * (d_n + d_r) ** 0.5 + place
        ),
        "the mask was applied after the softmax: the weights no longer add up to"
        " 1": torch.einsum("bhts,bsc,hvc->bhtv", masked_late, c, W_UV),
        "the mask is missing: queries see later tokens": out(
            both, mask=torch.ones_like(mask)
        ),
        "the softmax runs over the queries: it runs over the cached tokens, S": (
            other_axis()
        ),
        "every head uses W_UK of head 0": out(
            torch.einsum("bhtn,nc,bsc->bhts", q, W_UK[0], c) + place
        ),
        "every head uses W_UV of head 0": torch.einsum(
            "bhts,bsc,vc->bhtv",
            (both * (d_n + d_r) ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1),
            c,
            W_UV[0],
        ),
    }
    right = out(both)
    return {words: x for words, x in wrong.items() if not close(x, right, 1e-3)}
