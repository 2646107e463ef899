"""Wrong answers to 07-inference/01-prefill-decode-kv-cache, each with its diagnosis."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.checks.inference import prefill_decode_kv_cache as checks
from llmlab.checks.inference.prefill_decode_kv_cache import check
from llmlab.course.grading.checking import close
from llmlab.inference import prefill_decode_kv_cache as cached
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def bytes_by(
    mha=lambda H, D: 2 * H * D,
    gqa=lambda H, D, G: 2 * G * D,
    mqa=lambda H, D: 2 * D,
    mla=lambda H, D, c, r: c + r,
    total=lambda layers, numbers, each: layers * numbers * each,
    refuse=True,
):
    """cache_bytes with one thing changed."""

    def answer(
        kind, layers, heads, head_dim, *, groups=1, latent=0, rope=0, bytes_each=2
    ):
        if kind not in cached.KINDS:
            if refuse:
                raise ValueError(kind)
            return 0.0
        numbers = {
            "MHA": lambda: mha(heads, head_dim),
            "GQA": lambda: gqa(heads, head_dim, groups),
            "MQA": lambda: mqa(heads, head_dim),
            "MLA": lambda: mla(heads, head_dim, latent, rope),
        }[kind]()
        return total(layers, numbers, bytes_each)

    return answer


def by_groups(
    kind, layers, heads, head_dim, *, groups=1, latent=0, rope=0, bytes_each=2
):
    """MHA and MQA as GQA with all groups, or one."""
    if kind == "MLA":
        return bytes_each * layers * (latent + rope)
    pairs = {"MHA": heads, "GQA": groups, "MQA": 1}.get(kind)
    if pairs is None:
        raise ValueError(kind)
    return bytes_each * layers * pairs * head_dim * 2


def by_match(
    kind, layers, heads, head_dim, *, groups=1, latent=0, rope=0, bytes_each=2
):
    match kind:
        case "MHA":
            each = heads * head_dim + heads * head_dim
        case "GQA":
            each = head_dim * groups + head_dim * groups
        case "MQA":
            each = head_dim + head_dim
        case "MLA":
            each = latent + rope
        case _:
            raise ValueError("no such kind")
    return sum(each * bytes_each for _ in range(layers))


def key_error(kind, layers, heads, head_dim, **more):
    if kind not in cached.KINDS:
        raise KeyError(kind)
    return cached.cache_bytes(kind, layers, heads, head_dim, **more)


# 2 ------------------------------------------------------------------------------------


def appending(
    start=lambda b, lengths, counts: int(lengths[b]),
    count=lambda b, counts, T: int(counts[b]),
    first=lambda b, counts, T: 0,
    row=lambda b: b,
    after=lambda lengths, counts, T: lengths + counts,
    refuse="first",
):
    """append with one thing changed."""

    def answer(buffer, new, lengths, counts):
        B, T, C = len(buffer), new.shape[2], buffer.shape[2]
        if refuse == "first" and (lengths + counts > C).any():
            raise ValueError("full")
        if refuse == "padding" and (lengths + T > C).any():
            raise ValueError("full")
        if refuse == "last place" and (lengths + counts >= C).any():
            raise ValueError("full")
        for b in range(B):
            if refuse == "late" and lengths[b] + counts[b] > C:
                raise ValueError("full")
            for i in range(count(b, counts, T)):
                place = start(b, lengths, counts) + i
                if place < C:
                    buffer[b, :, place] = new[row(b), :, first(b, counts, T) + i]
        return after(lengths, counts, T)

    return answer


def in_place_lengths(buffer, new, lengths, counts):
    cached.append(buffer, new, lengths.clone(), counts)
    lengths += counts
    return lengths


def into_a_copy(buffer, new, lengths, counts):
    return cached.append(buffer.clone(), new, lengths, counts)


def index_error(buffer, new, lengths, counts):
    if (lengths + counts > buffer.shape[2]).any():
        raise IndexError("full")
    return cached.append(buffer, new, lengths, counts)


def nothing_returned(buffer, new, lengths, counts):
    cached.append(buffer, new, lengths, counts)


def by_scatter(buffer, new, lengths, counts):
    """A mask over the places, and for each the offset in `new`."""
    places = torch.arange(buffer.shape[2])
    end = lengths + counts
    if int(end.max()) > len(places):
        raise ValueError("full")
    offset = places[None] - lengths[:, None]
    inside = (offset >= 0) & (places[None] < end[:, None])
    index = offset.clamp(0, new.shape[2] - 1)[:, None, :, None]
    values = new.gather(2, index.expand(*buffer.shape))
    buffer.copy_(torch.where(inside[:, None, :, None], values, buffer))
    return end


def token_by_token(buffer, new, lengths, counts):
    after = [int(n) + int(m) for n, m in zip(lengths, counts, strict=True)]
    if max(after) > buffer.shape[2]:
        raise ValueError("a row is full")
    for b, (start, stop) in enumerate(zip(lengths.tolist(), after, strict=True)):
        for place in range(start, stop):
            buffer[b, :, place, :] = new[b, :, place - start, :]
    return torch.tensor(after)


# 3 ------------------------------------------------------------------------------------


def timing(
    read=lambda b, s, w, c: w + b * s * c,
    work=lambda b, s, f: b * f,
    join=max,
    after=lambda t, b: t,
):
    """decode_time with one thing changed."""

    def answer(batch, context, *, weights, cache, work, bandwidth, speed):
        reading = read(batch, context, weights, cache) / bandwidth
        return after(join(reading, made(batch, context, work) / speed), batch)

    made = work
    return answer


def by_branches(batch, context, *, weights, cache, work, bandwidth, speed):
    seconds = weights / bandwidth
    for _ in range(batch):
        seconds += context * cache / bandwidth
    computing = work / speed * batch
    return computing if computing > seconds else seconds


def by_intensity(batch, context, *, weights, cache, work, bandwidth, speed):
    traffic = weights + cache * context * batch
    if batch * work / traffic < speed / bandwidth:
        return traffic / bandwidth
    return batch * work / speed


# 4 ------------------------------------------------------------------------------------


def attending(
    scale=lambda d_n, d_r, d_c: (d_n + d_r) ** -0.5,
    content=lambda q, W, c: torch.einsum("bhtn,hnc,bsc->bhts", q, W, c),
    place=lambda q, k: torch.einsum("bhtr,bsr->bhts", q, k),
    weigh=lambda x, mask: x.masked_fill(~mask, -torch.inf).softmax(-1),
    up=lambda W: W,
):
    """absorbed with one thing changed."""

    def answer(q, q_rope, c, k_rope, W_UK, W_UV, mask):
        latent = torch.einsum("bhtn,hnc->bhtc", q, W_UK)
        if content is None:
            scores = torch.einsum("bhtc,bsc->bhts", latent, c)
        else:
            scores = content(q, W_UK, c)
        scores = scores + place(q_rope, k_rope)
        scores = scores * scale(q.shape[-1], q_rope.shape[-1], c.shape[-1])
        p = weigh(scores, mask)
        out = torch.einsum("bhts,bsc->bhtc", p, c)
        return torch.einsum("bhtc,hvc->bhtv", out, up(W_UV))

    return answer


def keys_of_all_heads(q, q_rope, c, k_rope, W_UK, W_UV, mask):
    return cached.expanded(q, q_rope, c, k_rope, W_UK, W_UV, mask)


def values_of_all_heads(q, q_rope, c, k_rope, W_UK, W_UV, mask):
    latent = torch.einsum("bhtn,hnc->bhtc", q, W_UK)
    scores = torch.einsum("bhtc,bsc->bhts", latent, c)
    scores = scores + torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)
    scores = scores * (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return p @ torch.einsum("hvc,bsc->bhsv", W_UV, c)


def by_matmul(q, q_rope, c, k_rope, W_UK, W_UV, mask):
    """All heads' queries as rows of one matrix: one product per text."""
    B, H, T, d_n = q.shape
    latent = (q @ W_UK).reshape(B, H * T, -1)
    scores = latent @ c.mT + q_rope.reshape(B, H * T, -1) @ k_rope.mT
    scores = scores.reshape(B, H, T, -1) / (d_n + q_rope.shape[-1]) ** 0.5
    p = torch.where(mask, scores, -torch.inf).softmax(-1)
    out = (p.reshape(B, H * T, -1) @ c).reshape(B, H, T, -1)
    return out @ W_UV.mT


