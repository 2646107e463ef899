"""Wrong answers to 07-inference/02-flash-attention, each with its diagnosis."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.checks.inference import flash_attention as checks
from llmlab.checks.inference.flash_attention import check
from llmlab.course.grading.checking import close
from llmlab.inference import flash_attention as flash
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def update(
    alpha=lambda m, new: (m - new).exp(),
    P=lambda S, m, new: (S - new[..., None]).exp(),
    of_l=True,
    of_O=True,
    old=True,
    safe=True,
    keep=lambda new: new,
    new_of=lambda m, S: torch.maximum(m, S.amax(-1)),
    after=lambda m, l, O: (m, l, O),
):
    """online_softmax with one thing changed."""

    def answer(m, l, O, S, V):
        new = new_of(m, S)
        base = torch.where(new == -torch.inf, 0.0, new) if safe else new
        a = alpha(m, base)
        p = P(S, m, base)
        l_new = p.sum(-1)
        O_new = p @ V
        if old:
            l_new = l_new + (a if of_l else 1) * l
            O_new = O_new + (a[..., None] if of_O else 1) * O
        return after(keep(new), l_new, O_new)

    return answer


def by_concatenation(m, l, O, S, V):
    """The old keys as one key of score m + log l and value O / l."""
    old = m + l.log()
    value = O / torch.where(l > 0, l, 1.0)[..., None]
    new = torch.maximum(m, S.amax(-1))
    base = new.nan_to_num(neginf=0.0)
    weights = torch.cat([old[..., None], S], -1)
    weights = (weights - base[..., None]).exp()
    O_new = weights[..., :1] * value + torch.einsum(
        "...tn,...nd->...td", weights[..., 1:], V
    )
    return new, weights.sum(-1), O_new


def key_by_key(m, l, O, S, V):
    for j in range(S.shape[-1]):
        s = S[..., j]
        new = m.maximum(s)
        base = new.masked_fill(new.isinf(), 0)
        a, p = (m - base).exp(), (s - base).exp()
        m, l = new, l * a + p
        O = O * a[..., None] + p[..., None] * V[..., j, :][..., None, :]
    return m, l, O


def in_place(m, l, O, S, V):
    new, l_new, O_new = flash.online_softmax(m, l, O, S, V)
    m.copy_(new)
    return m, l_new, O_new


def divided(m, l, O):
    return m, l, O / torch.where(l > 0, l, 1.0)[..., None]


def by_concatenated_scores(m, l, O, S, V):
    """Without the maximum: e of the scores themselves."""
    new = torch.maximum(m, S.amax(-1))
    l_new = l * m.exp() + S.exp().sum(-1)
    O_new = O * m.exp()[..., None] + S.exp() @ V
    return new, l_new / new.exp(), O_new / new.exp()[..., None]


def two_values(m, l, O, S, V):
    return flash.online_softmax(m, l, O, S, V)[1:]


def without_maximum(m, l, O, S, V):
    new = torch.maximum(m, S.amax(-1))
    return (
        new,
        l * m.exp() + S.exp().sum(-1),
        O * m.exp()[..., None] + S.exp() @ V,
    )


def paper_2022(m, l, O, S, V):
    """O divided by l in every step, and multiplied by it again."""
    new, l_new, _ = flash.online_softmax(m, l, O, S, V)
    base = flash.online_softmax.__globals__["finite"](new)
    P = (S - base[..., None]).exp()
    return new, l_new, ((m - base).exp() * l)[..., None] * O + P @ V


# 2 ------------------------------------------------------------------------------------


def merging(
    weigh=lambda m_a, m_b, m: ((m_a - m).exp(), (m_b - m).exp()),
    top=torch.maximum,
    safe=True,
    after=lambda m, l, O: (m, l, O),
    of_l=True,
    of_O=True,
):
    """merge with one thing changed."""

    def answer(m_a, l_a, O_a, m_b, l_b, O_b):
        m = top(m_a, m_b)
        base = torch.where(m == -torch.inf, 0.0, m) if safe else m
        a, b = weigh(m_a, m_b, base)
        l = a * l_a + b * l_b if of_l else l_a + l_b
        O = a[..., None] * O_a + b[..., None] * O_b if of_O else O_a + O_b
        return after(m, l, O)

    return answer


def merge_by_log_sum_exp(m_a, l_a, O_a, m_b, l_b, O_b):
    m = m_a.maximum(m_b)
    total = torch.logaddexp(m_a + l_a.log(), m_b + l_b.log())
    l = (total - m.nan_to_num(neginf=0)).exp()
    base = m.nan_to_num(neginf=0.0)[..., None]
    return (
        m,
        l,
        O_a * (m_a[..., None] - base).exp() + O_b * (m_b[..., None] - base).exp(),
    )


def merge_by_stacking(m_a, l_a, O_a, m_b, l_b, O_b):
    ms = torch.stack([m_a, m_b])
    m = ms.amax(0)
    w = torch.where(ms == -torch.inf, 0.0, (ms - m).exp())
    return (
        m,
        (w * torch.stack([l_a, l_b])).sum(0),
        (w[..., None] * torch.stack([O_a, O_b])).sum(0),
    )


def whole_side(m_a, l_a, O_a, m_b, l_b, O_b):
    """One query without keys decides for all."""
    if m_b.isinf().any():
        return m_a, l_a, O_a
    if m_a.isinf().any():
        return m_b, l_b, O_b
    return flash.merge(m_a, l_a, O_a, m_b, l_b, O_b)


def dropped(m_a, m_b, m):
    larger = (m_a > m_b).float()
    return larger, 1 - larger


# 3 ------------------------------------------------------------------------------------


def tiles_from_a_mask(T, S, rows, cols):
    visible = torch.ones(T, S).tril(S - T).bool()
    plan = []
    for r, c in itertools.product(range(0, T, rows), range(0, S, cols)):
        tile = visible[r : r + rows, c : c + cols]
        if tile.any():
            height, width = tile.shape
            plan.append((r, r + height, c, c + width, not bool(tile.all())))
    return plan


def tiles_by_counting(T, S, rows, cols):
    plan = []
    for i in range(-(-T // rows)):
        stop = S - T + min((i + 1) * rows, T)
        for j in range(max(0, -(-min(stop, S) // cols))):
            end = min(S, (j + 1) * cols)
            masked = end > S - T + i * rows + 1
            plan.append([i * rows, min(T, (i + 1) * rows), j * cols, end, masked])
    return plan


def tiles_with_none_for_blind(T, S, rows, cols):
    plan = flash.causal_tiles(T, S, rows, cols)
    return [tile for tile in plan if tile[0] % (2 * rows) == 0]


def halves(T, S, rows, cols):
    """Ends that are no whole numbers."""
    plan = flash.causal_tiles(T, S, rows, cols)
    return [(a, b, c, d + 0.4, masked) for a, b, c, d, masked in plan]


def masked_in_words(T, S, rows, cols):
    plan = flash.causal_tiles(T, S, rows, cols)
    return [(*tile[:4], "yes" if tile[4] else "") for tile in plan]


def tiles_of_tensors(T, S, rows, cols):
    plan = flash.causal_tiles(T, S, rows, cols)
    return [[torch.tensor(x) for x in tile] for tile in plan]


def exchanged(T, S, rows, cols):
    return flash.causal_tiles(T, S, cols, rows)


def pairs(T, S, rows, cols):
    return [tile[:4] for tile in flash.causal_tiles(T, S, rows, cols)]


planned = checks.planned


# 4 ------------------------------------------------------------------------------------


def gradient(
    P=lambda S, L: (S - L[..., None]).exp(),
    D=lambda O, dO, P, dP: (dO * O).sum(-1, keepdim=True),
    dS=lambda P, dP, D: P * (dP - D),
    dP=lambda O, dO, V: dO @ V.mT,
    safe=True,
):
    """score_gradient with one thing changed."""

    def answer(S, L, O, dO, V):
        L = torch.where(L.isneginf(), 0.0, L) if safe else L
        p = P(S, L)
        dp = dP(O, dO, V)
        return p, dS(p, dp, D(O, dO, p, dp))

    return answer


def gradient_by_einsum(S, L, O, dO, V):
    P = torch.exp(S - L.unsqueeze(-1)).nan_to_num(0.0)
    dP = torch.einsum("btd,bnd->btn", dO, V)
    D = torch.einsum("btd,btd->bt", dO, O)
    return P, P * dP - P * D[..., None]


def gradient_of_a_difference(S, L, O, dO, V):
    """dS = P ∘ (dO · (V_j − O_i))."""
    P = torch.where(S.isneginf(), 0.0, (S - L[..., None]).exp())
    apart = V[:, None] - O[:, :, None]
    return P, P * (dO[:, :, None] * apart).sum(-1)


def one_matrix(S, L, O, dO, V):
    return flash.score_gradient(S, L, O, dO, V)[1]


U, M, C, G = "online_softmax", "merge", "causal_tiles", "score_gradient"


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (U, by_concatenation),
        (U, key_by_key),
        (M, merge_by_log_sum_exp),
        (M, merge_by_stacking),
        (C, tiles_from_a_mask),
        (C, tiles_by_counting),
        (C, tiles_of_tensors),
        (G, gradient_by_einsum),
        (G, gradient_of_a_difference),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


@pytest.mark.parametrize("seed", range(4))
def test_no_two_mistakes_come_to_the_same(seed):
    torch.manual_seed(seed)
    state = checks.partial(torch.randn(2, 4, 6), 4)
    S = torch.randn(2, 4, 4) + torch.linspace(2, -2, 4)[:, None]
    sets = [checks.wrong_updates(*state, S, torch.randn(2, 4, 4))]
    b = checks.partial(torch.randn(2, 4, 6) + torch.linspace(2, -2, 4)[:, None], 4)
    sets.append(checks.wrong_merges(*state, *b))
    for wrong in sets:
        made = {words: value() for words, value in wrong.items()}
        for (words, x), (others, y) in itertools.combinations(made.items(), 2):
            same = all(close(p, q, 1e-4) for p, q in zip(x, y, strict=True))
            assert not same, (words, others)
    S, L, O, dO, V = checks.tile(4, 4, 4, 0)
    P, dS = flash.score_gradient(S, L, O, dO, V)
    for wrong, right in (
        (checks.wrong_P(S, L), P),
        (checks.wrong_dS(S, L, O, dO, V, P), dS),
    ):
        for x, y in itertools.combinations([right, *wrong.values()], 2):
            assert not close(x, y, 1e-4)
    plans = [
        [plan(*case) for case in checks.CASES]
        for plan in (flash.causal_tiles, *checks.wrong_plans().values())
    ]
    for x, y in itertools.combinations(plans, 2):
        assert x != y


test_wrong_answers = rejects(
    "07-inference/02-flash-attention",
    [
        Wrong(U, update(of_l=False), "the old l is not rescaled"),
        Wrong(U, update(of_O=False), "the old O is not rescaled"),
        Wrong(U, update(of_l=False, of_O=False), "the old l is not rescaled"),
        Wrong(U, update(alpha=lambda m, new: (new - m).exp()), "upside down in l"),
        Wrong(
            U,
            update(P=lambda S, m, new: (S - S.amax(-1, keepdim=True)).exp()),
            "the block's own maximum",
        ),
        Wrong(
            U,
            update(P=lambda S, m, new: (S - m[..., None]).exp()),
            "the new terms of l use the old maximum",
        ),
        Wrong(U, update(old=False), "the old l is missing"),
        Wrong(
            U,
            update(old=False, new_of=lambda m, S: S.amax(-1)),
            "m is that of this block alone",
        ),
        Wrong(U, update(safe=False), "NaN where a query has seen no key"),
        Wrong(
            U,
            update(keep=lambda new: new.nan_to_num(neginf=0.0)),
            "must stay −∞",
        ),
        Wrong(U, update(after=divided), "O is divided by l here"),
        Wrong(U, paper_2022, "our O was never divided by it"),
        Wrong(U, update(P=lambda S, m, new: S.softmax(-1)), "not divided by its sum"),
        Wrong(
            U,
            update(
                P=lambda S, m, new: torch.exp2(S - new[..., None]),
                alpha=lambda m, new: torch.exp2(m - new),
            ),
            "powers of 2",
        ),
        Wrong(U, by_concatenated_scores, "in the hundreds"),
        Wrong(U, in_place, "in place"),
        Wrong(U, two_values, "must return 3 tensors"),
        Wrong(
            U, update(new_of=lambda m, S: torch.minimum(m, S.amax(-1))), "the smaller"
        ),
        Wrong(
            U,
            update(new_of=lambda m, S: torch.maximum(m, S.amax(-1)).clamp(min=0)),
            "all scores may be negative",
        ),
        Wrong(
            U,
            update(new_of=lambda m, S: torch.maximum(m, S.max())),
            "one maximum for all queries: each",
        ),
        Wrong(U, without_maximum, "summed without its maximum"),
        Wrong(M, merging(of_l=False), "the two l were added as they are"),
        Wrong(M, merging(of_O=False), "the two O were added as they are"),
        Wrong(
            M,
            merging(lambda m_a, m_b, m: ((m_b - m).exp(), (m_a - m).exp())),
            "swapped",
        ),
        Wrong(
            M,
            merging(lambda m_a, m_b, m: ((m - m_a).exp(), (m - m_b).exp())),
            "upside down",
        ),
        Wrong(
            M,
            merging(lambda m_a, m_b, m: (torch.ones_like(m), (m_b - m).exp())),
            "only b's l is rescaled",
        ),
        Wrong(
            M,
            merging(lambda m_a, m_b, m: ((m_a - m).exp(), torch.ones_like(m))),
            "only a's l is rescaled",
        ),
        Wrong(M, merging(dropped), "of the other dropped"),
        Wrong(M, merging(safe=False), "NaN where a query has seen no key"),
        Wrong(M, merging(after=divided), "O is divided by l here"),
        Wrong(M, merging(top=lambda a, b: a), "rescaled to a's maximum"),
        Wrong(M, merging(top=lambda a, b: b), "rescaled to b's maximum"),
        Wrong(M, merging(top=torch.minimum), "the smaller"),
        Wrong(M, merging(top=torch.logaddexp), "log-sum-exp of both maxima"),
        Wrong(M, whole_side, "decide for each query"),
        Wrong(
            M,
            merging(after=lambda m, l, O: (m.nan_to_num(neginf=0.0), l, O)),
            "must stay −∞",
        ),
        Wrong(M, merging(after=lambda m, l, O: (m, l / 2, O / 2)), "a mean was taken"),
        Wrong(C, planned(past=lambda T, S: 0), "top left"),
        Wrong(C, planned(keep=lambda *_: True), "no tile is left out"),
        Wrong(
            C,
            planned(keep=lambda p0, p1, c0, c1: c0 < p1),
            "its last query sees its first key",
        ),
        Wrong(
            C, planned(keep=lambda p0, p1, c0, c1: c0 <= p1 + 1), "one tile too many"
        ),
        Wrong(
            C, planned(keep=lambda p0, p1, c0, c1: c0 <= p0), "the last one sees more"
        ),
        Wrong(C, planned(masked=lambda *_: True), "True for every tile"),
        Wrong(C, planned(masked=lambda *_: False), "False for every tile"),
        Wrong(C, planned(masked=lambda p0, p1, c0, c1: c1 > p0), "one key too early"),
        Wrong(
            C,
            planned(masked=lambda p0, p1, c0, c1: c1 - 1 > p1),
            "the first one sees least",
        ),
        Wrong(C, planned(clip=False), "run over the end"),
        Wrong(C, planned(full_cols=True), "beyond the last one"),
        Wrong(C, planned(whole=True), "do not fill a tile"),
        Wrong(C, planned(keys_outside=True), "the order is wrong"),
        Wrong(C, checks.last_key_first, "the first key comes first"),
        Wrong(C, checks.masked_by_number, "the numbers of the blocks"),
        Wrong(C, planned(past=lambda T, S: max(S - T, 0)), "cut off at 0"),
        Wrong(
            C,
            planned(
                keep=lambda p0, p1, c0, c1: c0 < p1,
                masked=lambda p0, p1, c0, c1: c1 > p0,
            ),
            "a query sees its own key",
        ),
        Wrong(C, halves, "c1 of a tile is 2.4"),
        Wrong(C, masked_in_words, "masked of a tile is 'yes'"),
        Wrong(C, exchanged, "are exchanged"),
        Wrong(C, tiles_with_none_for_blind, "lacks a tile"),
        Wrong(C, pairs, "each entry must be"),
        Wrong(G, gradient(P=lambda S, L: S.softmax(-1)), "the tile alone"),
        Wrong(G, gradient(P=lambda S, L: S.exp()), "L is missing"),
        Wrong(G, gradient(P=lambda S, L: (L[..., None] - S).exp()), "upside down"),
        Wrong(
            G, gradient(P=lambda S, L: S.exp() / L[..., None]), "a logarithm already"
        ),
        Wrong(G, gradient(dS=lambda P, dP, D: P * dP), "D is missing"),
        Wrong(
            G,
            gradient(D=lambda O, dO, P, dP: (P * dP).sum(-1, keepdim=True)),
            "over this tile",
        ),
        Wrong(G, gradient(dS=lambda P, dP, D: P * (dP + D)), "D is added"),
        Wrong(G, gradient(dS=lambda P, dP, D: P * (D - dP)), "the sign of dS"),
        Wrong(G, gradient(dS=lambda P, dP, D: P * dP - D), "after the product"),
        Wrong(G, gradient(dS=lambda P, dP, D: dP - D), "P is missing in dS"),
        Wrong(
            G,
            gradient(D=lambda O, dO, P, dP: (dO * O).mean(-1, keepdim=True)),
            "a mean over the channels",
        ),
        Wrong(
            G,
            gradient(dS=lambda P, dP, D: P * (dP - D) / 2),
            "divided by √D",
        ),
        Wrong(
            G,
            gradient(D=lambda O, dO, P, dP: (O * O).sum(-1, keepdim=True)),
            "Σ O ∘ O",
        ),
        Wrong(G, gradient(dP=lambda O, dO, V: O @ V.mT), "dP is O Vᵀ"),
        Wrong(G, gradient(safe=False), "NaN where a query sees no key"),
        Wrong(G, one_matrix, "must return 2 tensors"),
    ],
)
