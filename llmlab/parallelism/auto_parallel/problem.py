"""Choosing a strategy for every operator: Alpa's integer program, and brute force to
check it.

    minimise   Σ_v  s_v · c_v   +   Σ_(u,v)  s_uᵀ R_uv s_v       (Zheng et al.
                                             2022, equation 1)
    so that    Σ_v  s_v · m_v   ≤   M                            and each s_v is one-hot

    s_v  the strategy of operator v      c_v  its seconds      m_v  its bytes      R_uv
                                              seconds to reshard u's output for v

The product s_u s_v is made linear by a variable e_uv[i, j] in [0, 1] for each pair,
whose rows add up to s_u and columns to s_v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import numpy as np

from llmlab.parallelism.auto_parallel.sharding import (
    DeviceMesh,
    Op,
    Spec,
    Strategy,
    edge_seconds,
    op_bytes,
    op_seconds,
    shape_of,
    spec,
    strategies,
)

Graph = Sequence[Op]
Choice = dict[str, Strategy]


@dataclass(frozen=True)
class Problem:
    """The numbers of the integer program."""

    ops: tuple[Op, ...]
    options: list[list[Strategy]]
    seconds: list[np.ndarray]  # c_v
    bytes: list[np.ndarray]  # m_v
    edges: dict[tuple[int, int, int], np.ndarray]  # (u, v, input of v) → R_uv
    memory: float


def problem(graph: Graph, mesh: DeviceMesh) -> Problem:
    """All costs of all strategies.

    Raises:
        ValueError: a name occurs twice, or an operator stands before one that it reads.
    """
    ops, place = tuple(graph), {}
    for i, op in enumerate(ops):
        if op.name in place:
            raise ValueError(f"graph: the name {op.name!r} occurs twice")
        later = [name for name in op.inputs if name in {o.name for o in ops[i:]}]
        if later:
            raise ValueError(
                f"graph: {op.name!r} reads {later[0]!r}, which comes later"
            )
        place[op.name] = i
    options = [strategies(op, mesh) for op in ops]
    edges = {}
    for v, op in enumerate(ops):
        for k, name in enumerate(op.inputs):
            if name in place:
                edges[place[name], v, k] = _resharding(
                    ops, options, place[name], v, k, mesh
                )
    each = [
        [(op_seconds(op, s, mesh), op_bytes(op, s, mesh)) for s in opts]
        for op, opts in zip(ops, options, strict=True)
    ]
    seconds = [np.array([c for c, _ in row]) for row in each]
    held = [np.array([m for _, m in row]) for row in each]
    return Problem(ops, options, seconds, held, edges, mesh.memory)


def _resharding(ops, options, u: int, v: int, k: int, mesh: DeviceMesh) -> np.ndarray:
    shape, known = shape_of(ops[u].writes, ops[u]), {}

    def between(out: Spec, wanted: Spec) -> float:
        if (out, wanted) not in known:
            known[out, wanted] = edge_seconds(shape, out, wanted, mesh)
        return known[out, wanted]

    outs = [spec(ops[u].writes, s) for s in options[u]]
    ins = [spec(ops[v].reads[k], s) for s in options[v]]
    return np.array([[between(a, b) for b in ins] for a in outs])


def total(p: Problem, pick: Sequence[int]) -> tuple[float, float]:
    """(seconds, bytes) of a choice, given by each operator's number in `options`."""
    nodes = sum(c[i] for c, i in zip(p.seconds, pick, strict=True))
    edges = sum(R[pick[u], pick[v]] for (u, v, _), R in p.edges.items())
    return float(nodes + edges), float(
        sum(m[i] for m, i in zip(p.bytes, pick, strict=True))
    )


