"""Random graphs of operations, as ours and as Relax modules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llmlab.compilers.tvm import fusion
from llmlab.compilers.tvm.expressions import (
    Tensor,
    compute,
    exp,
    max_over,
    placeholder,
    placeholders,
    reduce_axis,
    sum_over,
)
from llmlab.compilers.tvm.with_tvm import prim_func

N = 6
k = reduce_axis("k", N)


def square(name: str) -> Tensor:
    return placeholder(name, (N, N))


def row(name: str) -> Tensor:
    return placeholder(name, (N,))


def softmax(a: Tensor) -> Tensor:
    top = compute("top", (N,), lambda i: max_over(a[i, k], k))
    e = compute("e", (N, N), lambda i, j: exp(a[i, j] - top[i]))
    total = compute("total", (N,), lambda i: sum_over(e[i, k], k))
    return compute("y", (N, N), lambda i, j: e[i, j] / total[i])


def centred(a: Tensor) -> Tensor:
    """A sum whose result is used in another place than it was."""
    mean = compute("mean", (N,), lambda i: sum_over(a[i, k], k))
    return compute("y", (N, N), lambda i, j: a[i, j] - mean[j])


def pool(a: Tensor) -> Tensor:
    r = reduce_axis("r", 3)
    return compute("y", (N, 4), lambda i, j: max_over(a[i, j + r], r))


def two_steps(a: Tensor) -> Tensor:
    t = compute("t", (N, N), lambda i, j: a[j, i] * 0.5)
    return compute("y", (N, N), lambda i, j: t[i, j] + 1.0)


S, R = "square", "row"
# name → (what it reads, what it makes, the expression)
OPERATIONS = {
    "exp": ([S], S, lambda a: compute("y", (N, N), lambda i, j: exp(a[i, j] * 0.1))),
    "add": (
        [S, S],
        S,
        lambda a, b: compute("y", (N, N), lambda i, j: a[i, j] + b[i, j]),
    ),
    "bias": (
        [S, R],
        S,
        lambda a, b: compute("y", (N, N), lambda i, j: a[i, j] + b[j]),
    ),
    "rows": ([R], S, lambda b: compute("y", (N, N), lambda i, j: b[j] * 0.5)),
    "outer": (
        [R, R],
        S,
        lambda a, b: compute("y", (N, N), lambda i, j: a[i] * b[j]),
    ),
    "negate": ([R], R, lambda b: compute("y", (N,), lambda i: b[i] * -1.0)),
    "transpose": ([S], S, lambda a: compute("y", (N, N), lambda i, j: a[j, i] * 1.0)),
    "flip": ([S], S, lambda a: compute("y", (N, N), lambda i, j: a[i, 5 - j] * 0.5)),
    "diagonal": ([S], R, lambda a: compute("y", (N,), lambda i: a[i, i] * 1.0)),
    "sum": ([S], R, lambda a: compute("y", (N,), lambda i: sum_over(a[i, k], k))),
    "columns": ([S], R, lambda a: compute("y", (N,), lambda j: sum_over(a[k, j], k))),
    "squares": (
        [S],
        R,
        lambda a: compute("y", (N,), lambda i: sum_over(a[i, k] * a[i, k], k)),
    ),
    "dot": (
        [S, R],
        R,
        lambda a, b: compute("y", (N,), lambda i: sum_over(a[i, k] * b[k], k)),
    ),
    "matmul": (
        [S, S],
        S,
        lambda a, b: compute("y", (N, N), lambda i, j: sum_over(a[i, k] * b[k, j], k)),
    ),
    "softmax": ([S], S, softmax),
    "centred": ([S], S, centred),
    "turned": ([S], S, two_steps),
}


def repeated(b: Tensor) -> Tensor:
    """A sum over an axis that nothing reads: for TVM, elementwise."""
    return compute("y", (N, N), lambda i, j: sum_over(b[j] * 1.0, k))


ALONE = {
    **OPERATIONS,
    "pool": ([S], "other", pool),
    "repeated": ([R], S, repeated),
}


def expression(name: str) -> Tensor:
    """An operation on inputs of its own."""
    kinds, _, make = ALONE[name]
    inputs = [
        square(f"x{i}") if kind == S else row(f"x{i}") for i, kind in enumerate(kinds)
    ]
    return make(*inputs)


Node = tuple[str, str, list[str]]  # its name, its operation, what it reads


def random_graph(seed: int) -> list[Node]:
    """Operations; they read the inputs A (square) and B (a row) and each other."""
    draw = random.Random(seed)
    made = {S: ["A"], R: ["B"]}
    nodes: list[Node] = []
    for n in range(draw.randint(2, 10)):
        name = draw.choice([*OPERATIONS, "exp", "add", "bias", "matmul", "negate"])
        kinds, result, _ = OPERATIONS[name]
        reads = [draw.choice(made[kind][-3:]) for kind in kinds]
        nodes.append((f"n{n}", name, reads))
        made[result].append(f"n{n}")
    return nodes


def results(nodes: Sequence[Node], seed: int) -> list[str]:
    """What nobody reads, and sometimes one more."""
    read = {each for _, _, reads in nodes for each in reads}
    found = [name for name, _, _ in nodes if name not in read]
    draw = random.Random(seed)
    more = [name for name, _, _ in nodes if name not in found]
    if more and draw.random() < 0.3:
        found.append(draw.choice(more))
    return found


def steps(nodes: Sequence[Node]) -> list[fusion.Step]:
    """As ours."""
    names = {name for name, _, _ in nodes}
    return [
        fusion.Step(
            name,
            fusion.kind_of(expression(operation)),
            tuple(dict.fromkeys(each for each in reads if each in names)),
        )
        for name, operation, reads in nodes
    ]


def relax_module(nodes: Sequence[Node], outputs: Sequence[str]) -> Any:
    """As a Relax module, one call_tir per operation."""
    from tvm import relax

    builder = relax.BlockBuilder()
    square_type = relax.TensorType((N, N), "float32")
    row_type = relax.TensorType((N,), "float32")
    values: dict[str, Any] = {
        "A": relax.Var("A", square_type),
        "B": relax.Var("B", row_type),
    }
    with builder.function("main", [values["A"], values["B"]]):
        with builder.dataflow():
            for name, operation, reads in nodes:
                ours = expression(operation)
                order = [int(each.name[1:]) for each in placeholders(ours)]
                function = prim_func(ours).without_attr("global_symbol")
                # or Relax would keep equal functions once
                function = function.with_attr("step", name)
                variable = builder.add_func(function, name)
                kind = square_type if OPERATIONS[operation][1] == S else row_type
                read = relax.Tuple([values[reads[i]] for i in order])
                call = relax.call_tir(variable, read, kind)
                emit = builder.emit_output if name in outputs else builder.emit
                values[name] = emit(call, name_hint=name)
        builder.emit_func_output(relax.Tuple([values[name] for name in outputs]))
    return builder.get()


def names_of_steps(fused: Any) -> dict[str, str]:
    """TIR function → the step that it was made for."""
    return {
        str(variable.name_hint): str(function.attrs["step"])
        for variable, function in fused.functions.items()
        if "step" in (function.attrs or {})
    }
