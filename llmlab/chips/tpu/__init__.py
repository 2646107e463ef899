"""TPU: a systolic array, cycle by cycle, and what is around it.

array.py        an array and a product: folds, cycles, utilisation, reads and writes
registers.py    the same array register by register, with numbers that move
scale_sim.py    how SCALE-Sim counts the same
shapes.py       generations of TPUs; the shapes of models on them, tiles and padding
torus.py        chips on a torus: how long collectives take on it
pallas.py       kernels for a TPU, run by JAX's interpreter
interpreter.py  what that interpreter saw: copies, and races that its clocks show

Start with `Run` in array.py, and with `_Held.step` in registers.py, which is one cycle.
"""

from llmlab.chips.tpu.array import DATAFLOWS, NOTHING, Array, Demands, Run
from llmlab.chips.tpu.registers import Cycle, cycles, product
from llmlab.chips.tpu.scale_sim import report
from llmlab.chips.tpu.shapes import (
    GENERATIONS,
    TILE,
    Generation,
    layer_runs,
    mapping,
    padded,
    padded_bytes,
    tokens_for,
    utilisation,
)
from llmlab.chips.tpu.torus import (
    PORTS,
    Torus,
    all_gather_seconds,
    all_reduce_bound,
    all_reduce_seconds,
    gather,
    reduce_scatter_seconds,
)

__all__ = [
    "DATAFLOWS",
    "GENERATIONS",
    "NOTHING",
    "PORTS",
    "TILE",
    "Array",
    "Cycle",
    "Demands",
    "Generation",
    "Run",
    "Torus",
    "all_gather_seconds",
    "all_reduce_bound",
    "all_reduce_seconds",
    "cycles",
    "gather",
    "layer_runs",
    "mapping",
    "padded",
    "padded_bytes",
    "product",
    "reduce_scatter_seconds",
    "report",
    "tokens_for",
    "utilisation",
]
