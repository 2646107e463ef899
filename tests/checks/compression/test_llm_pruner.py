"""Wrong answers to the exercises of 06-compression/10-llm-pruner, each with the
diagnosis that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression import llm_pruner as checks
from llmlab.checks.compression.llm_pruner import check, right_heads, rows_of
from llmlab.compression import llm_pruner
from llmlab.compression.dependencies import Group, Member
from llmlab.compression.llm_pruner import Slopes
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def mlp_by_index_select(gate, up, down, keep):
    return (
        gate.index_select(0, keep),
        up.index_select(0, keep),
        torch.index_select(down, 1, keep).contiguous(),
    )


def mlp_in_a_loop(gate, up, down, keep):
    rows = [(gate[j], up[j], down[:, j]) for j in keep.tolist()]
    gates, ups, downs = zip(*rows, strict=True)
    return torch.stack(gates), torch.stack(ups), torch.stack(downs, dim=1)


def no_up(gate, up, down, keep):
    return gate[keep], up, down[:, keep]


def no_gate(gate, up, down, keep):
    return gate, up[keep], down[:, keep]


def no_down(gate, up, down, keep):
    return gate[keep], up[keep], down


def rows_of_down(gate, up, down, keep):
    return gate[keep], up[keep], down[keep]


def transposed(gate, up, down, keep):
    return gate[:, keep], up[:, keep], down[keep]


def gone(gate, up, down, keep):
    rest = [j for j in range(len(gate)) if j not in keep.tolist()]
    return gate[rest], up[rest], down[:, rest]


def sorted_channels(gate, up, down, keep):
    return mlp_in_a_loop(gate, up, down, keep.sort().values)


def by_a_mask(gate, up, down, keep):
    stays = torch.zeros(len(gate), dtype=torch.bool)
    stays[keep] = True
    return gate[keep], up[keep], down[:, stays]


def down_transposed(gate, up, down, keep):
    return gate[keep], up[keep], down.T[keep]


def gate_twice(gate, up, down, keep):
    return gate[keep], gate[keep], down[:, keep]


def first_channels(gate, up, down, keep):
    return mlp_in_a_loop(gate, up, down, torch.arange(len(keep)))


def zeros(gate, up, down, keep):
    stays = torch.zeros(len(gate))
    stays[keep] = 1
    return gate * stays[:, None], up * stays[:, None], down * stays


def zeros_in_place(gate, up, down, keep):
    gate[0] = 0
    return mlp_by_index_select(gate, up, down, keep)


# 2 ------------------------------------------------------------------------------------


def heads_by_rows(q, k, v, o, keep, head_dim):
    return right_heads(q, k, v, o, keep, head_dim)


def heads_by_a_mask(q, k, v, o, keep, head_dim):
    K = len(k) // head_dim
    stays = torch.zeros(K, dtype=torch.bool)
    stays[keep] = True
    few = stays.repeat_interleave(head_dim)
    many = stays.repeat_interleave(len(q) // K)
    return q[many], k[few], v[few], o[:, many]


def cut(queries=None, few=None, columns=None, only="qkvo"):
    """cut_heads with other rows for some."""

    def answer(q, k, v, o, keep, head_dim):
        shared = len(q) // len(k)
        K = len(k) // head_dim
        rows = rows_of(keep, shared * head_dim)
        its = rows if queries is None else queries(keep, head_dim, shared, K)
        heads = rows_of(keep, head_dim)
        heads = heads if few is None else few(keep, head_dim, shared, K)
        across = its if columns is None else columns(keep, head_dim, shared, K)
        return (
            q[its] if "q" in only else q,
            k[heads] if "k" in only else k,
            v[heads] if "v" in only else v,
            o[:, across] if "o" in only else o,
        )

    return answer


def strided(keep, head_dim, shared, K):
    heads = torch.cat([keep + j * K for j in range(shared)]).sort().values
    return rows_of(heads, head_dim)


def aligned(keep, head_dim, shared, K):
    return rows_of(keep, shared * head_dim)


def as_many_as_k(keep, head_dim, shared, K):
    return rows_of(keep, head_dim)


def single(keep, head_dim, shared, K):
    return keep


def rest(keep, K):
    return torch.tensor([u for u in range(K) if u not in keep.tolist()])


def every_kth(keep, head_dim, shared, K):
    return (torch.arange(head_dim)[:, None] * K + keep).flatten()


def every_kth_wide(keep, head_dim, shared, K):
    return every_kth(keep, shared * head_dim, 1, K)


def single_of_the_group(keep, head_dim, shared, K):
    return rows_of(keep, shared)


def first_of_the_group(keep, head_dim, shared, K):
    return rows_of(keep * shared, head_dim)


def two_of_the_group(keep, head_dim, shared, K):
    return rows_of(keep, 2 * head_dim)


def head_first(q, k, v, o, keep, head_dim):
    """As if row 0 of each head came first, then row 1 of each."""
    shared = len(q) // len(k)
    queries = rows_of(keep, shared)

    def of(w, heads):
        return w.view(head_dim, -1, w.shape[1])[:, heads].flatten(0, 1)

    return of(q, queries), of(k, keep), of(v, keep), of(o.T, queries).T


def rows_of_o(q, k, v, o, keep, head_dim):
    """Where o has so many rows."""
    right = right_heads(q, k, v, o, keep, head_dim)
    rows = rows_of(keep, len(q) // len(k) * head_dim)
    return (*right[:3], o[rows % len(o)])


# 3 ------------------------------------------------------------------------------------


def importance_by_the_package(weights, grads, axes):
    names = [str(i) for i in range(len(weights))]
    units = weights[0].shape[axes[0]]
    each = torch.arange(units)[:, None]
    members = tuple(
        Member(n, axis, units, each) for n, axis in zip(names, axes, strict=True)
    )
    slopes = {n: Slopes(g, g) for n, g in zip(names, grads, strict=True)}
    return llm_pruner.group_importance(
        dict(zip(names, weights, strict=True)), slopes, Group("g", units, members)
    )


def importance_by_transposing(weights, grads, axes):
    products = []
    for w, g, axis in zip(weights, grads, axes, strict=True):
        product = (w * g).abs()
        products.append(product if axis == 0 else product.T)
    return torch.cat(products, dim=1).sum(1)


def importance(score=None, join=None, axes_of=lambda axes: axes):
    """group_importance with one thing changed."""

    def answer(weights, grads, axes):
        rule = score or (lambda w, g, dim: (w * g).abs().sum(dim))
        axes = axes_of(axes)
        found = [
            rule(w, g, 1 - a) for w, g, a in zip(weights, grads, axes, strict=True)
        ]
        found = torch.stack(found)
        return found.sum(0) if join is None else join(found)

    return answer


def three_members(weights, grads, axes):
    return importance()(weights[:3], grads[:3], axes[:3])


def scaled_in_place(weights, grads, axes):
    weights[0].mul_(grads[0])
    return weights[0].abs().sum(1)


# 4 ------------------------------------------------------------------------------------


def units_by_topk(scores, ratio, keep_first, keep_last):
    kept = []
    for i, s in enumerate(scores):
        count = len(s)
        if keep_first <= i < len(scores) - keep_last:
            count -= int(len(s) * ratio)
        kept.append(s.topk(count).indices.sort().values)
    return kept


def units_by_a_border(scores, ratio, keep_first, keep_last):
    kept = [torch.arange(len(s)) for s in scores]
    for i in range(keep_first, len(scores) - keep_last):
        lowest = sorted(scores[i].tolist())[: int(len(scores[i]) * ratio)]
        kept[i] = torch.tensor(
            [u for u, value in enumerate(scores[i].tolist()) if value not in lowest]
        )
    return kept


def units(choose=None, borders=lambda first, last: (first, last)):
    """kept_units with one thing changed."""

    def answer(scores, ratio, keep_first, keep_last):
        first, last = borders(keep_first, keep_last)
        rule = None if choose is None else lambda s: choose(s, ratio)
        return checks.right_units(scores, ratio, first, last, rule)

    return answer


def always_a_slice(scores, ratio, keep_first, keep_last):
    return units(lambda s, r: s.argsort(descending=True)[: -int(len(s) * r)].sort()[0])(
        scores, ratio, keep_first, keep_last
    )


def last_by_a_slice(scores, ratio, keep_first, keep_last):
    numbers = list(range(len(scores)))
    whole = {*numbers[:keep_first], *numbers[-keep_last:]}
    return [
        torch.arange(len(s))
        if i in whole
        else s.argsort()[int(len(s) * ratio) :].sort()[0]
        for i, s in enumerate(scores)
    ]


def middle_alone(scores, ratio, keep_first, keep_last):
    kept = units_by_topk(scores, ratio, keep_first, keep_last)
    return kept[keep_first : len(scores) - keep_last]


def one_border(scores, ratio, keep_first, keep_last):
    middle = torch.cat(scores[keep_first : len(scores) - keep_last])
    border = middle.sort().values[int(len(middle) * ratio)]
    return checks.right_units(
        scores, ratio, keep_first, keep_last, lambda s: (s >= border).nonzero()[:, 0]
    )


def one_border_of_all(scores, ratio, keep_first, keep_last):
    every = torch.cat(scores)
    border = every.sort().values[int(len(every) * ratio)]
    return checks.right_units(
        scores, ratio, keep_first, keep_last, lambda s: (s >= border).nonzero()[:, 0]
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("cut_mlp", mlp_by_index_select),
        ("cut_mlp", mlp_in_a_loop),
        ("cut_heads", heads_by_rows),
        ("cut_heads", heads_by_a_mask),
        ("group_importance", importance_by_the_package),
        ("group_importance", importance_by_transposing),
        ("kept_units", units_by_topk),
        ("kept_units", units_by_a_border),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


M, H, I, K = "cut_mlp", "cut_heads", "group_importance", "kept_units"  # noqa: E741
test_wrong_answers = rejects(
    "06-compression/10-llm-pruner",
    [
        Wrong(M, no_up, "up still has all its rows"),
        Wrong(M, no_gate, "gate still has all its rows"),
        Wrong(M, no_down, "down still has all its columns"),
        Wrong(M, rows_of_down, "down lost rows"),
        Wrong(M, transposed, "columns of gate and up went"),
        Wrong(M, gone, "names those that stay"),
        Wrong(M, sorted_channels, "the channels are sorted"),
        Wrong(M, by_a_mask, "down's columns are sorted"),
        Wrong(M, down_transposed, "down is transposed"),
        Wrong(M, gate_twice, "up is gate once more"),
        Wrong(M, first_channels, "the first channels stay"),
        Wrong(M, zeros, "leave the channels out"),
        Wrong(M, zeros_in_place, "in place"),
        Wrong(H, cut(only="qkv"), "o still has all its columns"),
        Wrong(H, cut(only="qvo"), "k still has all its heads"),
        Wrong(H, cut(only="qko"), "v still has all its heads"),
        Wrong(H, cut(only="qo"), "k and v still have all their heads"),
        Wrong(H, cut(only="kvo"), "q still has all its heads"),
        Wrong(H, cut(only=""), "nothing is cut"),
        Wrong(H, cut(single, single), "single rows stay"),
        Wrong(H, cut(as_many_as_k), "q keeps as many heads as k"),
        Wrong(H, cut(columns=as_many_as_k), "o keeps only as many heads as k"),
        Wrong(H, cut(strided), "neighbours"),
        Wrong(H, cut(columns=strided), "o keeps the columns of other heads"),
        Wrong(H, cut(strided, columns=aligned), "q keeps other heads than o reads"),
        Wrong(
            H,
            lambda q, k, v, o, keep, D: right_heads(
                q, k, v, o, rest(keep, len(k) // D), D
            ),
            "names those that stay",
        ),
        Wrong(H, cut(every_kth_wide, every_kth), "you took every K-th"),
        Wrong(H, rows_of_o, "o lost rows"),
        Wrong(H, cut(only="kv"), "only k and v are cut"),
        Wrong(H, cut(only="qk"), "v and o have the same heads"),
        Wrong(H, cut(single_of_the_group, single), "a row of q stands for a head"),
        Wrong(H, cut(first_of_the_group), "only the first query head"),
        Wrong(H, cut(two_of_the_group), "two query heads are taken"),
        Wrong(H, head_first, "the first row of each head"),
        Wrong(
            I,
            importance(lambda w, g, d: (w * g).sum(d).abs()),
            "terms of unlike sign cancel",
        ),
        Wrong(I, importance(lambda w, g, d: (w * g).sum(d)), "|·| is missing"),
        Wrong(
            I,
            importance(lambda w, g, d: (w * g).sum(d), lambda m: m.sum(0).abs()),
            "stands around all",
        ),
        Wrong(
            I, importance(lambda w, g, d: (w * g).abs().mean(d)), "the mean of a row"
        ),
        Wrong(I, importance(join=lambda m: m.mean(0)), "the mean of the members"),
        Wrong(I, importance(join=lambda m: m.amax(0)), "the largest member"),
        Wrong(I, importance(join=lambda m: m.prod(0)), "the product of the members"),
        Wrong(I, importance(join=lambda m: m[0]), "only the first member"),
        Wrong(I, importance(join=lambda m: m[-1]), "only the last member"),
        Wrong(I, importance(lambda w, g, d: w.abs().sum(d)), "this is Σ |w|"),
        Wrong(I, importance(lambda w, g, d: w.square().sum(d)), "this is Σ w²"),
        Wrong(I, importance(lambda w, g, d: g.abs().sum(d)), "this is Σ |g|"),
        Wrong(I, importance(lambda w, g, d: (w * g).square().sum(d)), "squared"),
        Wrong(
            I,
            importance(lambda w, g, d: w.abs().sum(d) * g.abs().sum(d)),
            "summed before the product",
        ),
        Wrong(I, importance(axes_of=lambda a: [1 - x for x in a]), "the wrong axis"),
        Wrong(I, importance(axes_of=lambda a: [0] * len(a)), "all members are read"),
        Wrong(I, three_members, "number of members"),
        Wrong(I, scaled_in_place, "in place"),
        Wrong(
            K,
            units(lambda s, r: s.argsort(descending=True)[int(len(s) * r) :].sort()[0]),
            "the worst stay",
        ),
        Wrong(
            K,
            units(lambda s, r: s.argsort()[: int(len(s) * r)].sort().values),
            "the units that go",
        ),
        Wrong(
            K,
            units(lambda s, r: s.argsort()[int(len(s) * r) :]),
            "in the order of their importance",
        ),
        Wrong(
            K,
            units(lambda s, r: s.topk(len(s) - int(len(s) * r)).indices),
            "best first",
        ),
        Wrong(
            K,
            units(lambda s, r: s.topk(int(len(s) * r)).indices.sort().values),
            "the share that goes",
        ),
        Wrong(
            K,
            units(lambda s, r: s.argsort()[int(len(s) * r) + 1 :].sort().values),
            "one too many goes",
        ),
        Wrong(
            K,
            units(lambda s, r: s.topk(int(len(s) * (1 - r))).indices.sort().values),
            "what stays is cut off",
        ),
        Wrong(
            K,
            units(lambda s, r: s.argsort()[round(len(s) * r) :].sort().values),
            "is rounded",
        ),
        Wrong(K, one_border, "one border for all layers: each"),
        Wrong(K, one_border_of_all, "outer ones as well"),
        Wrong(K, always_a_slice, "`[:-0]` is empty"),
        Wrong(K, last_by_a_slice, "`[-0:]` is all of them"),
        Wrong(K, middle_alone, "only the layers in the middle"),
        Wrong(K, units(borders=lambda a, b: (0, 0)), "all layers are pruned"),
        Wrong(K, units(borders=lambda a, b: (a, 0)), "the last layers are pruned"),
        Wrong(K, units(borders=lambda a, b: (a - 1, b)), "pruned, too"),
        Wrong(
            K, units(borders=lambda a, b: (a + 1, b)), "too many stays whole at the st"
        ),
        Wrong(
            K, units(borders=lambda a, b: (a, b - 1)), "too few stays whole at the end"
        ),
        Wrong(
            K, units(borders=lambda a, b: (a, b + 1)), "too many stays whole at the e"
        ),
        Wrong(K, units(borders=lambda a, b: (b, a)), "in each other's place"),
    ],
)
