"""Small programs and random schedules, for the tests of this room."""

from __future__ import annotations

import random

import torch

from llmlab.compilers.back_end.ir import Buffer, Load, Number, Program, Store, var
from llmlab.compilers.back_end.programs import at, from_graph, matmul, nest, times
from llmlab.compilers.back_end.schedule import PRIMITIVES, NotLegal, Step, apply
from llmlab.compilers.front_end import capture, optimise
from llmlab.compilers.program import FUNCTIONS, example_inputs


def captured(name: str, **sizes: int) -> tuple[Program, tuple[torch.Tensor, ...]]:
    """One of the part's two functions as loops, and inputs for it."""
    function = FUNCTIONS[name]
    inputs = example_inputs(name, **sizes)
    return from_graph(optimise(capture(function, *inputs)), name), inputs


def recurrence(n: int = 6, m: int = 7, di: int = 1, dj: int = -1) -> Program:
    """Each element from one that was written `di` rows and `dj` columns before."""
    out = (var("i") + 2, var("j") + 2)
    before = (var("i") + 2 + -di, var("j") + 2 + -dj)
    value = times(Number(0.5), Load("C", before))
    shape = (n + 4, m + 4)
    buffers = (Buffer("A", shape), Buffer("C", shape, role="output"))
    fill = Store("C", at("fi", "fj"), Load("A", at("fi", "fj")))
    step = Store("C", out, value, "=")
    body = (nest(("fi", "fj"), shape, fill), nest(("i", "j"), (n, m), step))
    return Program("recurrence", buffers, body)


def three_steps(n: int = 5, m: int = 6) -> Program:
    """Two nests that write and one that reads what both wrote."""
    shape = (n, m)
    buffers = (
        Buffer("A", shape),
        Buffer("t", shape, role="temporary"),
        Buffer("C", (m, n), role="output"),
        Buffer("D", (n,), role="output"),
    )
    body = (
        nest(
            ("i", "j"),
            shape,
            Store("t", at("i", "j"), times(Number(2.0), Load("A", at("i", "j")))),
        ),
        nest(("r",), (n,), Store("D", at("r"), Number(0.0))),
        nest(("p", "q"), shape, Store("D", at("p"), Load("t", at("p", "q")), "+=")),
        nest(("u", "v"), (m, n), Store("C", at("u", "v"), Load("t", at("v", "u")))),
    )
    return Program("three_steps", buffers, body)


def random_step(program: Program, draw: random.Random) -> Step:
    """A step with names of the program, sensible or not."""
    loops, buffers = program.loops, program.names
    kind = draw.choice([*PRIMITIVES])
    loop = draw.choice(loops)
    if kind == "tile":
        return kind, loop, draw.choice((1, 2, 3, 4, 5))
    if kind == "reorder":
        chain, node = [loop], program.loop(loop)
        while len(node.body) == 1 and hasattr(node.body[0], "var"):
            node = node.body[0]
            chain.append(node.var)
        draw.shuffle(chain)
        return kind, *chain
    if kind in ("merge", "move", "partial_sums"):
        return kind, loop, draw.choice(loops)
    if kind == "inline":
        return kind, draw.choice(buffers)
    if kind == "prefetch":
        return kind, draw.choice(buffers), draw.choice((0, 1, 64))
    if kind in ("pack", "cache"):
        return kind, draw.choice(buffers), draw.choice([*loops, ""])
    return kind, loop


def random_schedule(
    program: Program, draw: random.Random, steps: int = 12
) -> tuple[Program, list[Step], int]:
    """The program after random steps, those that were taken, and how many were not."""
    taken: list[Step] = []
    refused = 0
    for _ in range(steps):
        step = random_step(program, draw)
        try:
            program = apply(program, [step])
            taken.append(step)
        except NotLegal:
            refused += 1
    return program, taken, refused


def small_programs() -> list[Program]:
    """One of each kind."""
    return [
        matmul(5, 4, 7),
        recurrence(),
        recurrence(di=0, dj=1),
        recurrence(di=1, dj=1),
        three_steps(),
        captured("attention_row", T=5, d=4)[0],
        captured("mlp", T=3, d=4, f=5)[0],
    ]