def brute_force(p: Problem) -> tuple[Choice, float]:
    """The best of all combinations: what the integer program must find.

    Raises:
        ValueError: nothing fits into memory, or there are more than a million.
    """
    count = prod(len(o) for o in p.options)
    if count > 1_000_000:
        raise ValueError(
            f"graph has {count:,} combinations: brute force takes at most 1,000,000;"
            " use solve"
        )
    if not any_fits(p):
        raise ValueError(_nothing(p))
    totals = (
        (*total(p, pick), pick) for pick in product(*(range(len(o)) for o in p.options))
    )
    best, _, pick = min(row for row in totals if row[1] <= p.memory)
    return _named(p, pick), best


def any_fits(p: Problem) -> bool:
    """Whether the smallest choice fits into memory."""
    return sum(m.min() for m in p.bytes) <= p.memory


def _nothing(p: Problem) -> str:
    least = sum(m.min() for m in p.bytes)
    return (
        f"memory={p.memory:.3g}: the most frugal choice takes {least:.3g} bytes a"
        " device; use more devices"
    )


def _named(p: Problem, pick: Sequence[int]) -> Choice:
    return {
        op.name: opts[i] for op, opts, i in zip(p.ops, p.options, pick, strict=True)
    }


def solve(p: Problem) -> tuple[Choice, float]:
    """The integer program, by scipy's HiGHS. Returns the choice and its seconds.

    Raises:
        ValueError: nothing fits into memory.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not any_fits(p):
        raise ValueError(_nothing(p))
    starts = np.cumsum([0, *(len(o) for o in p.options)])
    pairs = list(p.edges.items())
    ends = starts[-1] + np.cumsum([0, *(R.size for _, R in pairs)])
    # seconds may be tiny: the solver's tolerances are absolute
    scale = max(c.min() for c in p.seconds) or 1.0
    c = np.concatenate([*p.seconds, *(R.ravel() for _, R in pairs)]) / scale
    rows, low, high = _constraints(p, starts, ends, pairs)
    integral = np.concatenate([np.ones(starts[-1]), np.zeros(ends[-1] - starts[-1])])
    # HiGHS would stop at 0.01% from the best
    limits, exact = LinearConstraint(rows, low, high), {"mip_rel_gap": 0.0}
    found = milp(
        c, constraints=limits, bounds=Bounds(0, 1), integrality=integral, options=exact
    )
    if found.x is None:
        raise ValueError(f"the integer program has no solution: {found.message}")
    pick = [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]
    return _named(p, pick), total(p, pick)[0]


def _constraints(p: Problem, starts, ends, pairs):
    """Rows of the program: one-hot, the marginals of each pair, and memory."""
    from scipy.sparse import csr_array

    row, column, value, low, high = [], [], [], [], []

    def add(columns, values, lo: float, hi: float) -> None:
        row.extend([len(low)] * len(columns))
        column.extend(columns)
        value.extend(values)
        low.append(lo)
        high.append(hi)

    for a, b in pairwise(starts):
        add(range(a, b), [1.0] * (b - a), 1, 1)
    for ((u, v, _), R), at in zip(pairs, ends, strict=False):
        e = at + np.arange(R.size).reshape(R.shape)
        for i in range(R.shape[0]):
            add([*e[i], starts[u] + i], [1.0] * R.shape[1] + [-1.0], 0, 0)
        for j in range(R.shape[1]):
            add([*e[:, j], starts[v] + j], [1.0] * R.shape[0] + [-1.0], 0, 0)
    if np.isfinite(p.memory):
        add(range(starts[-1]), np.concatenate(p.bytes) / p.memory, -np.inf, 1)
    return csr_array((value, (row, column)), shape=(len(low), ends[-1])), low, high


def seconds_of(p: Problem, choice: Choice) -> tuple[float, float]:
    """(seconds, bytes) of a choice made by hand.

    Raises:
        ValueError: a strategy that an operator does not have.
    """
    pick = []
    for op, opts in zip(p.ops, p.options, strict=True):
        if choice[op.name] not in opts:
            raise ValueError(
                f"choice[{op.name!r}]={choice[op.name]} is not a strategy of it: {opts}"
            )
        pick.append(opts.index(choice[op.name]))
    return total(p, pick)
