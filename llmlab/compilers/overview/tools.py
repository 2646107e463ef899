"""The same function, compiled by each tool, as a function of torch tensors.

    PyTorch         as it stands, one operation after the other
    torch.compile   Dynamo and Inductor: C++, which needs a C++ compiler
    TVM             the loops as they come, fused, without a schedule
    IREE            linalg, tiled and vectorised by IREE
    onnxruntime     a file read by a library of kernels
    ours            torch.addmm, then GELU as a loop of ours (mlp alone)

`cpu="host"` uses all that this CPU can; "generic" what every CPU of its kind can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmlab.compilers.overview import expressions, languages
from llmlab.compilers.overview.expressions import Expression
from llmlab.compilers.overview.machine import compile_expression

Runs = Callable[..., Tensor]
ROOT = 0.7978845608028654  # √(2/π)


def gelu(x: Expression, root: float = ROOT) -> Expression:
    """GELU in its tanh form."""
    inner = root * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + expressions.tanh(inner))


def compile_with(tool: str, function: str, cpu: str = "generic") -> Runs:
    """`mlp` or `attention_row` as a tool compiles it.

    Raises:
        ValueError: a tool, or a function, or a cpu that is not in the lists; or a
            function that the tool cannot compile.
    """
    if tool not in TOOLS:
        raise ValueError(f"tool={tool!r} must be one of {', '.join(TOOLS)}")
    if function not in languages.FUNCTIONS:
        known = ", ".join(languages.FUNCTIONS)
        raise ValueError(f"function={function!r} must be one of {known}")
    if cpu not in ("generic", "host"):
        raise ValueError(f"cpu={cpu!r} must be 'generic' or 'host'")
    return TOOLS[tool](function, cpu)


def by_pytorch(function: str, cpu: str) -> Runs:
    """As it stands."""
    return languages.FUNCTIONS[function]


def by_torch_compile(function: str, cpu: str) -> Runs:
    """Compiled for this CPU, when it is first called."""
    return torch.compile(languages.FUNCTIONS[function])


def by_tvm(function: str, cpu: str) -> Runs:
    """Relax's passes of fusion, then LLVM."""
    import tvm
    from tvm import relax

    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    module = tvm.ir.transform.Sequential(passes)(languages.relax_module(function))
    target: Any = "llvm"
    if cpu == "host":
        host = tvm.get_global_func("target.llvm_get_system_cpu")()
        target = tvm.target.Target({"kind": "llvm", "mcpu": host})
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())

    def run(*tensors: Tensor) -> Tensor:
        given = [tvm.runtime.from_dlpack(tensor) for tensor in tensors]
        return torch.from_dlpack(machine["main"](*given)[0])

    return run


def by_iree(function: str, cpu: str) -> Runs:
    """From linalg to a module that runs in this thread."""
    import iree.compiler
    import iree.runtime

    text = languages.in_language(function, "linalg").text
    module = iree.compiler.compile_str(
        text,
        target_backends=["llvm-cpu"],
        extra_args=[f"--iree-llvmcpu-target-cpu={cpu}"],
    )
    loaded = iree.runtime.load_vm_flatbuffer(module, driver="local-sync")

    def run(*tensors: Tensor) -> Tensor:
        result = loaded[function](*[tensor.numpy() for tensor in tensors])
        return torch.from_numpy(result.to_host().copy())

    return run


def by_onnxruntime(function: str, cpu: str) -> Runs:
    """The file, optimised and run by onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        languages.onnx_model(function), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        given = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def by_ours(function: str, cpu: str) -> Runs:
    """The product by PyTorch, for our compiler has no sum; GELU by our loop."""
    if function != "mlp":
        raise ValueError(
            f"function={function!r} has sums, and our compiler has none: only 'mlp'"
        )
    loop = compile_expression(gelu, 1)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return loop(torch.addmm(b, x, w))

    return run


TOOLS: dict[str, Callable[[str, str], Runs]] = {
    "PyTorch": by_pytorch,
    "torch.compile": by_torch_compile,
    "TVM": by_tvm,
    "IREE": by_iree,
    "onnxruntime": by_onnxruntime,
    "ours": by_ours,
}
