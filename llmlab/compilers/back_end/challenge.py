"""The challenge of part 08: an attention row, better by its schedule alone.

A schedule is data, so that nothing but the order, the lanes and the copies can change.
It is judged by what is counted (`cost`), and by what it computes: on the judged shapes
and on odd ones, by the interpreter, every index checked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llmlab.compilers.back_end import cost, interpret, run
from llmlab.compilers.back_end.ir import Program
from llmlab.compilers.back_end.programs import from_graph
from llmlab.compilers.back_end.schedule import Step, apply
from llmlab.compilers.front_end import capture, optimise
from llmlab.compilers.program import attention_row, example_inputs

KEYS, WIDTH = 192, 32
ODD = ((37, 32), (11, 32))  # keys and width where tiles do not divide
TRAFFIC = 56_000  # bytes, at most
CYCLES = 29_000  # at most
MODEL = cost.Model(cache=4 * 1024, lanes=8, registers=16)


def program(keys: int = KEYS, width: int = WIDTH) -> Program:
    """The attention row as the front end leaves it, one nest for each operation."""
    inputs = example_inputs("attention_row", T=keys, d=width)
    return from_graph(optimise(capture(attention_row, *inputs)), "attention_row")


def scheduled(schedule: Sequence[Step]) -> Program:
    """The judged program after a schedule."""
    return apply(program(), schedule)


def seconds(schedule: Sequence[Step]) -> float:
    """CPU seconds of a run on this machine, by LLVM. It is shown, and not judged."""
    kernel = run.compiled(scheduled(schedule), "llvm")
    inputs = example_inputs("attention_row", T=KEYS, d=WIDTH)
    call = partial(kernel, *inputs)
    return run.seconds_of(call, at_least=0.001, clock=time.thread_time)[0]


@dataclass(frozen=True)
class Score:
    """What a schedule reaches.

    Attributes:
        wrong: (keys, width) for which it computes something else.
    """

    traffic: int
    cycles: int
    wrong: tuple[tuple[int, int], ...]


def judge(schedule: Sequence[Step]) -> Score:
    """Counted on the model, computed by the interpreter.

    Raises:
        NotLegal: a step is refused.
    """
    counted = cost.count(scheduled(schedule), MODEL)
    wrong = []
    for keys, width in ODD:
        inputs = example_inputs("attention_row", seed=1, T=keys, d=width)
        found = interpret.run(apply(program(keys, width), schedule), *inputs)[0]
        if not torch.allclose(found, attention_row(*inputs), atol=1e-5):
            wrong.append((keys, width))
    return Score(counted.traffic, counted.cycles, tuple(wrong))
