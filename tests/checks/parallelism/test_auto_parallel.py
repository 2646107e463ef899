"""Wrong answers to the exercises of 05-parallelism/08-auto-parallel, each with the
diagnosis that it must get.
"""

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
    Wrong("bytes_to_move", moving(gather=lambda n, p: n / p), "per pair"),
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
    Wrong("stages", fill_up, "the slowest stage is"),
    Wrong("stages", all_in_one, "the slowest stage is"),
    Wrong("stages", with_an_empty_stage, "numbers above 0"),
]

test_wrong_answers = rejects(
    "05-parallelism/08-auto-parallel", SUMMED + MOVE + PLAN + STAGES
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
