"""The real TVM: our expressions as its functions, our schedules on its loops.

    function = prim_func(C)                       TIR, one loop per axis
    schedule = scheduled(function, [("split", "C", "i", (None, 4)), …])
    library = compiled(schedule)                  LLVM, for this CPU

A schedule is the same list for `loops.lower` and for TVM: names of loops are TVM's own
(i becomes i_0 and i_1), and blocks are called as their tensors. TVM has more primitives
than ours; each line of `PRIMITIVES` is one.

TVM's names are those of version 0.27: `tvm.s_tir.Schedule`, `get_sblock`,
`tvm.compile`. It is imported when it is needed: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llmlab.compilers.tvm.expressions import (
    Affine,
    Expression,
    Number,
    Operation,
    Read,
    Reduction,
    Tensor,
    placeholders,
)
from llmlab.compilers.tvm.loops import Primitive, Refused

if TYPE_CHECKING:
    import numpy as np

# Expressions --------------------------------------------------------------------------


def te_tensors(results: Sequence[Tensor]) -> dict[Tensor, Any]:
    """Our tensors, and all that they read, as TVM's."""
    from tvm import te

    made: dict[Tensor, Any] = {}

    def tensor(ours: Tensor) -> Any:
        if ours not in made:
            if ours.value is None:
                made[ours] = te.placeholder(ours.shape, name=ours.name)
            else:
                made[ours] = te.compute(ours.shape, body_of(ours), name=ours.name)
        return made[ours]

    def body_of(ours: Tensor) -> Callable:
        for each in ours.inputs:
            tensor(each)
        reduced = [te.reduce_axis((0, a.extent), name=a.name) for a in ours.reduced]

        def at(*axes: Any) -> Any:
            every = [*axes, *reduced]
            names = [axis.name for axis in (*ours.axes, *ours.reduced)]
            return value(ours.value, dict(zip(names, every, strict=True)))

        # TVM takes the names of axes from those of the parameters
        names = ", ".join(axis.name for axis in ours.axes)
        return eval(f"lambda {names}: at({names})", {"at": at})

    def value(ours: Expression, axes: Mapping[str, Any]) -> Any:
        match ours:
            case Number(value=number):
                return te.const(number, "float32")
            case Read(tensor=each, indices=indices):
                return made[each](*(index(i, axes) for i in indices))
            case Reduction(name=name, body=body, axes=over):
                combine = te.sum if name == "+" else te.max
                return combine(value(body, axes), axis=[axes[a.name] for a in over])
            case Operation(name=name, inputs=inputs):
                return OPERATIONS[name](te, *(value(each, axes) for each in inputs))
        raise ValueError(f"{ours!r} has no counterpart")

    for result in results:
        tensor(result)
    return made


OPERATIONS = {
    "+": lambda te, x, y: x + y,
    "-": lambda te, x, y: x - y,
    "*": lambda te, x, y: x * y,
    "/": lambda te, x, y: x / y,
    "max": lambda te, x, y: maximum(x, y),
    "exp": lambda te, x: te.exp(x),
    "tanh": lambda te, x: te.tanh(x),
}


def maximum(x: Any, y: Any) -> Any:
    """The larger of two TVM expressions."""
    import tvm

    return tvm.tirx.max(x, y)


def index(ours: Affine, axes: Mapping[str, Any]) -> Any:
    """An index as TVM's; a single axis stays that very variable."""
    if not ours.terms:
        return ours.constant
    terms = [axes[name] if c == 1 else axes[name] * c for name, c in ours.terms]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total + ours.constant if ours.constant else total


def prim_func(*results: Tensor) -> Any:
    """A TIR function: inputs in the order in which they are read, then the results."""
    from tvm import te

    made = te_tensors(results)
    tensors = [*placeholders(*results), *results]
    return te.create_prim_func([made[each] for each in tensors])


# Schedules ----------------------------------------------------------------------------


def loop(schedule: Any, block: str, name: str) -> Any:
    """A loop of a block, by the name of its variable."""
    names = []
    for each in schedule.get_loops(block_of(schedule, block)):
        names.append(str(schedule.get(each).loop_var.name))
        if names[-1] == name:
            return each
    raise Refused(f"{block} has no loop {name!r}; it has {', '.join(names)}")


def block_of(schedule: Any, name: str) -> Any:
    """Raises: Refused: there is no block of this name."""
    try:
        return schedule.get_sblock(name)
    except Exception as problem:
        raise Refused(f"there is no block {name!r}") from problem


