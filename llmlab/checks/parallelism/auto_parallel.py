"""What marks the exercises of 05-parallelism/08-auto-parallel."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from operator import index

import torch

from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.auto_parallel import latency
from llmlab.parallelism.runtime import sent

check = Checks("05-parallelism/08-auto-parallel")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "A tensor that has the loop is cut. A tensor that lacks it holds, on each"
            " rank, only a part of its sum."
        ),
        (
            "Split `dims` at '->' and the inputs at ','. An input's gradient has the"
            " same loops as the input."
        ),
        (
            "out if cut is not in the output's loops; grad i if cut is not in the loops"
            " of input i."
        ),
    ),
)
def summed(answer):
    """Which tensors are partial sums."""
    for dims in (
        "mk,kn->mn",
        "bSk,kgRD->bSgRD",
        "bSf,bSf->bSf",
        "bSgRD,bSgD,bSgD->bSgRD",
        "ecd,edf->ecf",
    ):
        loops = {letter for letter in dims if letter.isalpha() and letter.islower()}
        for cut in sorted(loops):
            what = f"summed({dims!r}, {cut!r})"
            got = expect(answer(dims, cut), kind=list, what=what)
            right = _summed(dims, cut)
            if got == right:
                continue
            reads, writes = dims.split("->")
            cuts = [f"grad {i}" for i, x in enumerate(reads.split(",")) if cut in x]
            if got == (["out"] if cut in writes else []) + cuts:
                raise Mistake(
                    f"{what}: these are the tensors that are cut; summed are those that"
                    " lack the loop"
                )
            if got == [x for x in right if x != "out"]:
                raise Mistake(
                    f"{what}: the output may be a partial sum too, when it lacks the"
                    " loop"
                )
            if got == [x for x in right if x == "out"]:
                raise Mistake(
                    f"{what}: a training step has gradients: an input that lacks the"
                    " loop has a partial gradient"
                )
            if sorted(map(str, got)) == sorted(right):
                raise Mistake(
                    f"{what}: the right names, in another order: out, then grad 0,"
                    " grad 1 …"
                )
            raise Mistake(
                f"{what} is {got}: ask of each tensor whether it has the loop {cut!r}"
            )


def _summed(dims: str, cut: str) -> list[str]:
    reads, writes = dims.split("->")
    found = []
    if cut not in writes:
        found.append("out")
    for i, loops in enumerate(reads.split(",")):
        if cut not in loops:
            found.append(f"grad {i}")
    return found


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Four cases: nothing changes, whole to cut, cut to whole, cut to another"
            " cut. Which of them send nothing?"
        ),
        (
            "Cut to whole is a ring all-gather: each rank passes on p − 1 pieces of n /"
            " p bytes."
        ),
        (
            "Cut to another cut: each rank has n / p bytes and keeps one p-th of them:"
            " n / p · (p − 1) / p are sent."
        ),
    ),
)
def bytes_to_move(answer):
    """Bytes to change a tensor's cut."""
    for p in (3, 4, 6):
        n = 144.0 * int(torch.randint(1, 9, (1,)))
        gather = sent("all_gather", 0, [n / p] * p)
        move = sent("all_to_all", 0, [n / p / p] * p)
        for src, dst in ((None, None), (1, 1), (None, 0), (0, None), (0, 1), (2, 0)):
            what = f"bytes_to_move({n}, {p}, src={src}, dst={dst})"
            got = float(expect(answer(n, p, src, dst), kind=(int, float), what=what))
            if src == dst or src is None:
                right = 0.0
            elif dst is None:
                right = gather
            else:
                right = move
            mistakes = {
                "a rank that has the whole tensor keeps its piece: nothing is sent": (
                    gather if src is None else None
                ),
                "nothing changes, so nothing is sent": (
                    None if src != dst else gather if src is None else move
                ),
                (
                    "that is gathering and cutting anew; an all-to-all sends p times"
                    " less"
                ): gather if right == move else None,
                "a rank passes on p − 1 pieces of n / p bytes, not p": (
                    n if right == gather else None
                ),
                "of its own piece a rank keeps what it needs itself": (
                    n / p if right == move else None
                ),
                "n are the bytes of the whole tensor; a rank has n / p of them": (
                    right * p if right else None
                ),
                "bytes sent, not bytes per pair of ranks": (
                    right / (p - 1) if right else None
                ),
            }
            known = {
                text: x for text, x in mistakes.items() if x is not None and x != right
            }
            diagnose(got, right=right, mistakes=known, tol=1e-9, what=what)


