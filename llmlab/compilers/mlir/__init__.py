"""MLIR's ideas: values, dialects, rewriting, and the way down to machine code.

    ssa, ssa_passes, ssa_text    blocks and values: dominance, verification, passes
    dialect      the operations of this part's functions, in xDSL
    evaluate     what they compute, in torch
    importing    from the front end's graph to the dialect
    patterns     rewriting on the dialect
    to_linalg    down to loops that are described by maps
    bufferise    from tensors to memory
    to_llvm      loops, jumps, instructions
    machine      all levels in one go, and machine code
    iree         the same text through a compiler that is made of MLIR

Start with `ssa`, then `dialect`. xDSL is an MLIR in Python: the same text, the same
terms, nothing to be built.
"""

from llmlab.compilers.mlir import dialect, iree, machine, patterns, ssa, ssa_passes
from llmlab.compilers.mlir.bufferise import Buffers, bufferise
from llmlab.compilers.mlir.evaluate import evaluate
from llmlab.compilers.mlir.importing import from_graph
from llmlab.compilers.mlir.machine import (
    TARGETS,
    Compiled,
    assembly,
    compile_module,
    instructions,
    lower,
)
from llmlab.compilers.mlir.patterns import apply, cheapest, optimise
from llmlab.compilers.mlir.ssa import Block, Function, Op, Value
from llmlab.compilers.mlir.ssa_text import as_llvm, as_mlir
from llmlab.compilers.mlir.to_linalg import (
    Linalg,
    NotLegal,
    Scalars,
    broadcast_map,
    map_of,
    to_linalg,
)

__all__ = [
    "TARGETS",
    "Block",
    "Buffers",
    "Compiled",
    "Function",
    "Linalg",
    "NotLegal",
    "Op",
    "Scalars",
    "Value",
    "apply",
    "as_llvm",
    "as_mlir",
    "assembly",
    "broadcast_map",
    "bufferise",
    "cheapest",
    "compile_module",
    "dialect",
    "evaluate",
    "from_graph",
    "instructions",
    "iree",
    "lower",
    "machine",
    "map_of",
    "optimise",
    "patterns",
    "ssa",
    "ssa_passes",
    "to_linalg",
]
