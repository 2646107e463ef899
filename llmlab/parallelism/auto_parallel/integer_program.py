"""A strategy for every operator: Alpa's integer program, and brute force to check it.

    minimise   Σ_v  s_v · c_v   +   Σ_(u,v)  s_uᵀ R_uv s_v
    so that    Σ_v  s_v · m_v   ≤   M            and each s_v is one-hot

(Zheng et al. 2022, https://arxiv.org/abs/2201.12023, equation 1.) The product s_u s_v
is made linear by a variable e_uv[i, j] in [0, 1] for each pair, whose rows add up to
s_u and whose columns add up to s_v.

    u, v    operators; v reads what u writes
    s_v     the strategy of operator v, one-hot over its options
    c_v     seconds of each option
    m_v     bytes of each option
    R_uv    seconds to reshard u's output for v, for each pair of their options
    M       bytes of one device
    i, j    numbers of options of u and of v
    pick    the number of the chosen option, for every operator
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
Edge = tuple[int, int, int]  # u, v, and which input of v

BRUTE_FORCE_LIMIT = 1_000_000  # combinations


@dataclass(frozen=True)
class Problem:
    """The numbers of the integer program."""

    ops: tuple[Op, ...]
    options: list[list[Strategy]]  # of each operator
    seconds: list[np.ndarray]  # c_v
    bytes: list[np.ndarray]  # m_v
    edges: dict[Edge, np.ndarray]  # R_uv
    memory: float  # M


def problem(graph: Graph, mesh: DeviceMesh) -> Problem:
    """All costs of all strategies.

    Raises:
        ValueError: a name occurs twice, or an operator stands before one that it reads.
    """
    ops = tuple(graph)
    position = _positions(ops)
    options = [strategies(op, mesh) for op in ops]
    seconds = []
    held = []
    for op, strategies_of_op in zip(ops, options, strict=True):
        seconds.append(np.array([op_seconds(op, s, mesh) for s in strategies_of_op]))
        held.append(np.array([op_bytes(op, s, mesh) for s in strategies_of_op]))

    edges = {}
    for v, op in enumerate(ops):
        for number, name in enumerate(op.inputs):
            if name not in position:
                continue  # a leaf: it is cut as its reader wants it, and sends nothing
            u = position[name]
            shape = shape_of(ops[u].writes, ops[u])
            outs = [spec(ops[u].writes, s) for s in options[u]]
            wanted = [spec(op.reads[number], s) for s in options[v]]
            edges[u, v, number] = _resharding_seconds(shape, outs, wanted, mesh)
    return Problem(ops, options, seconds, held, edges, mesh.memory)


def _positions(ops: Sequence[Op]) -> dict[str, int]:
    """The place of each operator by its name; refuses a graph that is out of order."""
    position: dict[str, int] = {}
    names = {op.name for op in ops}
    for i, op in enumerate(ops):
        if op.name in position:
            raise ValueError(f"graph: the name {op.name!r} occurs twice")
        for name in op.inputs:
            if name in names and name not in position:
                raise ValueError(
                    f"graph: {op.name!r} reads {name!r}, which comes later"
                )
        position[op.name] = i
    return position


def _resharding_seconds(
    shape: Sequence[int], outs: list[Spec], wanted: list[Spec], mesh: DeviceMesh
) -> np.ndarray:
    """R_uv, one row per option of u and one column per option of v."""
    known: dict[tuple[Spec, Spec], float] = {}  # many options share a spec
    R = np.empty((len(outs), len(wanted)))
    for i, src in enumerate(outs):
        for j, dst in enumerate(wanted):
            if (src, dst) not in known:
                known[src, dst] = edge_seconds(shape, src, dst, mesh)
            R[i, j] = known[src, dst]
    return R


def total(p: Problem, pick: Sequence[int]) -> tuple[float, float]:
    """(seconds, bytes) of a choice, given by each operator's number in `options`."""
    nodes = sum(c[i] for c, i in zip(p.seconds, pick, strict=True))
    edges = sum(R[pick[u], pick[v]] for (u, v, _), R in p.edges.items())
    held = sum(m[i] for m, i in zip(p.bytes, pick, strict=True))
    return float(nodes + edges), float(held)


def brute_force(p: Problem) -> tuple[Choice, float]:
    """The best of all combinations: what the integer program must find.

    Returns:
        The choice and its seconds.
    Raises:
        ValueError: nothing fits into memory, or there are more than a million.
    """
    count = prod(len(o) for o in p.options)
    if count > BRUTE_FORCE_LIMIT:
        raise ValueError(
            f"graph has {count:,} combinations: brute force takes at most"
            f" {BRUTE_FORCE_LIMIT:,}; use solve"
        )
    _refuse_if_nothing_fits(p)
    best = (float("inf"), float("inf"))
    best_pick = None
    for pick in product(*(range(len(options)) for options in p.options)):
        seconds, held = total(p, pick)
        # Of two that are equally fast, the one that needs less memory.
        if held <= p.memory and (seconds, held) < best:
            best = (seconds, held)
            best_pick = pick
    return _by_name(p, best_pick), best[0]


