"""TVM: what is computed, in which order, and which operations run together.

    expressions  each number of a result, as a formula: nothing on order
    loops        a schedule as data, and the loops that it makes
    fusion       kinds of operations, and which become one function
    with_tvm     the real TVM: the same expressions and the same schedules
    product      a matrix product, from three loops to the speed of a library
    graph        Relax: a torch function on its way down to loops
    tuner        schedules drawn, measured, changed; with a log

Our own loops and groups are small enough to read, and are compared with TVM's on random
programs. Start with `expressions`.
"""

from llmlab.compilers.tvm.expressions import (
    Affine,
    Axis,
    Read,
    Tensor,
    affine,
    compute,
    exp,
    interval,
    max_over,
    maximum,
    placeholder,
    placeholders,
    reduce_axis,
    stages,
    sum_over,
    tanh,
)
from llmlab.compilers.tvm.fusion import (
    Kind,
    Step,
    between,
    dominators,
    fuse_groups,
    kind_of,
    may_fuse,
    read_kind,
)
from llmlab.compilers.tvm.loops import (
    Loop,
    Program,
    Refused,
    lower,
    region,
    run,
    split,
)
from llmlab.compilers.tvm.product import STEPS, matmul, registers
from llmlab.compilers.tvm.tuner import (
    Choice,
    Record,
    Tile,
    best,
    mutate,
    neighbours,
    primes,
    product_schedule,
    product_space,
    sample,
    tiles,
    tune,
)

__all__ = [
    "STEPS",
    "Affine",
    "Axis",
    "Choice",
    "Kind",
    "Loop",
    "Program",
    "Read",
    "Record",
    "Refused",
    "Step",
    "Tensor",
    "Tile",
    "affine",
    "best",
    "between",
    "compute",
    "dominators",
    "exp",
    "fuse_groups",
    "interval",
    "kind_of",
    "lower",
    "matmul",
    "max_over",
    "maximum",
    "may_fuse",
    "mutate",
    "neighbours",
    "placeholder",
    "placeholders",
    "primes",
    "product_schedule",
    "product_space",
    "read_kind",
    "reduce_axis",
    "region",
    "registers",
    "run",
    "sample",
    "split",
    "stages",
    "sum_over",
    "tanh",
    "tiles",
    "tune",
]
