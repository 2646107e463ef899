"""Relax: a program of functions on whole tensors, and its way down to loops.

    module = imported(mlp, *inputs)     torch.export → Relax: R.matmul, R.add, …
    legalise                            each becomes a TIR function, called by call_tir
    annotate                            its kind is found from its indices
    fuse                                functions that call several
    merge                               their loops in one TIR function

`STAGES` lists the passes; `lowered` gives the module after each. Fusing puts loops in
one function and leaves them apart: `one_nest` is the schedule that makes them one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmlab.compilers.tvm.fusion import Kind, Step
from llmlab.compilers.tvm.loops import Primitive, Refused
from llmlab.compilers.tvm.product import registers
from llmlab.compilers.tvm.with_tvm import realizations, this_cpu

if TYPE_CHECKING:
    from torch import Tensor

STAGES = {
    "legalise": "LegalizeOps",
    "annotate": "AnnotateTIROpPattern",
    "fuse": "FuseOps",
    "merge": "FuseTIR",
}


def imported(
    function: Callable, *inputs: Tensor, dynamic: Mapping[str, Any] | None = None
) -> Any:
    """A torch function as a Relax module.

    Args:
        dynamic: argument → {dimension: torch.export.Dim}, for sizes without a number.
    """
    import inspect

    import torch
    from tvm.relax.frontend.torch import from_exported_program

    names = list(inspect.signature(function).parameters)

    class Program(torch.nn.Module):
        """What torch.export takes."""

    # it reads the names of arguments from the signature
    words = ", ".join(names)
    text = f"lambda self, {words}: function({words})"
    Program.forward = eval(text, {"function": function})
    shapes = {name: (dynamic or {}).get(name) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            Program(), inputs, dynamic_shapes=shapes if dynamic else None
        )
        return from_exported_program(exported, unwrap_unit_return_tuple=True)


def lowered(module: Any) -> dict[str, Any]:
    """The module as it was, and after each stage."""
    from tvm import relax

    found = {"imported": module}
    for name, each in STAGES.items():
        module = getattr(relax.transform, each)()(module)
        found[name] = module
    return found


def bindings(module: Any, function: str = "main") -> list[tuple[str, Any]]:
    """(name, value) of each line of a Relax function."""
    return [
        (str(each.var.name), each.value)
        for block in module[function].body.blocks
        for each in block.bindings
    ]


def calls(module: Any, function: str = "main") -> list[tuple[str, str, list[str]]]:
    """(name, TIR function, what it reads) of each call_tir."""
    import tvm
    from tvm import relax

    call_tir = tvm.ir.Op.get("relax.call_tir")
    found = []
    for name, value in bindings(module, function):
        if isinstance(value, relax.Call) and value.op == call_tir:
            callee, arguments = value.args[0], value.args[1]
            reads = [str(getattr(each, "name", "")) for each in arguments.fields]
            found.append((name, str(callee.name_hint), reads))
    return found


def steps(annotated: Any) -> tuple[list[Step], list[str]]:
    """An annotated module as a graph of `fusion`, and what it returns."""
    from tvm import relax

    found = calls(annotated)
    names = {name for name, _, _ in found}
    graph = []
    for name, callee, reads in found:
        kind = Kind(int(annotated[callee].attrs["op_pattern"]))
        kept = tuple(dict.fromkeys(each for each in reads if each in names))
        graph.append(Step(name, kind, kept))
    outputs = [
        name
        for block in annotated["main"].body.blocks
        for each in block.bindings
        if not isinstance(each.var, relax.DataflowVar)
        for name in [str(getattr(each.value, "name", each.var.name))]
    ]
    return graph, outputs


def groups(fused: Any) -> list[list[str]]:
    """The lines of a fused module, each as the TIR functions that it calls."""
    from tvm import relax

    found = []
    for _, value in bindings(fused):
        if not isinstance(value, relax.Call):
            continue
        if isinstance(value.op, relax.GlobalVar):
            inner = calls(fused, str(value.op.name_hint))
            found.append([callee for _, callee, _ in inner])
        else:
            found.append([str(value.args[0].name_hint)])
    return found


def kernel(merged: Any, name: str) -> Any:
    """A TIR function of a module, as one that can be compiled by itself."""
    return merged[name].with_attr("global_symbol", "main")


def handed_on(schedule: Any) -> list[int]:
    """Bytes of each buffer that loops of a function write for others to read.

    As TVM will allocate them: as much as is alive inside the loops around.
    """
    import tvm

    passes = tvm.s_tir.transform
    module = tvm.ir.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
        ]
    )(schedule.mod)
    (function,) = module.functions.values()
    return [
        4 * math.prod(int(size) for size in buffer.shape)
        for node in nodes(function.body)
        if hasattr(node, "alloc_buffers")
        for buffer in node.alloc_buffers
    ]


def nodes(statement: Any) -> Iterator[Any]:
    """A statement of loops and blocks, and all in it."""
    yield statement
    parts = [getattr(statement, name, None) for name in ("block", "body")]
    for part in (*parts, *getattr(statement, "seq", ())):
        if part is not None:
            yield from nodes(part)


def planned(merged: Any) -> list[int]:
    """Bytes of each piece of memory that Relax's plan sets aside between functions."""
    import tvm
    from tvm import relax

    passes = relax.transform
    module = tvm.ir.transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
        ]
    )(merged)
    storage = tvm.ir.Op.get("relax.memory.alloc_storage")
    return [
        int(value.args[0].values[0])
        for _, value in bindings(module)
        if isinstance(value, relax.Call) and value.op == storage
    ]


def one_nest(function: Any, rows: int = 4, columns: int = 16) -> list[Primitive]:
    """The schedule that makes a product and what follows it one nest of loops.

    All that lies between is computed where it is read, and the last operation takes
    each block of the product from the registers.

    Raises:
        Refused: the function does not begin with a product.
    """
    import tvm

    found = realizations(tvm.s_tir.Schedule(function))
    product, *others = found
    loops = [str(loop.loop_var.name) for loop in found[product][0]]
    if len(loops) != 3 or not others:
        raise Refused(f"{product} has loops {loops}: not a product and what follows")
    last = others[-1]
    schedule: list[Primitive] = [("compute_inline", name) for name in others[:-1]]
    names = (loops[0], loops[1], loops[2])
    return schedule + registers(rows, columns, block=product, loops=names, writer=last)


def executable(module: Any) -> Callable[..., Any]:
    """The function `main` of a module, on torch tensors, for this CPU."""
    import torch
    import tvm
    from tvm import relax

    library = tvm.compile(module, target=tvm.target.Target(this_cpu()))
    main = relax.VirtualMachine(library, tvm.cpu())["main"]

    def call(*inputs: Tensor) -> Tensor:
        arrays = (tvm.runtime.tensor(x.detach().numpy()) for x in inputs)
        return torch.from_numpy(main(*arrays).numpy())

    return call
