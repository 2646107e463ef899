"""A compiler's front end: from a Python function to few kernels with little traffic.

    ir        the program: operations on values that are written once, with types
    capture   a function, run once on values that only write down
    rules     algebra as data
    passes    the same program, better: dead code, constants, equal values, layout
    fusion    which operations run in one kernel
    memory    where their results lie
    execute   kernels, run piece by piece
    to_onnx   the program for others to read

Start with `ir`.
"""

from llmlab.compilers.front_end.capture import CannotCapture, capture, report
from llmlab.compilers.front_end.execute import Program, compile_graph, program_of
from llmlab.compilers.front_end.fusion import (
    Kernel,
    along_rows,
    fuse,
    joins,
    one_by_one,
    rows,
    small_inputs,
    traffic,
)
from llmlab.compilers.front_end.ir import (
    OPS,
    Graph,
    Node,
    Op,
    Type,
    TypeMismatch,
    broadcast,
    constant,
    inferred,
    lines,
    made,
    run,
)
from llmlab.compilers.front_end.memory import (
    ALIGNMENT,
    Life,
    arena,
    home,
    lifetimes,
    most_alive,
    plan,
)
from llmlab.compilers.front_end.passes import (
    PASSES,
    choose_layout,
    fold_constants,
    key_of,
    merge_equal,
    optimise,
    rebuilt,
    remove_dead,
    simplify,
)
from llmlab.compilers.front_end.rules import FAST_MATH, RULES, Bindings, Rule, match
from llmlab.compilers.front_end.to_onnx import to_onnx

__all__ = [
    "ALIGNMENT",
    "FAST_MATH",
    "OPS",
    "PASSES",
    "RULES",
    "Bindings",
    "CannotCapture",
    "Graph",
    "Kernel",
    "Life",
    "Node",
    "Op",
    "Program",
    "Rule",
    "Type",
    "TypeMismatch",
    "along_rows",
    "arena",
    "broadcast",
    "capture",
    "choose_layout",
    "compile_graph",
    "constant",
    "fold_constants",
    "fuse",
    "home",
    "inferred",
    "joins",
    "key_of",
    "lifetimes",
    "lines",
    "made",
    "match",
    "merge_equal",
    "most_alive",
    "one_by_one",
    "optimise",
    "plan",
    "program_of",
    "rebuilt",
    "remove_dead",
    "report",
    "rows",
    "run",
    "simplify",
    "small_inputs",
    "to_onnx",
    "traffic",
]
