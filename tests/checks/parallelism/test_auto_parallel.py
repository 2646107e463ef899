"""Wrong answers to the exercises of 05-parallelism/08-auto-parallel, each with the
diagnosis that it must get.
"""

from itertools import accumulate, combinations, pairwise

import numpy as np
import pytest
import torch

from llmlab.checks.parallelism.auto_parallel import check
from tests.checks.rejecting import Wrong, rejects, solved, verdict


def parts(dims):
    reads, writes = dims.split("->")
    return reads.split(","), writes


def those_that_are_cut(dims, cut):
    reads, writes = parts(dims)
    return ["out"] * (cut in writes) + [
        f"grad {i}" for i, x in enumerate(reads) if cut in x
    ]


def gradients_only(dims, cut):
    return [f"grad {i}" for i, x in enumerate(parts(dims)[0]) if cut not in x]


def output_only(dims, cut):
    return ["out"] * (cut not in parts(dims)[1])


def out_last(dims, cut):
    return gradients_only(dims, cut) + output_only(dims, cut)


def everything(dims, cut):
    return ["out", *(f"grad {i}" for i in range(len(parts(dims)[0])))]


SUMMED = [
    Wrong("summed", those_that_are_cut, "that lack the loop"),
    Wrong("summed", gradients_only, "the output may be"),
    Wrong("summed", output_only, "partial gradient"),
    Wrong("summed", everything, "ask of each tensor"),
]


def moving(
    whole=0.0,
    same=0.0,
    gather=lambda n, p: n / p * (p - 1),
    move=lambda n, p: n / p * (p - 1) / p,
):
    def bytes_to_move(n, p, src, dst):
        if src == dst:
            return same and gather(n, p)
        if src is None:
            return whole and gather(n, p)
        return gather(n, p) if dst is None else move(n, p)

    return bytes_to_move


MOVE = [
    Wrong("bytes_to_move", moving(whole=1.0), "keeps its piece"),
    Wrong("bytes_to_move", moving(same=1.0), "nothing"),
    Wrong("bytes_to_move", moving(move=lambda n, p: n / p * (p - 1)), "p times less"),
    Wrong("bytes_to_move", moving(gather=lambda n, p: n), "not p"),
    Wrong("bytes_to_move", moving(move=lambda n, p: n / p), "keeps what it needs"),
    Wrong(
        "bytes_to_move",
        moving(gather=lambda n, p: n * (p - 1)),
        "n are the bytes of the whole",
    ),
    Wrong("bytes_to_move", moving(gather=lambda n, p: n / p), "not one"),
]


def each_alone(node, edge):
    return [row.index(min(row)) for row in node]


def greedy(node, edge):
    pick = each_alone(node[:1], edge)
    for costs, R in zip(node[1:], edge, strict=True):
        step = [c + R[pick[-1]][j] for j, c in enumerate(costs)]
        pick.append(step.index(min(step)))
    return pick


def dynamic(node, edge, turn=lambda R: R, own=1.0):
    best = [(own * t, [i]) for i, t in enumerate(node[0])]
    for costs, R in zip(node[1:], edge, strict=True):
        R = turn(R)
        best = [
            min((t + R[way[-1]][j] + own * c, [*way, j]) for t, way in best)
            for j, c in enumerate(costs)
        ]
    return min(best)[1]


def edges_only(node, edge):
    return dynamic(node, edge, own=0.0)


def transposed(node, edge):
    return dynamic(node, edge, turn=lambda R: [list(x) for x in zip(*R, strict=True)])


def backwards(node, edge):
    return dynamic(node, edge)[::-1]


def too_short(node, edge):
    return dynamic(node, edge)[:-1]


PLAN = [
    Wrong("best_plan", each_alone, "of each operator alone"),
    Wrong("best_plan", greedy, "a detour may pay off"),
    Wrong("best_plan", edges_only, "the operators cost too"),
    Wrong("best_plan", transposed, "transposed"),
    Wrong("best_plan", backwards, "reverse order"),
    Wrong("best_plan", too_short, "numbers from 0 to"),
]


def even(times, p, m):
    q, r = divmod(len(times), p)
    return [q + (i < r) for i in range(p)]


