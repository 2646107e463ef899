"""The two functions of the part in the languages of real compilers.

    FX          PyTorch: torch.export captures, operations are ATen's
    ONNX        a file for others to read: torch.onnx
    StableHLO   what JAX hands to XLA, stored, for JAX is not in the environment
    HLO         what XLA's passes leave for a CPU, stored
    Relax       TVM's graph, from the same export
    TIR         TVM's loops, one function per operation of Relax
    linalg      MLIR, from the same export, by the importer that IREE brings
    TTIR        Triton's own language, from a kernel that a person wrote
    TTGIR       the same when Triton has given it to the threads of a GPU

Each is what the tool prints, without its remarks. No GPU is needed. The tools are
imported when they are first asked for.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmlab.compilers.program import FUNCTIONS, example_inputs

STORED = Path(__file__).parent / "data"
# The GPU for which Triton compiles: an A100, with 32 threads to a warp.
GPU = ("cuda", 80, 32)
TILE = {"R": 32, "C": 64, "K": 32}


@dataclass(frozen=True)
class Text:
    """A program in one language: what the tool printed, and the tool's version."""

    language: str
    tool: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()]


def in_language(function: str, language: str) -> Text:
    """`mlp` or `attention_row`, with the inputs of `example_inputs`, in a language.

    Where there is no Triton (it has wheels for Linux alone), its text is the stored
    one, and the tool's name says so.

    Raises:
        ValueError: a function or a language that is not in the lists.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"function={function!r} must be one of {', '.join(FUNCTIONS)}")
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r} must be one of {', '.join(LANGUAGES)}")
    tool, text = LANGUAGES[language](function)
    return Text(language, tool, text)


# PyTorch ------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A function as a module, for exporters take nothing else."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.forward = function


@cache
def exported(function: str) -> Any:
    """The ExportedProgram, in the operations that backends are promised."""
    module = Wrapped(FUNCTIONS[function])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.export.export(module, example_inputs(function))
        return found.run_decompositions()


def to_fx(function: str) -> tuple[str, str]:
    """PyTorch's graph, without the notes on who is freed when."""
    text = exported(function).graph_module.print_readable(print_output=False)
    text = re.sub(r"\n +#[^\n]*", "", text)
    return f"torch.export {version('torch')}", re.sub(r";  .*", "", text).strip()


@cache
def onnx_model(function: str) -> bytes:
    """The contents of an ONNX file, opset 20, by PyTorch's exporter that traces."""
    names = {"mlp": ["x", "w", "b"], "attention_row": ["q", "k", "v"]}[function]
    into = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Wrapped(FUNCTIONS[function]),
            example_inputs(function),
            into,
            dynamo=False,
            opset_version=20,
            input_names=names,
            output_names=["y"],
        )
    return into.getvalue()


def to_onnx_text(function: str) -> tuple[str, str]:
    """The graph of an ONNX file as text."""
    import onnx

    model = onnx.load_from_string(onnx_model(function))
    text = onnx.printer.to_text(model.graph)
    # `["/Gelu"] y = Gelu …`: the node's own name is not needed
    return f"torch.onnx {version('torch')}", re.sub(r'\["[^"]*"\] ', "", text)


# XLA ----------------------------------------------------------------------------------


def stored_by_jax(function: str, ending: str) -> tuple[str, str]:
    """A text of scripts/golden/overview_goldens.py; its first line has the version."""
    stored = (STORED / f"{function}.{ending}").read_text(encoding="utf-8")
    first, text = stored.split("\n", 1)
    return f"{first.removeprefix('// ')}, stored", text.strip()


def to_stablehlo(function: str) -> tuple[str, str]:
    """What JAX hands to XLA."""
    return stored_by_jax(function, "stablehlo")


def to_hlo(function: str) -> tuple[str, str]:
    """What XLA's passes leave: fusions, and the layout of each array."""
    return stored_by_jax(function, "hlo")


# TVM ----------------------------------------------------------------------------------