@check.exercise(
    points=3,
    minutes=25,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Walk along the chain. For each strategy of the operator you are at, keep"
            " the least time so far, and how you came there."
        ),
        (
            "least[j] = node[v][j] + min over i of (least of the operator before[i] +"
            " edge[v − 1][i][j]). Remember the i."
        ),
        (
            "Start with node[0]; at the end take the smallest and go back along the"
            " remembered i."
        ),
    ),
)
def best_plan(answer):
    """The shortest path through a chain of strategies."""
    for operators, ways in ((5, 4), (1, 3), (4, 3), (12, 16)):
        node = (torch.rand(operators, ways) * 9).tolist()
        edge = (torch.rand(operators - 1, ways, ways) * 9).tolist()
        what = f"best_plan of {operators} operators with {ways} strategies"
        got = _whole(expect(answer(node, edge), kind=list, what=what))
        if len(got) != operators or not all(
            isinstance(i, int) and 0 <= i < ways for i in got
        ):
            raise Mistake(
                f"{what}: {operators} numbers from 0 to {ways - 1} are asked, not {got}"
            )
        right = _chain(node, edge)
        if abs(_time(node, edge, got) - _time(node, edge, right)) < 1e-6:
            continue
        if got == [row.index(min(row)) for row in node]:
            raise Mistake(
                f"{what}: the fastest strategy of each operator alone; the way between"
                " them costs too"
            )
        if got == _greedy(node, edge):
            raise Mistake(
                f"{what}: the best next step each time; a detour may pay off later"
            )
        if got == _chain([[0.0] * ways] * operators, edge):
            raise Mistake(f"{what}: only the edges are counted; the operators cost too")
        if got == _chain(node, [[list(x) for x in zip(*R, strict=True)] for R in edge]):
            raise Mistake(
                f"{what}: edge[v][i][j] goes from i at v to j at v + 1: yours is"
                " transposed"
            )
        if got == right[::-1]:
            raise Mistake(f"{what}: the right strategies in reverse order")
        raise Mistake(
            f"{what}: your plan takes {_time(node, edge, got):.3f}, the best"
            f" {_time(node, edge, right):.3f}"
        )


def _whole(got: list) -> list:
    """Whole numbers of NumPy or of tensors as those of Python; the rest unchanged."""
    try:
        return [index(x) for x in got]
    except TypeError:
        return got


def _time(node, edge, pick) -> float:
    own = sum(row[i] for row, i in zip(node, pick, strict=True))
    return own + sum(R[i][j] for R, (i, j) in zip(edge, pairwise(pick), strict=True))


def _chain(node, edge) -> list[int]:
    if len(node[0]) ** len(node) <= 2000:
        every = product(range(len(node[0])), repeat=len(node))
        return list(min(every, key=lambda pick: _time(node, edge, pick)))

    # The least time that ends in each strategy, and the way there.
    best = [(t, [i]) for i, t in enumerate(node[0])]
    for costs, R in zip(node[1:], edge, strict=True):
        longer = []
        for j, cost in enumerate(costs):
            tries = [(t + R[way[-1]][j] + cost, [*way, j]) for t, way in best]
            longer.append(min(tries))
        best = longer
    return min(best)[1]


def _greedy(node, edge) -> list[int]:
    pick = [node[0].index(min(node[0]))]
    for costs, R in zip(node[1:], edge, strict=True):
        step = [c + R[pick[-1]][j] for j, c in enumerate(costs)]
        pick.append(step.index(min(step)))
    return pick


@check.exercise(
    points=3,
    minutes=30,
    difficulty=4,
    importance=4,
    hints=(
        "Every cut has the same sum. So what has to be small?",
        (
            "Least slowest stage of the first `end` layers in k stages: try every place"
            " where the last stage may begin."
        ),
        (
            "slowest(end, k) = min over start of max(slowest(start, k − 1),"
            " sum(times[start:end])); keep the sizes along with it."
        ),
    ),
)
def stages(answer):
    """Cutting layers into pipeline stages."""
    for layers, p, m in (
        (4, 1, 3),
        (5, 5, 2),
        (8, 3, 4),
        (9, 4, 1),
        (12, 4, 8),
        (30, 8, 16),
    ):
        times = [round(float(t), 3) for t in torch.rand(layers) * 4 + 0.2]
        times[-1] += 3.0  # the output layer
        what = f"stages of {layers} layers, p = {p}, m = {m}"
        got = _whole(expect(answer(times, p, m), kind=list, what=what))
        if (
            len(got) != p
            or sum(got) != layers
            or not all(isinstance(n, int) and n > 0 for n in got)
        ):
            raise Mistake(
                f"{what}: {p} numbers above 0 that add up to {layers} are asked, not"
                f" {got}"
            )
        took = _latency(times, got, m)
        best = _best(times, p, m)
        if took <= best * (1 + 1e-9):
            continue
        if got == [len(part) for part in torch.arange(layers).tensor_split(p)]:
            raise Mistake(
                f"{what}: the same number of layers each; layers take different times"
            )
        raise Mistake(
            f"{what}: your stages take {took:.3f}, the best {best:.3f}: the slowest"
            f" stage is {_slowest(times, got)}"
        )


def _sums(times: list[float], sizes: list[int]) -> list[float]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [sum(times[e - n : e]) for e, n in zip(ends, sizes, strict=True)]


def _latency(times: list[float], sizes: list[int], m: int) -> float:
    return latency(_sums(times, sizes), m)


def _slowest(times: list[float], sizes: list[int]) -> str:
    sums = _sums(times, sizes)
    return f"number {sums.index(max(sums)) + 1} with {max(sums):.3f}"


def _best(times: list[float], p: int, m: int) -> float:
    if len(times) <= 12:
        cuts = combinations(range(1, len(times)), p - 1)
        best = float("inf")
        for cut in cuts:
            sizes = [end - start for start, end in pairwise((0, *cut, len(times)))]
            best = min(best, _latency(times, sizes, m))
        return best

    # The least slowest stage of the first `end` layers in k stages.
    slowest = {(0, 0): 0.0}
    for end in range(1, len(times) + 1):
        for k in range(1, p + 1):
            tries = [
                max(slowest[s, k - 1], sum(times[s:end]))
                for s in range(end)
                if (s, k - 1) in slowest
            ]
            if tries:
                slowest[end, k] = min(tries)
    return sum(times) + (m - 1) * slowest[len(times), p]
