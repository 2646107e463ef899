"""Random expressions and schedules."""

from __future__ import annotations

import random

from llmlab.compilers.tvm.expressions import (
    Affine,
    Tensor,
    compute,
    exp,
    interval,
    max_over,
    maximum,
    placeholder,
    reduce_axis,
    sum_over,
    tanh,
)
from llmlab.compilers.tvm.loops import Program, Refused, lower


def expression(seed: int) -> Tensor:
    """A result that reads a computed tensor P, which reads the input A."""
    draw = random.Random(seed)
    shape = (draw.randint(3, 9), draw.randint(3, 9))
    reduced = [
        reduce_axis(name, draw.randint(2, 4)) for name in "rq"[: draw.randint(0, 2)]
    ]
    extents = {"i": shape[0], "j": shape[1], **{a.name: a.extent for a in reduced}}

    def random_index(names: list[str]) -> Affine:
        chosen = draw.sample(names, draw.randint(1, min(2, len(names))))
        terms = {name: draw.choice((1, 1, 1, 2, 3, -1)) for name in chosen}
        index = Affine.of(terms)
        # so that the smallest is 0, or a little more
        return index - interval(index, extents)[0] + draw.choice((0, 0, 1))

    indices = [random_index([*extents]) for _ in range(2)]
    near = [index + draw.choice((0, 0, 1)) for index in indices]
    size = tuple(interval(x, extents)[1] + draw.choice((1, 1, 2)) for x in near)
    A = placeholder("A", size if draw.random() < 0.7 else size[::-1])
    turned = A.shape != size or (size[0] == size[1] and draw.random() < 0.3)
    P = compute(
        "P", size, lambda i, j: tanh(A[j, i] if turned else A[i, j]) * 2.0 + 0.5
    )
    B = placeholder("B", (shape[1],))

    def value(i, j):
        read = P[indices[0], indices[1]]
        if draw.random() < 0.4:
            read = maximum(read, P[near[0], near[1]])
        if reduced:
            return draw.choice((sum_over, max_over))(read * B[j], *reduced)
        return exp(read) / (B[j] * B[j] + 1.0)

    return compute("C", shape, value)


def schedule(result: Tensor, seed: int) -> tuple[list[tuple], Program]:
    """Primitives that ours accepts, and its program; refused ones are left out."""
    draw = random.Random(seed)
    found: list[tuple] = []
    program = lower(result)
    for _ in range(draw.randint(2, 9)):
        stage = program.stages[draw.choice(["C", "C", "P"])]
        name = stage.tensor.name
        loops = [loop.name for loop in stage.loops if loop.kind == "serial"]
        if not loops:
            continue
        one = draw.choice(loops)
        kind = draw.choice(("split", "split", "reorder", "mark", "at"))
        if kind == "split":
            parts = [draw.randint(1, 5) for _ in range(draw.randint(1, 2))]
            parts.insert(draw.randint(0, len(parts)), None)
            step = ("split", name, one, tuple(parts))
        elif kind == "reorder":
            some = draw.sample(loops, draw.randint(1, len(loops)))
            step = ("reorder", name, tuple(some))
        elif kind == "mark":
            # TVM's threads do not nest
            nested = any(step[0] == "parallel" for step in found)
            how = draw.choice(("vectorize", "unroll" if nested else "parallel"))
            step = (how, name, one)
        else:
            step = ("compute_at", "P", "C", one)
        try:
            program = lower(result, schedule=[*found, step])
        except Refused:
            continue
        found.append(step)
    return found, program
