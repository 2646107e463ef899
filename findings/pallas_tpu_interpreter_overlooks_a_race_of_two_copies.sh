#!/usr/bin/env bash
# jax 0.10.2, Pallas' TPU interpreter on a CPU with detect_races=True. Two DMA copies into
# one buffer that nothing orders are a race, and one would expect it to be reported: the
# detector exists for that. By default it is not, because on one chip every copy shares
# one place of the vector clocks; with vector_clock_size=64 it is found each time.
# A second blind place: in the default dma_execution_mode ("on_wait") a copy that is never
# waited for is not carried out at all: the buffer holds NaN and no race is reported;
# with "eager" the numbers are right and the race is reported.
#
# Seen: two copies False, with vector_clock_size=64 True; never waited for: on_wait NaN
# and False, eager 1.0 and True
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 scipy==1.17.1 jax==0.10.2 jaxlib==0.10.2

"$work/venv/bin/python" - <<'PYTHON'
import sys

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def two(x, y, buffer, semaphores):
    copies = [
        pltpu.make_async_copy(x.at[i], buffer, semaphores.at[i]) for i in range(2)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()
    y[...] = buffer[...]


def never(x, y, buffer, semaphores):
    pltpu.make_async_copy(x.at[0], buffer, semaphores.at[0]).start()
    y[...] = buffer[...]


def run(kernel, **settings):
    """(the first number of the result, whether a race was reported)."""
    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), np.float32),
        scratch_shapes=[
            pltpu.VMEM((8, 128), np.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        interpret=pltpu.InterpretParams(detect_races=True, **settings),
    )
    y = call(np.ones((2, 8, 128), np.float32)).block_until_ready()
    return float(y[0, 0]), interpret_pallas_call.races.races_found


print(jax.__version__)
seen = [
    run(two)[1],
    run(two, vector_clock_size=64)[1],
    *(repr(each) for each in run(never)),
    *(repr(each) for each in run(never, dma_execution_mode="eager")),
]
print(seen)
sys.exit(seen != [False, True, "nan", "False", "1.0", "True"])
PYTHON
