"""Kernels in Triton, run without a GPU and read as far down as the machine's words.

    programs    our own interpreter: it counts bytes, refuses stray addresses and races
    kernels     softmax, the part's mlp, attention, one product: needs triton
    launching   the same as functions of tensors: needs triton
    compiling   for GPUs that are not here, in a process of its own
    reading     what each line became: operations, instructions, what they need
    stored      what was compiled once and kept
    layouts     which thread holds which number: matrices over GF(2)
    tuning      which tile is best: what rules some out, and a model

Start with `programs` and `kernels`. `kernels` and
`launching` are imported by their names: they import Triton, and that settles whether
it compiles or interprets.
"""

from llmlab.compilers.triton_kernels.compiling import (
    TARGETS,
    CannotCompile,
    Compiled,
    Job,
    compile_jobs,
)
from llmlab.compilers.triton_kernels.layouts import (
    Blocked,
    Linear,
    TensorCore,
    linear,
    parse,
    solve,
)
from llmlab.compilers.triton_kernels.programs import (
    OutOfRange,
    Race,
    Report,
    launch,
    tl,
)

__all__ = [
    "TARGETS",
    "Blocked",
    "CannotCompile",
    "Compiled",
    "Job",
    "Linear",
    "OutOfRange",
    "Race",
    "Report",
    "TensorCore",
    "compile_jobs",
    "launch",
    "linear",
    "parse",
    "solve",
    "tl",
]
