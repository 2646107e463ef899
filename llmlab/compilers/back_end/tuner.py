"""A search for schedules: draw, breed, or ask a model first; every run is logged.

    random        choices drawn from the space
    evolution     children of the fastest: knobs of two parents, one of them changed
    model         a fit of log seconds on features of a choice ranks many, and only the
                  most promising are run (the idea of TVM's tuner)

The log is a file, a line of JSON for each choice that was run. A search that is started
again with the same file goes on: nothing is measured twice.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from llmlab.compilers import json_lines
from llmlab.compilers.back_end.machine import Machine, this
from llmlab.compilers.back_end.programs import matmul
from llmlab.compilers.back_end.run import compiled, seconds_of
from llmlab.compilers.back_end.schedule import NotLegal, Step, apply
from llmlab.models.c_library import NoCompiler

STRATEGIES = ("random", "evolution", "model")


@dataclass(frozen=True)
class Choice:
    """The knobs of a product's schedule.

    Attributes:
        rows: of a block of C in registers.
        vectors: registers of columns in a row of the block.
        depth: of a tile of k; 0 is all of it.
        packed: whether a panel of B is copied side by side.
        columns_first: whether the outermost loop goes over columns.
    """

    rows: int
    vectors: int
    depth: int
    packed: bool
    columns_first: bool


KNOBS: dict[str, tuple] = {
    "rows": (1, 2, 4, 6, 8, 10, 12, 14),
    "vectors": (1, 2, 3, 4),
    "depth": (0, 64, 128, 256),
    "packed": (False, True),
    "columns_first": (False, True),
}


def schedule_of(choice: Choice, machine: Machine) -> list[Step]:
    """The schedule of `programs.matmul` that a choice stands for."""
    lanes = machine.lanes
    steps: list[Step] = [
        ("tile", "zj", lanes),
        ("vectorise", "zj_i"),
        ("tile", "j", lanes * choice.vectors),
        ("tile", "j_i", lanes),
        ("tile", "i", choice.rows),
    ]
    outer, k = ["i_o", "j_o"], ["k"]
    if choice.columns_first:
        outer.reverse()
    if choice.depth:
        steps.append(("tile", "k", choice.depth))
        outer, k = ["k_o", *outer], ["k_i"]
    inner = ["i_i", "j_i_o", "j_i_i"]
    steps += [("reorder", *outer, *k, *inner), ("unroll", "i_i"), ("unroll", "j_i_o")]
    steps.append(("vectorise", "j_i_i"))
    if choice.packed:
        steps.append(("pack", "B", "j_o"))
    return [*steps, ("cache", "C", outer[-1])]


def drawn(random: random.Random) -> Choice:
    """A choice of which every knob is drawn."""
    return Choice(**{name: random.choice(values) for name, values in KNOBS.items()})


def mutated(choice: Choice, random: random.Random) -> Choice:
    """One knob drawn anew."""
    name = random.choice([*KNOBS])
    return replace(choice, **{name: random.choice(KNOBS[name])})


def crossed(a: Choice, b: Choice, random: random.Random) -> Choice:
    """Each knob of one of two parents."""
    return Choice(**{n: getattr(random.choice((a, b)), n) for n in KNOBS})


def finite(measured: dict[Choice, float]) -> dict[Choice, float]:
    """Those that could be run."""
    return {choice: s for choice, s in measured.items() if math.isfinite(s)}


def next_generation(
    measured: dict[Choice, float], size: int, random: random.Random, best: int = 4
) -> list[Choice]:
    """Children of the fastest that are not measured yet.

    Args:
        measured: choice → seconds; infinite if it could not be run.
    """
    known = finite(measured)
    parents = sorted(known, key=lambda choice: known[choice])[:best]
    children: dict[Choice, None] = {}
    for _ in range(50 * size):  # a space may have no more
        if len(children) == size:
            break
        child = drawn(random)
        if parents:
            two = random.choice(parents), random.choice(parents)
            child = mutated(crossed(*two, random), random)
        if child not in measured:
            children[child] = None
    return [*children]


# The cost model -----------------------------------------------------------------------


def features(choice: Choice, machine: Machine) -> list[float]:
    """What the time of a choice may depend on.

    Loads per product are 1 / rows + 1 / columns: a block of C uses each row of B so
    often, and each number of A.
    """
    used = choice.rows * choice.vectors + choice.vectors + 1
    spilled = max(0, used - machine.registers) / machine.registers
    return [
        1.0,
        1 / choice.rows,
        1 / (choice.vectors * machine.lanes),
        math.log(choice.rows * choice.vectors),
        spilled,
        float(choice.packed),
        float(choice.columns_first),
        1 / choice.depth if choice.depth else 0.0,
    ]


@dataclass
class CostModel:
    """log seconds ≈ weights · features, by least squares with a small ridge."""

    machine: Machine
    weights: torch.Tensor | None = None

    def fit(self, measured: dict[Choice, float], ridge: float = 1e-3) -> None:
        known = finite(measured)
        if not known:
            return
        x = torch.tensor(
            [features(c, self.machine) for c in known], dtype=torch.float64
        )
        y = torch.tensor([*known.values()], dtype=torch.float64).log()
        square = x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64)
        self.weights = torch.linalg.solve(square, x.T @ y)

    def seconds(self, choice: Choice) -> float:
        """What it expects; 1 before it has seen anything."""
        if self.weights is None:
            return 1.0
        x = torch.tensor(features(choice, self.machine), dtype=torch.float64)
        return math.exp(float(x @ self.weights))


# The search ---------------------------------------------------------------------------


@dataclass
class Log:
    """What was measured, in a file; without one, in memory alone."""

    file: Path | None = None
    measured: dict[Choice, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there; a line that was cut off by a stop counts for nothing."""
        for found in json_lines.read(self.file) if self.file else []:
            try:
                seconds = found["seconds"]
                choice = Choice(**found["choice"])
            except (KeyError, TypeError):
                continue
            self.measured[choice] = math.inf if seconds is None else seconds

    def add(self, choice: Choice, seconds: float, why: str = "") -> None:
        """One measurement more, on the disk before it counts."""
        if self.file is not None:
            finite = seconds if math.isfinite(seconds) else None
            line = {"choice": asdict(choice), "seconds": finite}
            if why:
                line["why"] = why
            json_lines.append(self.file, line)
        self.measured[choice] = seconds

    @property
    def best(self) -> tuple[Choice, float]:
        """The fastest so far.

        Raises:
            ValueError: nothing has run yet.
        """
        known = finite(self.measured)
        if not known:
            raise ValueError("nothing has been measured yet")
        choice = min(known, key=lambda each: known[each])
        return choice, known[choice]