def _refuse_if_nothing_fits(p: Problem) -> None:
    least = sum(m.min() for m in p.bytes)
    if least > p.memory:
        raise ValueError(
            f"memory={p.memory:.3g}: the most frugal choice takes {least:.3g} bytes"
            " per device; use more devices"
        )


def _by_name(p: Problem, pick: Sequence[int]) -> Choice:
    choice = {}
    for op, options, i in zip(p.ops, p.options, pick, strict=True):
        choice[op.name] = options[i]
    return choice


def solve(p: Problem) -> tuple[Choice, float]:
    """The integer program, by scipy's HiGHS.

    Returns:
        The choice and its seconds.
    Raises:
        ValueError: nothing fits into memory.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _refuse_if_nothing_fits(p)

    # The variables in one vector: all s_v, one after the other, then all e_uv.
    matrices = list(p.edges.values())
    s_at = np.cumsum([0, *(len(options) for options in p.options)])
    e_at = s_at[-1] + np.cumsum([0, *(R.size for R in matrices)])
    costs = np.concatenate([*p.seconds, *(R.ravel() for R in matrices)])
    # Seconds may be tiny, and the tolerances of the solver are absolute.
    scale = max(c.min() for c in p.seconds) or 1.0

    # With s integral, e is integral by itself, and may be left continuous.
    is_integer = np.concatenate([np.ones(s_at[-1]), np.zeros(e_at[-1] - s_at[-1])])
    rows, low, high = _constraints(p, s_at, e_at)
    found = milp(
        costs / scale,
        constraints=LinearConstraint(rows, low, high),
        bounds=Bounds(0, 1),
        integrality=is_integer,
        options={"mip_rel_gap": 0.0},  # by default it stops at 0.01% from the best
    )
    if found.x is None:
        raise ValueError(f"the integer program has no solution: {found.message}")
    pick = []
    for start, end in pairwise(s_at):
        pick.append(int(np.argmax(found.x[start:end])))
    return _by_name(p, pick), total(p, pick)[0]


def _constraints(p: Problem, s_at: np.ndarray, e_at: np.ndarray):
    """The rows of the program, low ≤ row · variables ≤ high.

    Args:
        s_at: where the variables s_v of each operator begin, and where they end.
        e_at: where the variables e_uv of each edge begin, and where they end.
    Returns:
        The rows as a sparse matrix, and two lists: low and high.
    """
    from scipy.sparse import csr_array

    row = []
    column = []
    value = []
    low = []
    high = []

    def add(columns, values, at_least: float, at_most: float) -> None:
        row.extend([len(low)] * len(columns))
        column.extend(columns)
        value.extend(values)
        low.append(at_least)
        high.append(at_most)

    # One-hot: exactly one strategy per operator.
    for start, end in pairwise(s_at):
        add(range(start, end), [1.0] * (end - start), 1, 1)

    # Σ_j e_uv[i, j] − s_u[i] = 0, and Σ_i e_uv[i, j] − s_v[j] = 0.
    for ((u, v, _), R), start in zip(p.edges.items(), e_at, strict=False):
        count_u, count_v = R.shape
        e = start + np.arange(R.size).reshape(count_u, count_v)
        for i in range(count_u):
            add([*e[i], s_at[u] + i], [1.0] * count_v + [-1.0], 0, 0)
        for j in range(count_v):
            add([*e[:, j], s_at[v] + j], [1.0] * count_u + [-1.0], 0, 0)

    # Memory, as a share of M.
    if np.isfinite(p.memory):
        add(range(s_at[-1]), np.concatenate(p.bytes) / p.memory, -np.inf, 1)
    return csr_array((value, (row, column)), shape=(len(low), e_at[-1])), low, high


def seconds_of(p: Problem, choice: Choice) -> tuple[float, float]:
    """(seconds, bytes) of a choice made by hand.

    Raises:
        ValueError: a strategy that an operator does not have.
    """
    pick = []
    for op, options in zip(p.ops, p.options, strict=True):
        if choice[op.name] not in options:
            raise ValueError(
                f"choice[{op.name!r}]={choice[op.name]} is not a strategy of it:"
                f" {options}"
            )
        pick.append(options.index(choice[op.name]))
    return total(p, pick)