@cache
def relax_module(function: str) -> Any:
    """The function in TVM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tvm.relax.frontend.torch import from_exported_program

        return from_exported_program(exported(function))


def printed_by_tvm(module: Any) -> tuple[str, str]:
    """A module's script, without its imports."""
    text = module.script().split("@I.ir_module\n")[1]
    return f"TVM {version('apache-tvm')}", text.strip()


def to_relax(function: str) -> tuple[str, str]:
    """TVM's graph."""
    return printed_by_tvm(relax_module(function))


def to_tir(function: str) -> tuple[str, str]:
    """TVM's loops: each operation is now a function over buffers."""
    from tvm import relax

    return printed_by_tvm(relax.transform.LegalizeOps()(relax_module(function)))


# MLIR ---------------------------------------------------------------------------------


def to_linalg(function: str) -> tuple[str, str]:
    """MLIR: torch's dialect, then linalg on tensors."""
    from iree.compiler import passmanager
    from iree.compiler.extras.fx_importer import FxImporter

    importer = FxImporter()
    importer.import_frozen_program(exported(function), func_name=function)
    passes = (
        "builtin.module(func.func(torch-decompose-complex-ops),"
        "torch-backend-to-linalg-on-tensors-backend-pipeline)"
    )
    with importer.module.context:
        passmanager.PassManager.parse(passes).run(importer.module.operation)
    tool = f"torch-mlir in IREE {version('iree-base-compiler')}"
    return tool, str(importer.module).strip()


# Triton -------------------------------------------------------------------------------


@cache
def triton_stages(function: str) -> dict[str, Any]:
    """Every stage from TTIR to PTX and the code of the GPU.

    Raises:
        RuntimeError: Triton was imported as an interpreter, which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmlab.compilers.overview import kernel

    chosen = getattr(kernel, function)
    if not isinstance(chosen, triton.runtime.JITFunction):
        raise RuntimeError(
            "Triton was imported with TRITON_INTERPRET=1: it compiles nothing in this"
            " process"
        )
    inputs = example_inputs(function)
    if function == "mlp":
        sizes = {"d": inputs[1].shape[0], "f": inputs[1].shape[1], **TILE}
    else:
        sizes = {"S": inputs[1].shape[0], "D": inputs[1].shape[1]}
    names = [name for name in chosen.arg_names if name not in sizes]
    source = ASTSource(chosen, dict.fromkeys(names, "*fp32"), sizes)
    return dict(triton.compile(source, target=GPUTarget(*GPU)).asm)


def triton_text(function: str, stage: str) -> tuple[str, str]:
    """One stage, without the places in the source; the stored one without Triton."""
    if find_spec("triton") is None:
        stored = STORED / f"{function}.{stage}"
        return "Triton 3.7.1, stored", stored.read_text(encoding="utf-8").strip()
    text = re.sub(r"^#loc.*\n", "", triton_stages(function)[stage], flags=re.M)
    # loc("x"(#loc)), loc(#loc12), loc(callsite(#loc1 at #loc2))
    text = re.sub(r" loc\((?:[^()]+|\([^()]*\))*\)", "", text)
    return f"Triton {version('triton')}", text.strip()


def to_ttir(function: str) -> tuple[str, str]:
    """What one program does with its tile."""
    return triton_text(function, "ttir")


def to_ttgir(function: str) -> tuple[str, str]:
    """The same, with a layout of threads in every type."""
    return triton_text(function, "ttgir")


def version(package: str) -> str:
    """The version that is installed."""
    from importlib import metadata

    return metadata.version(package).split("+")[0]


LANGUAGES: dict[str, Callable[[str], tuple[str, str]]] = {
    "FX": to_fx,
    "ONNX": to_onnx_text,
    "StableHLO": to_stablehlo,
    "HLO": to_hlo,
    "Relax": to_relax,
    "TIR": to_tir,
    "linalg": to_linalg,
    "TTIR": to_ttir,
    "TTGIR": to_ttgir,
}