def pack(schedule: Any, block: str, which: int, width: int) -> None:
    """A copy of an input in which `width` neighbours of a row are followed by those
    below them: what a tile of the product reads lies in one piece.
    """
    at = block_of(schedule, block)
    schedule.cache_read(at, which, "global")
    panels = lambda k, j: (j // width, k, j % width)  # noqa: E731 TVM counts parameters
    schedule.transform_layout(at, ("read", which), panels)


def on_loop(method: str) -> Callable:
    """A primitive of one loop."""

    def apply(schedule: Any, block: str, name: str) -> None:
        getattr(schedule, method)(loop(schedule, block, name))

    return apply


PRIMITIVES: dict[str, Callable] = {
    "split": lambda s, b, name, parts: s.split(loop(s, b, name), [*parts]),
    "fuse": lambda s, b, names: s.fuse(*(loop(s, b, name) for name in names)),
    "reorder": lambda s, b, names: s.reorder(*(loop(s, b, name) for name in names)),
    "vectorize": on_loop("vectorize"),
    "parallel": on_loop("parallel"),
    "unroll": on_loop("unroll"),
    "compute_at": lambda s, b, reader, name: s.compute_at(
        block_of(s, b), loop(s, reader, name)
    ),
    "reverse_compute_at": lambda s, b, writer, name: s.reverse_compute_at(
        block_of(s, b), loop(s, writer, name)
    ),
    "compute_inline": lambda s, b: s.compute_inline(block_of(s, b)),
    "cache_write": lambda s, b, scope: s.cache_write(block_of(s, b), 0, scope),
    "pack": pack,
    "decompose_reduction": lambda s, b, name: s.decompose_reduction(
        block_of(s, b), loop(s, b, name)
    ),
    "bind": lambda s, b, name, thread: s.bind(loop(s, b, name), thread),
    "blockize": lambda s, b, name: s.blockize(loop(s, b, name)),
}


def scheduled(function: Any, schedule: Sequence[Primitive]) -> Any:
    """TVM's `Schedule` of a TIR function, with each primitive applied.

    Raises:
        Refused: what TVM refuses, with the last line of its message.
    """
    import tvm

    found = tvm.s_tir.Schedule(function)
    for name, *arguments in schedule:
        if name not in PRIMITIVES:
            raise Refused(f"there is no primitive {name!r}: {', '.join(PRIMITIVES)}")
        try:
            PRIMITIVES[name](found, *arguments)
        except tvm.s_tir.ScheduleError as problem:
            raise Refused(f"{name}: {reason(str(problem))}") from problem
    return found


def reason(message: str) -> str:
    """What TVM has to say, without the program and the line marks that it prints."""
    _, found, said = message.rpartition("Error message:")
    return " ".join(said.split()) if found else message.strip().splitlines()[-1]


def realizations(schedule: Any) -> dict[str, tuple[list, Any]]:
    """Block → (its loops, outermost first; its realization), by walking the program."""
    found: dict[str, tuple[list, Any]] = {}

    def visit(node: Any, around: list) -> None:
        match type(node).__name__:
            case "For":
                visit(node.body, [*around, node])
            case "SeqStmt":
                for each in node.seq:
                    visit(each, around)
            case "SBlockRealize":
                found[str(node.block.name_hint)] = (around, node)
                visit(node.block.body, around)

    (function,) = schedule.mod.functions.values()
    visit(function.body, [])
    found.pop("root")
    return found


# Code ---------------------------------------------------------------------------------

NAMED = {
    "haswell": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"},
    "skylake-avx512": {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "skylake-avx512",
    },
    "neoverse-v1": {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "neoverse-v1",
    },
    "riscv64": {
        "kind": "llvm",
        "mtriple": "riscv64-linux-gnu",
        "mattr": ["+m", "+a", "+f", "+d", "+v"],
    },
    "c": {"kind": "c"},
    "cuda": {"kind": "cuda", "arch": "sm_80"},
    "webgpu": {"kind": "webgpu"},
    "opencl": {"kind": "opencl"},
    "metal": {"kind": "metal"},
}


@cache
def this_cpu() -> dict[str, Any]:
    """A target for the CPU that runs this.

    The name alone is not enough: a virtual machine may hide instructions that CPUs of
    that name have.
    """
    import tvm

    name = tvm.get_global_func("target.llvm_get_system_cpu")()
    features = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    marks = [f"{'+' if bool(on) else '-'}{each}" for each, on in features.items()]
    return {"kind": "llvm", "mcpu": str(name), "mattr": sorted(marks)}


def compiled(program: Any, target: str | None = None) -> Any:
    """A library for one of the `NAMED` targets, or for this CPU.

    Raises:
        ValueError: another name.
    """
    import tvm

    if target is not None and target not in NAMED:
        raise ValueError(f"target={target!r} must be one of {', '.join(NAMED)}")
    wanted = dict(this_cpu() if target is None else NAMED[target])
    module = program.mod if isinstance(program, tvm.s_tir.Schedule) else program
    host = NAMED["haswell"]
    if wanted["kind"] in ("llvm", "c"):
        return tvm.compile(module, target=tvm.target.Target(wanted))
    return tvm.compile(module, target=tvm.target.Target(wanted, host=host))


def source(library: Any, form: str = "") -> str:
    """The text of a library: of the part for the device, if it has one.

    Args:
        form: "ll" for LLVM's, "asm" for assembly, "" for what there is.
    """
    module = getattr(library, "mod", library)
    return (module.imports[0] if module.imports else module).inspect_source(form)


def call(library: Any, *arrays: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What the function `main` of a library writes to its last argument."""
    import numpy as np
    import tvm

    result = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    library["main"](*(tvm.runtime.tensor(array) for array in arrays), result)
    return result.numpy()
