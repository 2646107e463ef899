"""Wrong answers to 07-inference/06-fused-transformers, each with its diagnosis."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.checks.inference import fused_transformers as checks
from llmlab.checks.inference.fused_transformers import check, in_order, planned
from llmlab.course.grading.checking import close
from llmlab.inference import fused_transformers as fused
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def ordered(order: str):
    def answer(q, k, v, parts=1):
        return in_order(q, k, v, parts, order)

    return answer


def by_rows(q, k, v, parts=1):
    """Every row looked up."""
    rows = []
    for i in range(parts):
        for x in (q, k, v):
            n = len(x) // parts
            rows += [x[j] for j in range(i * n, i * n + n)]
    return torch.stack(rows)


def by_reshaping(q, k, v, parts=1):
    cut = [x.reshape(parts, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(cut, 1).flatten(0, 1)


def without_parts(q, k, v, parts=1):
    return torch.cat([q, k, v])


def along_the_columns(q, k, v, parts=1):
    return torch.cat([q, k, v], dim=-1)


def dealt(q, k, v, parts=1):
    cut = [torch.cat([x[i::parts] for i in range(parts)]) for x in (q, k, v)]
    return fused.pack_qkv(*cut, parts)


def q_whole(q, k, v, parts=1):
    return torch.cat([q, fused.pack_qkv(k[:0], k, v, parts)])


def repeated(q, k, v, parts=1):
    """Key heads for every query head."""
    times = len(q) // len(k)
    return torch.cat([q, *(torch.cat([x] * times) for x in (k, v))])


def transposed(q, k, v, parts=1):
    return fused.pack_qkv(q, k, v, parts).T


def backwards(q, k, v, parts=1):
    return torch.cat(fused.pack_qkv(q, k, v, parts).chunk(parts)[::-1])


def k_twice(q, k, v, parts=1):
    return fused.pack_qkv(q, k, k, parts)


def k_and_v_in_each(q, k, v, parts=1):
    return torch.cat([torch.cat([block, k, v]) for block in q.chunk(parts)])


def cut_as_q(q, k, v, parts=1):
    n = len(q) // parts
    return torch.cat([x[i * n : i * n + n] for i in range(parts) for x in (q, k, v)])


def wide_rows(q, k, v, parts=1):
    d = q.shape[1]
    return torch.cat([x.reshape(parts, -1, d) for x in (q, k, v)], 1).reshape(-1, d)


def weights_only(q, k, v, parts=1):
    return torch.cat([q, k, v], dim=1)


# 2 ------------------------------------------------------------------------------------


def norm(
    of=lambda x, r: r + x,
    mean=lambda s: s.square().mean(-1, keepdim=True),
    scale=lambda mean, eps: torch.rsqrt(mean + eps),
    weigh=lambda y, w: y * w,
    stream=lambda x, r, y: r + x,
    wide=lambda s: s.float(),
):
    """add_rms_norm with one thing changed."""

    def answer(x, residual, weight, eps):
        s = of(x, residual)
        w = wide(s)
        y = weigh((w * scale(mean(w), eps)).to(s.dtype), weight)
        return y, stream(x, residual, y)

    return answer


def by_vector_norm(x, residual, weight, eps):
    total = x + residual
    wide = total.float()
    d = wide.shape[-1]
    rms = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / d + eps).sqrt()
    return (wide / rms * weight.float()).to(total.dtype), total


def by_the_library(x, residual, weight, eps):
    total = residual.add(x)
    y = torch.nn.functional.rms_norm(total.float(), total.shape[-1:], eps=eps)
    return y.to(total.dtype) * weight, total


def in_place(x, residual, weight, eps):
    residual += x
    y, _ = fused.add_rms_norm(torch.zeros_like(x), residual, weight, eps)
    return y, residual


def exchanged(x, residual, weight, eps):
    return fused.add_rms_norm(x, residual, weight, eps)[::-1]


def only_normed(x, residual, weight, eps):
    return fused.add_rms_norm(x, residual, weight, eps)[0]


def to_float(x, residual, weight, eps):
    y, total = fused.add_rms_norm(x, residual, weight, eps)
    return y.float(), total.float()


def both_normed(x, residual, weight, eps):
    zero = torch.zeros_like(x)
    a = fused.add_rms_norm(x, zero, weight, eps)[0]
    b = fused.add_rms_norm(zero, residual, weight, eps)[0]
    return a + b, residual + x


# 3 ------------------------------------------------------------------------------------


def removal(tokens=None, places=None, starts=None):
    """remove_padding with one of the three changed."""

    def answer(x, mask):
        found = list(fused.remove_padding(x, mask))
        for i, change in enumerate((tokens, places, starts)):
            if change is not None:
                found[i] = change(x, mask)
        return tuple(found)

    return answer


def by_loops(x, mask):
    tokens, places, starts = [], [], [0]
    B, T = mask.shape
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                tokens.append(x[b, t])
                places.append(b * T + t)
        starts.append(len(tokens))
    return torch.stack(tokens), torch.tensor(places), torch.tensor(starts)


def by_boolean_index(x, mask):
    row, column = torch.where(mask.bool())
    lengths = torch.bincount(row, minlength=len(mask))
    edges = torch.zeros(len(mask) + 1, dtype=torch.long)
    edges[1:] = torch.cumsum(lengths, 0)
    return x[row, column], row * mask.shape[1] + column, edges


def inverted(x, mask):
    return fused.remove_padding(x, ~mask.bool())


def from_the_left(x, mask):
    """As if padding were always on the right."""
    T = mask.shape[1]
    front = torch.arange(T) < mask.bool().sum(1)[:, None]
    return fused.remove_padding(x, front)


def skips_empty(x, mask):
    lengths = mask.bool().sum(1)
    lengths = lengths[lengths > 0]
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])


def time_first(x, mask):
    column, row = mask.bool().T.nonzero(as_tuple=True)
    return x[row, column]


def zeroed(x, mask):
    return (x * mask[..., None].float()).flatten(0, 1)


def as_int32(x, mask):
    return fused.remove_padding(x, mask)[2].int()


def numbers_as_index(x, mask):
    return x[mask], *fused.remove_padding(x, mask)[1:]


def right_to_left(x, mask):
    tokens, places, starts = fused.remove_padding(x, mask)
    turned = torch.cat(
        [r.flip(0) for r in torch.arange(len(places)).split([*starts.diff()])]
    )
    return tokens[turned], places[turned], starts


def pairs(x, mask):
    tokens, _, starts = fused.remove_padding(x, mask)
    return tokens, mask.nonzero(), starts


def of_n_places(x, mask):
    tokens, places, starts = fused.remove_padding(x, mask)
    T = mask.shape[1]
    return tokens, places // T * len(tokens) + places % T, starts


def column_by_column(x, mask):
    places = (mask.T != 0).flatten().nonzero()[:, 0]
    tokens = x.transpose(0, 1).flatten(0, 1)[places]
    return tokens, places, fused.remove_padding(x, mask)[2]


def two_of_three(x, mask):
    return fused.remove_padding(x, mask)[:2]


# 4 ------------------------------------------------------------------------------------


def byte_by_byte(results):
    """A map of bytes in place of gaps."""
    placed = []
    for result in sorted(results, key=lambda r: r.size, reverse=True):
        others = [(at, at + r.size) for at, r in placed if r.meets(result)]
        top = max((stop for _, stop in others), default=0)
        taken = [any(a <= i < b for a, b in others) for i in range(top)] + [True]
        gaps, begin = [], None
        for i, busy in enumerate(taken):
            if not busy and begin is None:
                begin = i
            if busy and begin is not None:
                if i - begin >= result.size:
                    gaps.append((i - begin, begin))
                begin = None
        placed.append((min(gaps)[1] if gaps else top, result))
    return {r.name: at for at, r in placed}


def of_tensors(results):
    plan = fused.plan_buffers(results)
    return {name: torch.tensor(at) for name, at in plan.items()}


def in_halves(results):
    return {name: at / 2 for name, at in fused.plan_buffers(results).items()}


def a_list(results):
    plan = fused.plan_buffers(results)
    return [plan[r.name] for r in results]


def one_short(results):
    plan = fused.plan_buffers(results)
    return {name: max(0, at - 1) for name, at in plan.items()}


def last_ties_first(results):
    return fused.plan_buffers(results[::-1])


def all_at_0(results):
    return {r.name: 0 for r in results}


P, A, R, B = "pack_qkv", "add_rms_norm", "remove_padding", "plan_buffers"


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (P, by_rows),
        (P, by_reshaping),
        (A, by_vector_norm),
        (A, by_the_library),
        (R, by_loops),
        (R, by_boolean_index),
        (B, byte_by_byte),
        (B, of_tensors),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


@pytest.mark.parametrize("seed", range(3))
def test_no_two_mistakes_come_to_the_same(seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n * 4, 5) for n in (6, 2, 2))
    sets = [checks.wrong_packs(q, k, v, 2)]
    sets[0]["right"] = fused.pack_qkv(q, k, v, 2)
    x, residual = torch.randn(2, 4, 4) * 0.3
    weight = torch.randn(4) + 2
    sets += checks.wrong_norms(x, residual, weight, 0.5)
    for wrong, right in zip(
        sets[1:], fused.add_rms_norm(x, residual, weight, 0.5), strict=True
    ):
        wrong["right"] = right
    for wrong in sets:
        for (words, a), (others, b) in itertools.combinations(wrong.items(), 2):
            assert a.shape != b.shape or not close(a, b, 1e-4), (words, others)


def test_no_two_mistakes_of_padding_come_to_the_same():
    """Over all cases together."""
    torch.manual_seed(0)
    tables = [
        checks.padded(lengths, side)
        for lengths in checks.LENGTHS
        for side in ("right", "left")
    ]
    for part in range(3):
        made: dict[str, list] = {"right": []}
        for x, mask in tables:
            made["right"].append(fused.remove_padding(x, mask)[part])
            for words, value in checks.wrong_removals(x, mask)[part].items():
                made.setdefault(words, []).append(value)
        for (words, a), (others, b) in itertools.combinations(made.items(), 2):
            same = all(
                p.shape == q.shape and torch.equal(p, q)
                for p, q in zip(a, b, strict=True)
            )
            assert not same, (words, others)


def test_no_two_plans_come_to_the_same():
    plans = {
        words: [plan(results) for results in checks.cases()]
        for words, plan in checks.wrong_plans().items()
    }
    plans["right"] = [fused.plan_buffers(results) for results in checks.cases()]
    assert plans["right"] == [planned()(results) for results in checks.cases()]
    for (words, a), (others, b) in itertools.combinations(plans.items(), 2):
        assert a != b, (words, others)


test_wrong_answers = rejects(
    "07-inference/06-fused-transformers",
    [
        Wrong(P, ordered("qvk"), "k and v are exchanged"),
        Wrong(P, ordered("kvq"), "q comes last"),
        Wrong(P, ordered("kqv"), "k comes first"),
        Wrong(P, ordered("vkq"), "the order is v, k, q"),
        Wrong(P, without_parts, "`parts` is not taken"),
        Wrong(P, along_the_columns, "side by side along the input"),
        Wrong(P, dealt, "like cards"),
        Wrong(P, q_whole, "only k and v are cut"),
        Wrong(P, repeated, "nothing is repeated"),
        Wrong(P, transposed, "transposed"),
        Wrong(P, backwards, "in reverse order"),
        Wrong(P, k_twice, "k is there twice"),
        Wrong(P, k_and_v_in_each, "not all of them"),
        Wrong(P, cut_as_q, "as many rows as q's"),
        Wrong(P, wide_rows, "rows alone"),
        Wrong(A, exchanged, "exchanged"),
        Wrong(A, only_normed, "must return two tensors"),
        Wrong(A, norm(of=lambda x, r: x), "x alone was normed"),
        Wrong(A, norm(of=lambda x, r: r), "without x"),
        Wrong(A, both_normed, "each of the two was normed"),
        Wrong(A, norm(stream=lambda x, r, y: r), "it is the old one"),
        Wrong(A, norm(stream=lambda x, r, y: y), "the stream itself is never normed"),
        Wrong(A, norm(stream=lambda x, r, y: r + y), "added to the old stream"),
        Wrong(A, norm(stream=lambda x, r, y: x), "it is x"),
        Wrong(A, norm(weigh=lambda y, w: y), "`weight` is missing"),
        Wrong(A, norm(weigh=lambda y, w: y * (1 + w)), "1 + weight"),
        Wrong(A, norm(scale=lambda m, eps: torch.rsqrt(m)), "eps is missing"),
        Wrong(A, norm(scale=lambda m, eps: 1 / (m.sqrt() + eps)), "under it"),
        Wrong(
            A, norm(mean=lambda s: s.square().sum(-1, keepdim=True)), "their mean is"
        ),
        Wrong(A, norm(scale=lambda m, eps: 1 / (m + eps)), "the root is missing"),
        Wrong(A, norm(mean=lambda s: s.square().mean()), "each token has its own"),
        Wrong(
            A,
            norm(mean=lambda s: s.square().mean(0, keepdim=True)),
            "runs over the tokens",
        ),
        Wrong(
            A,
            norm(mean=lambda s: s.mean(-1, keepdim=True).square()),
            "the square of the mean",
        ),
        Wrong(A, norm(wide=lambda s: s), "float16"),
        Wrong(A, to_float, "float32"),
        Wrong(A, in_place, "in place"),
        Wrong(R, numbers_as_index, "make the mask bool"),
        Wrong(R, right_to_left, "from right to left"),
        Wrong(R, pairs, "one number for each"),
        Wrong(R, of_n_places, "a row of the table has T"),
        Wrong(R, column_by_column, "text after text"),
        Wrong(R, inverted, "1 for a token"),
        Wrong(R, from_the_left, "padding may be on the left"),
        Wrong(R, removal(starts=lambda x, m: m.long().sum(1)), "these are the lengths"),
        Wrong(
            R,
            removal(starts=lambda x, m: fused.remove_padding(x, m)[2][1:]),
            "the 0 at the front",
        ),
        Wrong(
            R,
            removal(starts=lambda x, m: fused.remove_padding(x, m)[2][:-1]),
            "the end is missing",
        ),
        Wrong(
            R,
            removal(starts=lambda x, m: torch.arange(len(m) + 1) * m.shape[1]),
            "only in the padded table",
        ),
        Wrong(R, removal(starts=skips_empty), "a text without tokens"),
        Wrong(R, removal(starts=as_int32), "it must be torch.int64"),
        Wrong(
            R,
            removal(places=lambda x, m: m.nonzero(as_tuple=True)[1]),
            "they count within each row",
        ),
        Wrong(
            R,
            removal(places=lambda x, m: torch.arange(int(m.sum()))),
            "they count the tokens",
        ),
        Wrong(
            R,
            removal(places=lambda x, m: fused.remove_padding(x, m)[1] + 1),
            "they begin at 1",
        ),
        Wrong(R, removal(tokens=time_first), "they go by time first"),
        Wrong(R, removal(tokens=zeroed), "padding was set to 0"),
        Wrong(
            R,
            removal(tokens=lambda x, m: x.flatten(0, 1)),
            "padding is still there",
        ),
        Wrong(R, two_of_three, "must return three tensors"),
        Wrong(B, planned(meets=lambda a, b: True), "nothing shares memory"),
        Wrong(B, all_at_0, "everything lies at 0"),
        Wrong(B, planned(order=lambda r: 0), "in the order given"),
        Wrong(B, planned(order=lambda r: r.size), "the smallest comes first"),
        Wrong(B, planned(order=lambda r: r.first), "by the launch that makes them"),
        Wrong(
            B,
            planned(meets=lambda a, b: a.first < b.last and b.first < a.last),
            "`last` is included",
        ),
        Wrong(B, planned(better=lambda gap, best: False), "the lowest gap that fits"),
        Wrong(B, planned(better=lambda gap, best: gap > best), "the largest gap"),
        Wrong(B, planned(better=lambda gap, best: gap <= best), "of equal gaps"),
        Wrong(B, planned(fits=lambda gap, size: gap > size), "as large as the result"),
        Wrong(B, planned(fits=lambda gap, size: True), "too small"),
        Wrong(B, planned(gaps=False), "gaps are left empty"),
        Wrong(B, planned(top=False), "one before it may reach higher"),
        Wrong(B, planned(at_end=True), "at the upper end"),
        Wrong(B, planned(front=False), "gaps begin at 0"),
        Wrong(B, planned(by_offset=False), "sort them"),
        Wrong(B, planned(behind_all=True), "behind those that it meets"),
        Wrong(B, planned(order=lambda r: (-r.size, r.first)), "that is made first"),
        Wrong(B, planned(lambda r: 0, lambda a, b: True), "all lie in a row"),
        Wrong(B, last_ties_first, "of equal sizes the last"),
        Wrong(B, in_halves, "where an int is asked"),
        Wrong(B, a_list, "must be a dict"),
        Wrong(B, one_short, "overlap, and both are needed"),
    ],
)