def head_by_head(q, q_rope, c, k_rope, W_UK, W_UV, mask):
    """Queries of both parts side by side, against c and k_rope side by side."""
    keys = torch.cat([c, k_rope], -1)
    outs = []
    for h in range(q.shape[1]):
        query = torch.cat([q[:, h] @ W_UK[h], q_rope[:, h]], -1)
        scores = query @ keys.mT * (q.shape[-1] + q_rope.shape[-1]) ** -0.5
        p = (scores + (~mask[:, 0]).float() * -1e30).softmax(-1)
        outs.append(p @ c @ W_UV[h].T)
    return torch.stack(outs, 1)


N, A, D, L = "cache_bytes", "append", "decode_time", "absorbed"


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (N, by_groups),
        (N, by_match),
        (A, by_scatter),
        (A, token_by_token),
        (A, cached.append),
        (D, by_branches),
        (D, by_intensity),
        (L, by_matmul),
        (L, head_by_head),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


@pytest.mark.parametrize("seed", range(3))
def test_no_two_mistakes_come_to_the_same(seed):
    torch.manual_seed(seed)
    sets = []
    for kind in cached.KINDS:
        made = [checks.wrong_bytes(kind, *s[:3], **s[3]) for s in checks.SHAPES]
        # over all shapes: one of them tells each two apart
        sets.append({w: [x[w] for x in made] for w in made[0]})
    lengths, counts = torch.tensor([3, 1, 5]), torch.tensor([2, 4, 1])
    buffer, new, _ = checks.case(lengths, counts, 4, 9)
    sets.append(
        {
            words: [make()]
            for words, make in checks.wrong_places(buffer, new, lengths, counts).items()
        }
    )
    heads = checks.wrong_heads(**checks.heads(4, 6))
    sets.append({words: [x] for words, x in heads.items()})
    times = []
    for batch, context, sizes, bandwidth, speed in checks.STEPS:
        rates = {"bandwidth": bandwidth, "speed": speed}
        times.append(checks.wrong_times(batch, context, **sizes, **rates))
    sets.append({words: [each[words] for each in times] for words in times[0]})
    for wrong in sets:
        for (words, x), (others, y) in itertools.combinations(wrong.items(), 2):
            same = all(close(p, q, 1e-4) for p, q in zip(x, y, strict=True))
            assert not same, (words, others)


