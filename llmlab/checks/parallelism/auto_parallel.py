"""What marks the exercises of 05-parallelism/08-auto-parallel."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from itertools import combinations, pairwise, product
from operator import add, index, not_

import torch

from llmlab.checks.parallelism.ranks import explained
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
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
    found = []
    for dims in (
        "mk,kn->mn",
        "bSk,kgRD->bSgRD",
        "bSf,bSf->bSf",
        "bSgRD,bSgD,bSgD->bSgRD",
        "ecd,edf->ecf",
        "ij,jk,kl->il",  # j: the output and the gradient of the last input
        "bd,d->b",
        "tT,Td->td",  # a large letter is another loop
    ):
        loops = {letter for letter in dims if letter.isalpha() and letter.islower()}
        for cut in sorted(loops):
            what = f"summed({dims!r}, {cut!r})"
            got = expect(answer(dims, cut), kind=list, what=what)
            found.append(((dims, cut), got))
    if all(got == _summed(*args) for args, got in found):
        return
    if all(sorted(map(str, got)) == sorted(_summed(*args)) for args, got in found):
        raise Mistake("the right names, in another order: out, then grad 0, grad 1 …")
    explained(found, SUMMED)
    for (dims, cut), got in found:
        if got != _summed(dims, cut):
            raise Mistake(
                f"summed({dims!r}, {cut!r}) is {got}: ask of each tensor whether it has"
                f" the loop {cut!r}"
            )


def _summed(
    dims: str,
    cut: str,
    out: Callable[[bool], bool] = not_,
    grad: Callable[[bool], bool] = not_,
    name: str = "grad {i}",
    first: int = 0,
) -> list[str]:
    """The tensors for which `out` and `grad` are true of whether they have the loop."""
    reads, writes = dims.split("->")
    found = []
    if out(cut in writes):
        found.append("out")
    for i, loops in enumerate(reads.split(","), first):
        if grad(cut in loops):
            found.append(name.format(i=i))
    return found


def _never(has_it: bool) -> bool:
    return False


SUMMED = {
    "large letters are other loops than small ones": lambda dims, cut: _summed(
        dims.lower(), cut
    ),
    "these are the tensors that are cut; summed are those that lack the loop": partial(
        _summed, out=bool, grad=bool
    ),
    "the output may be a partial sum too, when it lacks the loop": partial(
        _summed, out=_never
    ),
    (
        "a training step has gradients: an input that lacks the loop has a partial"
        " gradient"
    ): partial(_summed, grad=_never),
    (
        "the output is right, and the gradients are not: an input's gradient is summed"
        " where the input lacks the loop"
    ): partial(_summed, grad=bool),
    (
        "the gradients are right, and the output is not: it is summed where it lacks"
        " the loop"
    ): partial(_summed, out=bool),
    "the gradients count from 0": partial(_summed, first=1),
    'the names have a space: "grad 0"': partial(_summed, name="grad{i}"),
    "only the first tensor is there; there may be several": lambda *args: _summed(
        *args
    )[:1],
    "an operator may have more than two inputs": lambda *args: [
        name for name in _summed(*args) if name in ("out", "grad 0", "grad 1")
    ],
    "gradients may be partial sums where the output is one, too": lambda *args: (
        ["out"] if "out" in _summed(*args) else _summed(*args)
    ),
}


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
    found = []
    for p in (3, 4, 5):
        n = 144.0 * int(torch.randint(1, 9, (1,)))
        for src, dst in ((None, None), (1, 1), (None, 0), (0, None), (0, 1), (2, 0)):
            what = f"bytes_to_move({n}, {p}, src={src}, dst={dst})"
            got = float(expect(answer(n, p, src, dst), kind=(int, float), what=what))
            found.append(((n, p, src, dst), got))

    def same(a: float, b: float) -> bool:
        return close(a, b, 1e-9)

    if not all(same(got, _moved(*args)) for args, got in found):
        explained(found, MOVED, same)
    for args, got in found:
        n, p, src, dst = args
        what = f"bytes_to_move({n}, {p}, src={src}, dst={dst})"
        diagnose(
            got,
            right=_moved(*args),
            mistakes=_moved_mistakes(n, p, src, dst),
            tol=1e-9,
            what=what,
        )


def _moved(n: float, p: int, src: int | None, dst: int | None) -> float:
    if src == dst or src is None:
        return 0.0
    if dst is None:
        return sent("all_gather", 0, [n / p] * p)
    return sent("all_to_all", 0, [n / p / p] * p)


def _moved_mistakes(
    n: float, p: int, src: int | None, dst: int | None
) -> dict[str, float]:
    """Diagnosis → the bytes in this one case, where it differs from the right ones."""
    right = _moved(n, p, src, dst)
    gather = _moved(n, p, 0, None)
    move = _moved(n, p, 0, 1)
    mistakes = {}
    if src == dst:
        mistakes["nothing changes, so nothing is sent"] = (
            gather if src is None else move
        )
    elif src is None:
        text = "a rank that has the whole tensor keeps its piece: nothing is sent"
        mistakes[text] = gather
    elif dst is None:
        mistakes["a rank passes on p − 1 pieces of n / p bytes, not p"] = n
        mistakes["a gather is half of an all-reduce: nothing is added up"] = 2 * right
        text = "a rank passes on p − 1 pieces of n / p bytes, not one"
        mistakes[text] = n / p
    else:
        text = "that is gathering and cutting anew; an all-to-all sends p times less"
        mistakes[text] = gather
        mistakes["of its own piece a rank keeps what it needs itself"] = n / p
        text = "a rank sends p − 1 of its p parts to others, not one"
        mistakes[text] = right / (p - 1)
    if right:
        text = (
            "n are the bytes of the whole tensor, of which a rank has n / p; and what"
            " one rank sends is asked, not all together"
        )
        mistakes[text] = right * p
    return mistakes


MOVED = {
    "a rank has its piece only: to have the whole, it needs those of the others": (
        lambda n, p, src, dst: 0.0 if dst is None else _moved(n, p, src, dst)
    ),
    "0 is a dimension: `not src` is true for it, as for None": lambda n, p, src, dst: (
        _moved(n, p, src, dst) if src else 0.0
    ),
    "0 is a dimension: `not dst` is true for it, as for None": lambda n, p, src, dst: (
        _moved(n, p, src, dst or None)
    ),
    "it is twice too much: forward only is asked, and no sums": lambda *args: (
        2 * _moved(*args)
    ),
    "bytes are rounded down; `/` divides": lambda n, p, src, dst: (
        _moved(n, p, src, dst) // 1
    ),
}


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
    found = []
    for operators, ways in ((5, 4), (1, 3), (4, 3), (12, 16)):
        node = (torch.rand(operators, ways) * 9).tolist()
        edge = (torch.rand(operators - 1, ways, ways) * 9).tolist()
        what = f"best_plan of {operators} operators with {ways} strategies"
        given = deepcopy((node, edge))
        got = _whole(expect(answer(*given), kind=list, what=what))
        if given != (node, edge):
            raise Mistake(f"{what}: node or edge is changed in place; work on a copy")
        if len(got) != operators or not all(
            isinstance(i, int) and 0 <= i < ways for i in got
        ):
            raise Mistake(
                f"{what}: {operators} numbers from 0 to {ways - 1} are asked, not {got}"
            )
        found.append((got, _chain(node, edge), node, edge, what))
    wrong = [
        case
        for case in found
        if _time(*case[2:4], case[0]) - _time(*case[2:4], case[1]) > 1e-6
    ]
    if not wrong:
        return
    # a mistake must explain every plan: in one case, several would
    plans = [
        (got, _other_plans(node, edge, right)) for got, right, node, edge, _ in found
    ]
    for text in plans[0][1]:
        if all(got == other[text] for got, other in plans):
            raise Mistake(text)
    got, right, node, edge, what = wrong[0]
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


def _other_plans(node, edge, right: list[int]) -> dict[str, list[int]]:
    """Diagnosis → the plan that this mistake leads to."""
    nothing = [0.0] * len(node[0])
    negative = [[-t for t in row] for row in node]
    backwards = [[[-t for t in row] for row in R] for R in edge]
    ways = range(len(node[0]))
    alike = min(ways, key=lambda i: _time(node, edge, [i] * len(node)))
    turned = [[list(x) for x in zip(*R, strict=True)] for R in edge]
    prefixes = [_chain(node[: v + 1], edge[:v])[-1] for v in range(len(node))]
    return {
        "the fastest strategy of each operator alone; the way between them costs too": (
            [row.index(min(row)) for row in node]
        ),
        "the best next step each time; a detour may pay off later": _greedy(node, edge),
        "only the edges are counted; the operators cost too": (
            _chain([nothing] * len(node), edge)
        ),
        "edge[v][i][j] goes from i at v to j at v + 1: yours is transposed": (
            _chain(node, turned)
        ),
        "an operator's own seconds are counted twice": (
            _chain([[2 * t for t in row] for row in node], edge)
        ),
        "an operator's own seconds are counted twice, but for the first": (
            _chain([node[0], *[[2 * t for t in row] for row in node[1:]]], edge)
        ),
        "the right strategies in reverse order": right[::-1],
        "the last operator's own seconds are not counted": (
            _chain([*node[:-1], nothing], edge)
        ),
        "the first operator's own seconds are not counted": (
            _chain([nothing, *node[1:]], edge)
        ),
        "this is the plan of most time": _chain(negative, backwards),
        "all operators have the same strategy; each may have its own": (
            [alike] * len(node)
        ),
        (
            "the best end of each part of the chain; go back from the end, along how"
            " it was reached"
        ): prefixes,
    }


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
        (8, 4, 8),
        (12, 4, 8),
        (30, 8, 16),
        (6, 5, 4),
    ):
        times = [round(float(t), 3) for t in torch.rand(layers) * 4 + 0.2]
        times[-1] += 3.0  # the output layer
        if (layers, p) == (8, 4):
            # stages near their mean are not those of the least maximum
            times = [*UNEVEN]
        if (layers, p) == (6, 5):
            times[2] += 40.0  # alone the slowest, whatever the others do
        what = f"stages of {layers} layers, p = {p}, m = {m}"
        got = _whole(expect(answer(times, p, m), kind=list, what=what))
        if (
            len(got) != p
            or sum(got) != layers
            or not all(isinstance(n, int) and n > 0 for n in got)
        ):
            raise Mistake(
                f"{what}: {p} numbers above 0 that add up to {layers} are asked, not"
                f" {got}{_what_else(got, layers)}"
            )
        took = _latency(times, got, m)
        best = _best(times, p, m)
        if took <= best * (1 + 1e-9):
            continue
        if got == [len(part) for part in torch.arange(layers).tensor_split(p)]:
            raise Mistake(
                f"{what}: the same number of layers each; layers take different times"
            )
        if max(got) == layers - p + 1:
            raise Mistake(
                f"{what}: one stage has nearly all layers: a stage takes the sum of its"
                " layers' times, not the largest of them"
            )
        for text, other in _other_stages(times, p).items():
            if got == other:
                raise Mistake(f"{what}: {text}")
        raise Mistake(
            f"{what}: your stages take {took:.3f}, the best {best:.3f}: the slowest"
            f" stage is {_slowest(times, got)}"
        )


UNEVEN = [3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 5.0, 1.0]


def _what_else(got: list, layers: int) -> str:
    """What a list may be that is no list of sizes."""
    if any(isinstance(n, float) for n in got):
        return "; are these seconds? Numbers of layers are asked"
    if got and got == sorted(got) and got[-1] == layers and len(got) > 1:
        return "; are these the places where stages end? Their sizes are asked"
    if 0 in got or sum(got) == layers:
        return ": exactly p stages, none of them empty, even where fewer take no longer"
    return ""


def _other_stages(times: list[float], p: int) -> dict[str, list[int]]:
    """Diagnosis → the sizes that this mistake leads to."""
    mean = sum(times) / p

    def off_the_mean(start: int, end: int) -> float:
        return (sum(times[start:end]) - mean) ** 2

    def slowest(start: int, end: int) -> float:
        return sum(times[start:end])

    right = _least(times, p, slowest, max)
    return {
        (
            "the stages are as near to the mean as can be; only the slowest one counts:"
            " the others may be short"
        ): _least(times, p, off_the_mean, add),
        (
            "a stage is closed as soon as it reaches the mean; a slower one may come"
            " later"
        ): _filled(times, p, mean),
        "the right sizes, in another order": sorted(right),
    }


def _least(
    times: list[float], p: int, of: Callable[[int, int], float], joined: Callable
) -> list[int]:
    """Sizes with the least value, that of stages joined by `joined` (max or +)."""

    @cache
    def rest(start: int, k: int) -> tuple[float, tuple[int, ...]]:
        if k == 1:
            return of(start, len(times)), (len(times) - start,)
        tries = []
        for end in range(start + 1, len(times) - k + 2):
            value, sizes = rest(end, k - 1)
            tries.append((joined(of(start, end), value), (end - start, *sizes)))
        return min(tries)

    return list(rest(0, p)[1])


def _filled(times: list[float], p: int, mean: float) -> list[int]:
    sizes, now, n = [], 0.0, 0
    for i, t in enumerate(times):
        now += t
        n += 1
        missing = p - 1 - len(sizes)
        left = len(times) - i - 1
        if missing and (now >= mean or left <= missing):
            sizes.append(n)
            now, n = 0.0, 0
    return [*sizes, n]


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