def measure(
    choice: Choice, machine: Machine, n: int = 256, target: str | None = None
) -> float:
    """Seconds of an n × n product, compiled and run.

    Raises:
        NotLegal, NoCompiler: it cannot be.
    """
    program = apply(matmul(n, n, n), schedule_of(choice, machine))
    kernel = compiled(program, target)
    a, b = torch.ones(n, n), torch.ones(n, n)
    out = [torch.empty(n, n)]
    call = lambda: kernel(a, b, out=out)  # noqa: E731
    (found,) = seconds_of(call, rounds=5, clock=time.thread_time)
    if not torch.equal(out[0], torch.full((n, n), float(n))):
        raise NotLegal(f"{choice} computes something else")
    return found


def search(
    strategy: str,
    runs: int,
    log: Log,
    run: Callable[[Choice], float],
    seed: int = 0,
    machine: Machine | None = None,
    batch: int = 4,
) -> list[float]:
    """The best seconds after each of so many runs, those in the log first.

    Args:
        run: choice → seconds; what it cannot run is logged as infinite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {STRATEGIES}")
    rng = random.Random(f"{seed} {len(log.measured)}")
    machine = machine or this()
    while len(log.measured) < runs:
        left = min(batch, runs - len(log.measured))
        chosen = propose(strategy, log.measured, left, rng, machine)
        if not chosen:
            break
        for choice in chosen:
            try:
                log.add(choice, run(choice))
            except (NotLegal, NoCompiler) as problem:
                log.add(choice, math.inf, str(problem)[:200])
    best, found = math.inf, []
    for seconds in log.measured.values():
        best = min(best, seconds)
        found.append(best)
    return found


def propose(
    strategy: str,
    measured: dict[Choice, float],
    size: int,
    rng: random.Random,
    machine: Machine,
) -> list[Choice]:
    """What to run next."""
    if strategy == "random" or not measured:
        return next_generation({c: math.inf for c in measured}, size, rng)
    if strategy == "evolution":
        return next_generation(measured, size, rng)
    model = CostModel(machine)
    model.fit(measured)
    candidates = next_generation(measured, 16 * size, rng)
    candidates += next_generation({c: math.inf for c in measured}, 16 * size, rng)
    ranked: Sequence[Choice] = sorted(dict.fromkeys(candidates), key=model.seconds)
    return [*ranked[:size]]
