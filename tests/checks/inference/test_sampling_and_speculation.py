"""Wrong answers to the exercises of 07-inference/05-sampling-and-speculation, each with
the diagnosis that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.inference import sampling_and_speculation as checks
from llmlab.checks.inference.sampling_and_speculation import check
from llmlab.inference.sampling_and_speculation import draw
from tests.checks.rejecting import Wrong, rejects, verdict

INF = float("inf")

# 1 ------------------------------------------------------------------------------------


def top_p_row_by_row(logits, p):
    out = torch.full_like(logits, -INF)
    for r, row in enumerate(logits):
        total = 0.0
        probs = row.softmax(0).tolist()
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if total >= p:
                break
            out[r, i] = row[i]
            total += probs[i]
    return out


def top_p_as_in_transformers(logits, p):
    ascending, order = logits.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -INF)


def top_p_by_count(logits, p):
    ordered, order = logits.sort(-1, descending=True)
    sums = ordered.softmax(-1).cumsum(-1)
    n = (sums < p).sum(-1, keepdim=True) + 1
    rank = order.argsort(-1)
    return torch.where(rank < n, logits, -INF)


def crossing_gone(logits, p):
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    gone = ordered.cumsum(-1) > p
    return logits.masked_fill(gone.scatter(-1, order, gone), -INF)


def one_too_many(logits, p):
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    gone = ordered.cumsum(-1) >= p
    gone[:, 2:] = gone[:, :-2].clone()
    gone[:, :2] = False
    return logits.masked_fill(gone.scatter(-1, order, gone), -INF)


def not_sorted(logits, p):
    probs = logits.softmax(-1)
    return logits.masked_fill(probs.cumsum(-1) - probs >= p, -INF)


def smallest(logits, p):
    ordered, order = logits.softmax(-1).sort(-1)
    gone = ordered.cumsum(-1) - ordered >= p
    return logits.masked_fill(gone.scatter(-1, order, gone), -INF)


def sorted_places(logits, p):
    ordered, _ = logits.softmax(-1).sort(-1, descending=True)
    return logits.masked_fill(ordered.cumsum(-1) - ordered >= p, -INF)


def gathered(logits, p):
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    gone = ordered.cumsum(-1) - ordered >= p
    return logits.masked_fill(gone.gather(-1, order), -INF)


def over_batch(logits, p):
    ordered, order = logits.softmax(0).sort(0, descending=True)
    gone = ordered.cumsum(0) - ordered >= p
    return logits.masked_fill(gone.scatter(0, order, gone), -INF)


def min_p(logits, p):
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.max(-1, keepdim=True).values, -INF)


def zeros_for_gone(logits, p):
    kept = top_p_as_in_transformers(logits, p)
    return torch.where(kept.isinf(), torch.zeros_like(kept), kept)


def renormalised(logits, p):
    return top_p_as_in_transformers(logits, p).softmax(-1)


def from_the_tail(logits, p):
    return top_p_as_in_transformers(logits, 1 - p)


def with_ties(logits, p):
    ordered, _ = logits.softmax(-1).sort(-1, descending=True)
    n = ((ordered.cumsum(-1) - ordered) < p).sum(-1, keepdim=True)
    least = ordered.gather(-1, n - 1)
    return logits.masked_fill(logits.softmax(-1) < least - 1e-12, -INF)


def sum_over_batch(logits, p):
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    gone = ordered.cumsum(0) - ordered >= p
    return logits.masked_fill(gone.scatter(-1, order, gone), -INF)


def left_sorted(logits, p):
    ordered = logits.sort(-1, descending=True).values
    probs = ordered.softmax(-1)
    return ordered.masked_fill(probs.cumsum(-1) - probs >= p, -INF)


def at_equal_too(logits, p):
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    gone = ordered.cumsum(-1) - ordered > p
    return logits.masked_fill(gone.scatter(-1, order, gone), -INF)


def always_070(logits, p):
    return top_p_as_in_transformers(logits, 0.7 if logits.any() else p)


def top_p_in_place(logits, p):
    kept = top_p_as_in_transformers(logits, p)
    logits[kept.isinf()] = -INF
    return logits


# 2 ------------------------------------------------------------------------------------


def accept_by_cumprod(p, q, drafted, u):
    """All ratios at once, as in transformers."""
    n = len(drafted)
    rows = torch.arange(n)
    x = torch.tensor(drafted, dtype=torch.long)
    stays = u[:n] < p[rows, x] / q[rows, x]
    kept = int(stays.long().cumprod(0).sum())
    end = p[kept]
    if kept < n:
        end = (end - q[kept]).clamp(min=0)
        end = end / end.sum()
    return [*drafted[:kept], draw(end, u[-1])]


def accept_by_padding(p, q, drafted, u):
    """With a row of zeros after q, the bonus is a correction, too."""
    q = torch.cat([q, torch.zeros_like(p[:1])])
    i = 0
    while i < len(drafted) and u[i] * q[i, drafted[i]] < p[i, drafted[i]]:
        i += 1
    more = torch.relu(p[i] - q[i])
    token = int((more.cumsum(0) / more.sum() <= u[-1]).sum())
    return (*drafted[:i], token)


def speculated(
    stays=lambda u, p, q: u < p / q,
    rest=lambda p, q, i: (p[i] - q[i]).clamp(min=0),
    last=lambda p, q: p[-1],
    coin=lambda u, i: u[i],
    end=lambda u, i: u[-1],
    kept=lambda drafted, i: drafted[:i],
    normal=True,
    take=draw,
):
    """accept with one thing changed."""

    def answer(p, q, drafted, u):
        for i, x in enumerate(drafted):
            if not stays(coin(u, i), p[i, x], q[i, x]):
                r = rest(p, q, i)
                if normal:
                    r = r / r.sum()
                return [*kept(drafted, i), take(r, end(u, i))]
        return [*drafted, take(last(p, q), u[-1])]

    return answer


def no_bonus(p, q, drafted, u):
    for i, x in enumerate(drafted):
        if u[i] >= p[i, x] / q[i, x]:
            r = (p[i] - q[i]).clamp(min=0)
            return [*drafted[:i], draw(r / r.sum(), u[-1])]
    return drafted


def no_correction(p, q, drafted, u):
    kept = []
    for i, x in enumerate(drafted):
        if u[i] >= p[i, x] / q[i, x]:
            return kept
        kept.append(x)
    return [*kept, draw(p[-1], u[-1])]


def neither(p, q, drafted, u):
    return no_correction(p, q, drafted, u)[: len(drafted)]


def no_break(p, q, drafted, u):
    kept = []
    for i, x in enumerate(drafted):
        if u[i] < p[i, x] / q[i, x]:
            kept.append(x)
        else:
            r = (p[i] - q[i]).clamp(min=0)
            kept.append(draw(r / r.sum(), u[-1]))
    kept.append(draw(p[-1], u[-1]))
    return kept


def filtered(p, q, drafted, u):
    kept = [x for i, x in enumerate(drafted) if u[i] < p[i, x] / q[i, x]]
    return [*kept, draw(p[-1], u[-1])]


def all_thrown_away(p, q, drafted, u):
    for i, x in enumerate(drafted):
        if u[i] >= p[i, x] / q[i, x]:
            return [draw(p[0], u[-1])]
    return [*drafted, draw(p[-1], u[-1])]


def three_only(p, q, drafted, u):
    return accept_by_cumprod(p[:4], q[:3], drafted[:3], u) if drafted else [0]


def needs_a_draft(p, q, drafted, u):
    return accept_by_cumprod(p, q, drafted, u) if drafted else []


# 3 ------------------------------------------------------------------------------------


def lookup_by_text(tokens, count, longest):
    """By comparing tuples of all windows of a size."""
    for n in reversed(range(1, longest + 1)):
        windows = list(zip(*(tokens[i:] for i in range(n)), strict=False))[:-1]
        if windows and tuple(tokens[-n:]) in windows:
            start = windows.index(tuple(tokens[-n:])) + n
            return list(tokens[start : min(start + count, len(tokens))])
    return []


def lookup_by_growing(tokens, count, longest):
    best, at = 0, None
    for end in range(1, len(tokens)):
        n = 0
        while n < min(longest, end) and tokens[end - 1 - n] == tokens[-1 - n]:
            n += 1
        if n > best:
            best, at = n, end
    return [] if at is None else tokens[at : at + count]


def found(
    sizes=lambda longest, T: range(min(longest, T - 1), 0, -1),
    starts=lambda T, n: range(T - n),
    cut=lambda t, s, n, c: t[s + n : s + n + c],
):
    """lookup with one thing changed."""

    def answer(tokens, count, longest):
        for n in sizes(longest, len(tokens)):
            for s in starts(len(tokens), n):
                if tokens[s : s + n] == tokens[-n:]:
                    return cut(tokens, s, n, count)
        return []

    return answer


def prefix(tokens, count, longest):
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for s in range(1, len(tokens)):
            if tokens[s : s + n] == tokens[:n]:
                return tokens[s + n : s + n + count]
    return []


def none_if_nothing(tokens, count, longest):
    return lookup_by_growing(tokens, count, longest) or None


# 4 ------------------------------------------------------------------------------------


def mask_by_walking(parents, past):
    n = len(parents)
    mask = torch.zeros(n, past + n).bool()
    mask[:, :past] = True
    for i in range(n):
        j = i
        while j >= 0:
            mask[i, past + j] = True
            j = parents[j]
    return mask


def mask_by_powers(parents, past):
    n = len(parents)
    step = torch.eye(n)
    for i, j in enumerate(parents):
        if j >= 0:
            step[i, j] = 1
    return torch.cat([torch.ones(n, past), step.matrix_power(n)], 1) > 0


def causal(parents, past):
    n = len(parents)
    return torch.ones(n, past + n).tril(past).bool()


def only_parent(parents, past):
    n = len(parents)
    mask = torch.zeros(n, past + n).bool()
    mask[:, :past] = True
    for i, j in enumerate(parents):
        mask[i, past + i] = True
        if j >= 0:
            mask[i, past + j] = True
    return mask


def not_itself(parents, past):
    n = len(parents)
    mask = mask_by_walking(parents, past)
    mask[torch.arange(n), past + torch.arange(n)] = False
    return mask


def transposed(parents, past):
    mask = mask_by_walking(parents, past)
    return torch.cat([mask[:, :past], mask[:, past:].T], 1)


def hidden_cache(parents, past):
    mask = mask_by_walking(parents, past)
    mask[:, :past] = False
    return mask


def cache_last(parents, past):
    return mask_by_walking(parents, past).roll(-past, 1)


def inverted(parents, past):
    return ~mask_by_walking(parents, past)


def without_root(parents, past):
    n = len(parents)
    mask = torch.zeros(n, past + n).bool()
    mask[:, :past] = True
    for i in range(n):
        j = i
        while j > 0:
            mask[i, past + j] = True
            j = parents[j]
    mask[0, past] = True
    return mask


def up_to_zero(parents, past):
    mask = without_root(parents, past)
    mask[0, past] = False
    return mask


def root_after_last(parents, past):
    n = len(parents)
    mask = torch.zeros(n, past + n).bool()
    mask[:, :past] = True
    for i, parent in enumerate(parents):
        mask[i] |= mask[parent]
        mask[i, past + parent] = mask[i, past + i] = True
    return mask


def with_siblings(parents, past):
    mask = mask_by_walking(parents, past)
    for i, a in enumerate(parents):
        for j, b in enumerate(parents):
            if a == b:
                mask[i, past + j] = True
    return mask


def floats(parents, past):
    return mask_by_walking(parents, past).float()


def no_columns_for_the_cache(parents, past):
    return mask_by_walking(parents, past)[:, past:]


def past_of_three(parents, past):
    return mask_by_walking(parents, 3)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("keep_top_p", top_p_row_by_row),
        ("keep_top_p", top_p_as_in_transformers),
        ("keep_top_p", top_p_by_count),
        ("accept", accept_by_cumprod),
        ("accept", accept_by_padding),
        ("lookup", lookup_by_text),
        ("lookup", lookup_by_growing),
        ("tree_mask", mask_by_walking),
        ("tree_mask", mask_by_powers),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


T, A, L, M = "keep_top_p", "accept", "lookup", "tree_mask"
test_wrong_answers = rejects(
    "07-inference/05-sampling-and-speculation",
    [
        Wrong(T, crossing_gone, "the token that crosses p is gone"),
        Wrong(T, one_too_many, "one token too many"),
        Wrong(T, not_sorted, "in the order of the vocabulary"),
        Wrong(T, smallest, "the smallest tokens stay"),
        Wrong(T, sorted_places, "places in sorted order"),
        Wrong(T, gathered, "with `gather`"),
        Wrong(T, over_batch, "over the batch"),
        Wrong(T, min_p, "this is min-p"),
        Wrong(T, zeros_for_gone, "a logit of 0 is still drawn"),
        Wrong(T, renormalised, "these are probabilities"),
        Wrong(T, from_the_tail, "from 1 − p"),
        Wrong(T, with_ties, "also among equals"),
        Wrong(T, at_equal_too, "compare with `<`"),
        Wrong(T, always_070, "take p from the argument"),
        Wrong(T, sum_over_batch, "over the batch, in sorted order"),
        Wrong(T, left_sorted, "come back in sorted order"),
        Wrong(
            T, lambda x, p: top_p_as_in_transformers(x, p).log_softmax(-1), "logarithms"
        ),
        Wrong(T, top_p_in_place, "in place"),
        Wrong(A, speculated(stays=lambda u, p, q: u >= p / q), "u < p / q keeps"),
        Wrong(A, speculated(stays=lambda u, p, q: u < q / p), "upside down"),
        Wrong(A, speculated(stays=lambda u, p, q: u <= p / q), "not if u ≤ p / q"),
        Wrong(A, checks.without_rejected, "without the rejected token"),
        Wrong(
            A,
            speculated(rest=lambda p, q, i: (p[i + 1] - q[i]).clamp(min=0)),
            "p of the next place",
        ),
        Wrong(
            A,
            speculated(rest=lambda p, q, i: (p[i] - q[i]).clamp(min=0).softmax(0)),
            "a softmax of max(p − q, 0)",
        ),
        Wrong(A, speculated(end=lambda u, i: u[i + 1]), "with the next uniform"),
        Wrong(A, speculated(stays=lambda u, p, q: u < p), "as q drew it already"),
        Wrong(A, speculated(stays=lambda u, p, q: p >= q), "only if p ≥ q"),
        Wrong(
            A, speculated(rest=lambda p, q, i: p[i]), "the correction is drawn from p"
        ),
        Wrong(
            A, speculated(rest=lambda p, q, i: q[i]), "the correction is drawn from q"
        ),
        Wrong(A, speculated(normal=False), "not divided by its sum"),
        Wrong(
            A,
            speculated(rest=lambda p, q, i: (q[i] - p[i]).clamp(min=0)),
            "where p is larger",
        ),
        Wrong(A, speculated(rest=lambda p, q, i: (p[i] - q[i]).abs()), "|p − q|"),
        Wrong(A, speculated(rest=lambda p, q, i: (p[i] - q[i]).softmax(0)), "softmax"),
        Wrong(A, speculated(rest=lambda p, q, i: p[i + 1]), "of the next place"),
        Wrong(
            A, speculated(rest=lambda p, q, i: p[-1]), "the last row of p: it stands"
        ),
        Wrong(A, speculated(last=lambda p, q: q[-1]), "the bonus is drawn from q"),
        Wrong(A, speculated(last=lambda p, q: p[-2]), "the row before the last"),
        Wrong(A, no_bonus, "the bonus is missing"),
        Wrong(A, no_correction, "the correction is missing"),
        Wrong(A, neither, "bonus and correction are missing"),
        Wrong(A, no_break, "you go on after a rejection"),
        Wrong(A, filtered, "leave the rejected token out"),
        Wrong(A, speculated(kept=lambda d, i: d[: i + 1]), "kept, too"),
        Wrong(A, speculated(kept=lambda d, i: []), "before the rejected one are lost"),
        Wrong(A, all_thrown_away, "throws all away"),
        Wrong(A, speculated(end=lambda u, i: u[i]), "that decided the rejection"),
        Wrong(A, speculated(coin=lambda u, i: u[0]), "by the same uniform"),
        Wrong(A, speculated(coin=lambda u, i: u[-1]), "the last uniform decides"),
        Wrong(
            A,
            speculated(take=lambda p, u: int(p.argmax())),
            "the likeliest token at the end",
        ),
        Wrong(A, three_only, "wrong for none"),
        Wrong(A, needs_a_draft, "wrong for none"),
        Wrong(A, lambda p, q, d, u: torch.tensor(d), "tensor"),
        Wrong(L, found(starts=lambda T, n: reversed(range(T - n))), "the latest place"),
        Wrong(
            L,
            found(sizes=lambda n, T: range(1, min(n, T - 1) + 1)),
            "one token is looked for first",
        ),
        Wrong(L, found(sizes=lambda n, T: [n] if n < T else []), "only `longest`"),
        Wrong(
            L, found(sizes=lambda n, T: [1]), "one token is looked for first, or alone"
        ),
        Wrong(
            L,
            found(sizes=lambda n, T: range(min(n, T - 1), 1, -1)),
            "two tokens are the fewest",
        ),
        Wrong(
            L,
            found(sizes=lambda n, T: range(min(n, T) - 1, 0, -1)),
            "itself is not tried",
        ),
        Wrong(L, found(starts=lambda T, n: range(T - n + 1)), "find themselves at"),
        Wrong(
            L, found(starts=lambda T, n: range(T - n, -1, -1)), "find themselves there"
        ),
        Wrong(L, found(starts=lambda T, n: range(T - n - 1)), "one before"),
        Wrong(L, found(starts=lambda T, n: range(T - 2 * n + 1)), "may overlap"),
        Wrong(
            L,
            found(cut=lambda t, s, n, c: t[s + n - 1 : s + n - 1 + c]),
            "with the last token of the match",
        ),
        Wrong(L, found(cut=lambda t, s, n, c: t[s + n + 1 : s + n + 1 + c]), "skipped"),
        Wrong(L, found(cut=lambda t, s, n, c: t[s : s + c]), "begins with the match"),
        Wrong(L, found(cut=lambda t, s, n, c: t[s + n :]), "more than `count`"),
        Wrong(
            L, found(cut=lambda t, s, n, c: t[s + n : s + n + c - 1]), "one token fewer"
        ),
        Wrong(
            L, found(cut=lambda t, s, n, c: t[s + n : s + c]), "ends at start + count"
        ),
        Wrong(L, checks.looked_up_in_full, "was passed over"),
        Wrong(L, prefix, "the first tokens"),
        Wrong(L, none_if_nothing, "None"),
        Wrong(M, causal, "plain causal mask"),
        Wrong(M, only_parent, "not the parent's ancestors"),
        Wrong(M, not_itself, "does not see itself"),
        Wrong(M, transposed, "transposed"),
        Wrong(M, hidden_cache, "the cache is hidden"),
        Wrong(M, cache_last, "its columns come first"),
        Wrong(M, inverted, "where a node may look"),
        Wrong(M, without_root, "the root is not seen"),
        Wrong(M, up_to_zero, "not even by itself"),
        Wrong(M, root_after_last, "counts from the end"),
        Wrong(M, with_siblings, "the other children of its parent"),
        Wrong(M, floats, "bool"),
        Wrong(M, no_columns_for_the_cache, "(8, 11)"),
        Wrong(M, past_of_three, "take both from the arguments"),
    ],
)