test_wrong_answers = rejects(
    "07-inference/01-prefill-decode-kv-cache",
    [
        Wrong(N, bytes_by(mha=lambda H, D: H * D), "MHA: half of it"),
        Wrong(N, bytes_by(mha=lambda H, D: 2 * H), "head_dim is missing"),
        Wrong(N, bytes_by(gqa=lambda H, D, G: 2 * H * D), "that is the cache of MHA"),
        Wrong(N, bytes_by(gqa=lambda H, D, G: 2 * H // G * D), "the number of groups"),
        Wrong(N, bytes_by(mqa=lambda H, D: 2 * H * D), "that is the cache of MHA"),
        Wrong(N, bytes_by(mqa=lambda H, D: D), "MQA: half of it"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: c), "key with positions is missing"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: 2 * (c + r)), "there is no pair"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: 2 * c + r), "only the latent is"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: c + H * r), "for each head was"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: H * (c + r)), "share one latent"),
        Wrong(N, bytes_by(mla=lambda H, D, c, r: c * r), "side by side"),
        Wrong(N, bytes_by(total=lambda n, x, b: x * b), "that is one layer"),
        Wrong(N, bytes_by(total=lambda n, x, b: n * x), "numbers were counted"),
        Wrong(N, bytes_by(total=lambda n, x, b: n * x / b), "divided by bytes_each"),
        Wrong(N, bytes_by(refuse=False), "went through"),
        Wrong(N, key_error, "it was KeyError"),
        Wrong(A, appending(count=lambda b, counts, T: T), "padding was written"),
        Wrong(A, appending(start=lambda b, n, m: int(n[b]) + 1), "one place too late"),
        Wrong(
            A,
            appending(start=lambda b, n, m: max(int(n[b]) - 1, 0)),
            "one place too early",
        ),
        Wrong(
            A,
            appending(count=lambda b, m, T: max(int(m[b]) - 1, 0)),
            "one token too few",
        ),
        Wrong(
            A,
            appending(count=lambda b, m, T: min(int(m[b]) + 1, T)),
            "one token too many",
        ),
        Wrong(
            A, appending(start=lambda b, n, m: int(n.max())), "behind the longest one"
        ),
        Wrong(
            A, appending(start=lambda b, n, m: int(n.min())), "behind the shortest one"
        ),
        Wrong(A, appending(start=lambda b, n, m: int(n[0])), "length of row 0"),
        Wrong(A, appending(start=lambda b, n, m: 0), "from place 0 on"),
        Wrong(A, appending(row=lambda b: 0), "new tokens of row 0"),
        Wrong(A, appending(start=lambda b, n, m: int(m[b])), "places counts[b]"),
        Wrong(
            A,
            appending(first=lambda b, m, T: T - int(m[b])),
            "padded on the right",
        ),
        Wrong(A, appending(after=lambda n, m, T: n + T), "count padding"),
        Wrong(A, appending(after=lambda n, m, T: n.clone()), "the old lengths"),
        Wrong(A, appending(after=lambda n, m, T: m.clone()), "counts are returned"),
        Wrong(A, appending(after=lambda n, m, T: n + m - 1), "one too small"),
        Wrong(A, appending(refuse="late"), "other rows were written before"),
        Wrong(A, appending(refuse="never"), "nothing was said"),
        Wrong(A, appending(refuse="padding"), "padding needs no place"),
        Wrong(A, appending(refuse="last place"), "a row may have C tokens"),
        Wrong(A, in_place_lengths, "changed in place"),
        Wrong(A, into_a_copy, "the buffer is as it was"),
        Wrong(A, index_error, "it was IndexError"),
        Wrong(A, nothing_returned, "returned None"),
        Wrong(D, timing(join=lambda x, y: x + y), "were added"),
        Wrong(D, timing(join=min), "the shorter of the two"),
        Wrong(D, timing(join=lambda x, y: x), "only reading"),
        Wrong(D, timing(join=lambda x, y: y), "only computing"),
        Wrong(D, timing(read=lambda b, s, w, c: b * (w + s * c)), "for every row"),
        Wrong(D, timing(read=lambda b, s, w, c: w + s * c), "the cache of one row"),
        Wrong(D, timing(read=lambda b, s, w, c: w), "the cache is missing"),
        Wrong(D, timing(read=lambda b, s, w, c: w + b * c), "one token per row"),
        Wrong(D, timing(work=lambda b, s, f: f), "the work of one row"),
        Wrong(D, timing(work=lambda b, s, f: b * s * f), "only the new tokens"),
        Wrong(D, timing(after=lambda t, b: b / t), "tokens per second"),
        Wrong(D, timing(after=lambda t, b: t / b), "the time per token"),
        Wrong(L, attending(place=lambda q, k: 0), "part with positions is missing"),
        Wrong(L, attending(content=lambda q, W, c: 0), "without positions is missing"),
        Wrong(L, attending(scale=lambda n, r, c: n**-0.5), "scale is 1/√d_n"),
        Wrong(L, attending(scale=lambda n, r, c: c**-0.5), "scale is 1/√d_c"),
        Wrong(L, attending(scale=lambda n, r, c: (c + r) ** -0.5), "1/√(d_c + d_r)"),
        Wrong(L, attending(scale=lambda n, r, c: 1.0), "scale is missing"),
        Wrong(L, attending(scale=lambda n, r, c: 1 / (n + r)), "twice"),
        Wrong(L, attending(weigh=lambda x, m: x.softmax(-1) * m), "after the softmax"),
        Wrong(L, attending(weigh=lambda x, m: x.softmax(-1)), "the mask is missing"),
        Wrong(
            L,
            attending(weigh=lambda x, m: x.masked_fill(~m, -1e9).softmax(-2)),
            "over the queries",
        ),
        Wrong(
            L,
            attending(
                content=lambda q, W, c: torch.einsum("bhtn,nc,bsc->bhts", q, W[0], c)
            ),
            "W_UK of head 0",
        ),
        Wrong(L, attending(up=lambda W: W[:1].expand_as(W)), "W_UV of head 0"),
        Wrong(L, keys_of_all_heads, "the values are right, but"),
        Wrong(L, values_of_all_heads, "the values are right, but"),
    ],
)
