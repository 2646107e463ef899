"""One function in the languages of real compilers, and a compiler of our own.

    languages     FX, ONNX, Relax, TIR, linalg, TTIR and TTGIR, each by its own tool;
                  StableHLO and HLO, stored
    reading       what stands in such a text: operations, decisions, parts
    kernel        the functions as Triton kernels
    tools         the same function compiled by each tool, to be run
    expressions   our compiler: from a Python function to LLVM IR
    machine       from there to machine code, by LLVM

Start with `expressions`.
"""

from llmlab.compilers.overview.expressions import (
    FUNCTIONS_OF_LLVM,
    INSTRUCTIONS,
    Expression,
    exp,
    linearise,
    literal,
    loop,
    lower,
    maximum,
    minimum,
    sqrt,
    tanh,
    to_llvm,
    trace,
)
from llmlab.compilers.overview.languages import (
    FUNCTIONS,
    LANGUAGES,
    STORED,
    Text,
    in_language,
)
from llmlab.compilers.overview.machine import (
    LEVELS,
    TARGETS,
    Compiled,
    assembly,
    better,
    compile_expression,
    compile_ir,
    floats_per_trip,
    hot_loop,
    loop_of,
    run_with,
)
from llmlab.compilers.overview.reading import (
    DECISIONS,
    PARTS,
    bytes_between,
    decided,
    knows_the_whole,
    operations,
    parts,
    root_two_over_pi,
)
from llmlab.compilers.overview.tools import TOOLS, compile_with, gelu

__all__ = [
    "DECISIONS",
    "FUNCTIONS",
    "FUNCTIONS_OF_LLVM",
    "INSTRUCTIONS",
    "LANGUAGES",
    "LEVELS",
    "PARTS",
    "STORED",
    "TARGETS",
    "TOOLS",
    "Compiled",
    "Expression",
    "Text",
    "assembly",
    "better",
    "bytes_between",
    "compile_expression",
    "compile_ir",
    "compile_with",
    "decided",
    "exp",
    "floats_per_trip",
    "gelu",
    "hot_loop",
    "in_language",
    "knows_the_whole",
    "linearise",
    "literal",
    "loop",
    "loop_of",
    "lower",
    "maximum",
    "minimum",
    "operations",
    "parts",
    "root_two_over_pi",
    "run_with",
    "sqrt",
    "tanh",
    "to_llvm",
    "trace",
]