def fill_up(times, p, m):
    """Greedy: close a stage once it reaches the mean."""
    sizes, mean, now, n = [], sum(times) / p, 0.0, 0
    for i, t in enumerate(times):
        now, n = now + t, n + 1
        left = len(times) - i - 1
        if len(sizes) < p - 1 and (now >= mean or left <= p - 1 - len(sizes)):
            sizes, now, n = [*sizes, n], 0.0, 0
    return [*sizes, n]


def all_in_one(times, p, m):
    return [len(times) - p + 1] + [1] * (p - 1)


def with_an_empty_stage(times, p, m):
    return [0] * (p - 1) + [len(times)]


STAGES = [
    Wrong("stages", even, "the same number of layers each"),
    Wrong("stages", fill_up, "as soon as it reaches the mean"),
    Wrong("stages", all_in_one, "nearly all layers"),
    Wrong("stages", with_an_empty_stage, "numbers above 0"),
]


def loops_of(dims, cut, out, grad, first=0, name="grad {}"):
    reads, writes = parts(dims)
    return ["out"] * out(cut in writes) + [
        name.format(i) for i, x in enumerate(reads, first) if grad(cut in x)
    ]


def lacks(has_it):
    return not has_it


def gradients_turned(dims, cut):
    return loops_of(dims, cut, lacks, bool)


def output_turned(dims, cut):
    return loops_of(dims, cut, bool, lacks)


def counted_from_one(dims, cut):
    return loops_of(dims, cut, lacks, lacks, first=1)


def names_without_space(dims, cut):
    return loops_of(dims, cut, lacks, lacks, name="grad{}")


def the_first_only(dims, cut):
    return loops_of(dims, cut, lacks, lacks)[:1]


def two_inputs(dims, cut):
    return [x for x in loops_of(dims, cut, lacks, lacks) if x in ("out", *GRADS)]


GRADS = ("grad 0", "grad 1")


def output_or_gradients(dims, cut):
    found = loops_of(dims, cut, lacks, lacks)
    return ["out"] if "out" in found else found


def by_sets(dims, cut):
    """Right: the tensors and their names side by side."""
    reads, writes = parts(dims)
    names = ["out", *(f"grad {i}" for i in range(len(reads)))]
    pairs = zip(names, [writes, *reads], strict=True)
    return [name for name, loops in pairs if {cut}.isdisjoint(loops)]


def not_src(n, p, src, dst):
    return moving()(n, p, src, dst) if src else 0.0


def not_dst(n, p, src, dst):
    return moving()(n, p, src, dst or None)


def both_ways(*args):
    return 2 * moving()(*args)


def whole_bytes(n, p, src, dst):
    return moving()(n, p, src, dst) // 1


def without_own_seconds(node, edge, which):
    node = [list(row) for row in node]
    node[which] = [0.0] * len(node[which])
    return dynamic(node, edge)


def last_not_counted(node, edge):
    return without_own_seconds(node, edge, -1)


def first_not_counted(node, edge):
    return without_own_seconds(node, edge, 0)


def the_slowest(node, edge):
    turned = [[[-t for t in row] for row in R] for R in edge]
    return dynamic([[-t for t in row] for row in node], turned)


def all_alike(node, edge):
    def time(i):
        return sum(row[i] for row in node) + sum(R[i][i] for R in edge)

    return [min(range(len(node[0])), key=time)] * len(node)


def best_prefixes(node, edge):
    return [dynamic(node[: v + 1], edge[:v])[-1] for v in range(len(node))]


def overwrites_node(node, edge):
    for v, R in enumerate(edge):
        for j, c in enumerate(node[v + 1]):
            node[v + 1][j] = c + min(t + R[i][j] for i, t in enumerate(node[v]))
    pick = [node[-1].index(min(node[-1]))]
    for v in range(len(edge) - 1, -1, -1):
        ways = [t + row[pick[0]] for t, row in zip(node[v], edge[v], strict=True)]
        pick.insert(0, ways.index(min(ways)))
    return pick


def from_the_end(node, edge):
    """Right: the least time from each strategy to the end."""
    ahead, ways = list(node[-1]), []
    for costs, R in zip(node[-2::-1], edge[::-1], strict=True):
        tries = [[x + t for x, t in zip(row, ahead, strict=True)] for row in R]
        ways.insert(0, [row.index(min(row)) for row in tries])
        ahead = [c + min(row) for c, row in zip(costs, tries, strict=True)]
    pick = [ahead.index(min(ahead))]
    for way in ways:
        pick.append(way[pick[-1]])
    return pick


def cuts(times, p, value):
    every = [
        [b - a for a, b in pairwise((0, *cut, len(times)))]
        for cut in combinations(range(1, len(times)), p - 1)
    ]
    return min(every, key=lambda sizes: value(sums_of(times, sizes)))


def sums_of(times, sizes):
    ends = list(accumulate(sizes))
    return [sum(times[e - n : e]) for e, n in zip(ends, sizes, strict=True)]


def slowest_least(times, p, m):
    """Right: the smallest limit that p stages can keep, by trying all sums."""
    n = len(times)
    limits = {sum(times[a:b]) for a in range(n) for b in range(a + 1, n + 1)}
    for limit in sorted(limits):
        sizes, at = [], 0
        for left in range(p - 1, -1, -1):
            end = at
            while end < n - left and sum(times[at : end + 1]) <= limit:
                end += 1
            sizes.append(end - at)
            at = end
        if at == n and all(sizes):
            return sizes
    raise AssertionError


def near_the_mean(times, p, m):
    if len(times) > 12:
        return slowest_least(times, p, m)
    mean = sum(times) / p
    return cuts(times, p, lambda sums: sum((t - mean) ** 2 for t in sums))


def ends(times, p, m):
    return list(accumulate(slowest_least(times, p, m)))


def seconds(times, p, m):
    return sums_of(times, slowest_least(times, p, m))


def smallest_first(times, p, m):
    return sorted(slowest_least(times, p, m))


def large_letters_as_small(dims, cut):
    return loops_of(dims.lower(), cut, lacks, lacks)


def whole_for_nothing(n, p, src, dst):
    return 0.0 if dst is None else moving()(n, p, src, dst)


def counted_twice(node, edge):
    return dynamic([node[0], *[[2 * t for t in row] for row in node[1:]]], edge)


MORE = [
    Wrong("summed", gradients_turned, "the output is right"),
    Wrong("summed", output_turned, "the gradients are right"),
    Wrong("summed", counted_from_one, "count from 0"),
    Wrong("summed", names_without_space, "have a space"),
    Wrong("summed", the_first_only, "there may be several"),
    Wrong("summed", two_inputs, "more than two inputs"),
    Wrong("summed", output_or_gradients, "where the output is one"),
    Wrong("summed", out_last, "in another order"),
    Wrong("bytes_to_move", not_src, "`not src`"),
    Wrong("bytes_to_move", not_dst, "`not dst`"),
    Wrong("bytes_to_move", both_ways, "twice too much"),
    Wrong("bytes_to_move", whole_bytes, "rounded down"),
    Wrong(
        "bytes_to_move",
        moving(gather=lambda n, p: 2 * n / p * (p - 1)),
        "half of an all-reduce",
    ),
    Wrong("best_plan", last_not_counted, "the last operator's own"),
    Wrong("best_plan", first_not_counted, "the first operator's own"),
    Wrong("best_plan", the_slowest, "most time"),
    Wrong("best_plan", all_alike, "the same strategy"),
    Wrong("best_plan", best_prefixes, "go back from the end"),
    Wrong("best_plan", overwrites_node, "changed in place"),
    Wrong("stages", near_the_mean, "only the slowest one counts"),
    Wrong("stages", ends, "where stages end"),
    Wrong("stages", seconds, "are these seconds"),
    Wrong("stages", smallest_first, "in another order"),
    Wrong("summed", large_letters_as_small, "other loops than small"),
    Wrong("bytes_to_move", whole_for_nothing, "those of the others"),
    Wrong("best_plan", counted_twice, "counted twice"),
]

test_wrong_answers = rejects(
    "05-parallelism/08-auto-parallel", SUMMED + MOVE + PLAN + STAGES + MORE
)


@pytest.mark.parametrize("exercise", ["best_plan", "stages"])
@pytest.mark.parametrize("whole", [np.int64, torch.tensor])
def test_whole_numbers_of_numpy_and_of_tensors_are_right_too(exercise, whole):
    right = solved(check.slug)[exercise]
    assert (
        verdict(
            check, exercise, lambda *given: [whole(i) for i in right(*given)]
        ).outcome
        == "right"
    )
    assert (
        verdict(
            check, exercise, lambda *given: [float(i) for i in right(*given)]
        ).outcome
        == "wrong"
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("summed", by_sets),
        ("best_plan", from_the_end),
        ("stages", slowest_least),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
