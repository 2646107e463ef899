#!/usr/bin/env bash
# jax 0.10.2, Pallas' TPU interpreter on a CPU, without race detection. JAX's random
# numbers have explicit keys, so one would expect a kernel that copies an array to leave
# NumPy's global stream alone. On one device it does; the same kernel under shard_map on
# four simulated devices draws from it: np.random.seed(0) before the call does not give
# the same numbers after it. What follows in a seeded experiment changes.
#
# Seen: one device unchanged, four devices changed
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

jax.config.update("jax_num_cpu_devices", 4)
rows = jax.sharding.PartitionSpec("x")


def copied(x, y, buffer, semaphore):
    copy = pltpu.make_async_copy(x, buffer, semaphore)
    copy.start()
    copy.wait()
    y[...] = buffer[...]


call = pl.pallas_call(
    copied,
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    out_shape=jax.ShapeDtypeStruct((8, 128), np.float32),
    scratch_shapes=[pltpu.VMEM((8, 128), np.float32), pltpu.SemaphoreType.DMA],
    interpret=pltpu.InterpretParams(),
)


def changed(devices):
    """Whether numbers drawn after the kernel differ from those without it."""
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    each = jax.shard_map(
        call, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    numbers = np.ones((8 * devices, 128), np.float32)
    x = jax.device_put(numbers, jax.NamedSharding(mesh, rows))
    np.random.seed(0)
    without = np.random.rand(3)
    np.random.seed(0)
    y = jax.jit(each)(x).block_until_ready()
    assert (np.asarray(y) == numbers).all()
    return not np.array_equal(without, np.random.rand(3))


seen = {devices: changed(devices) for devices in (1, 4)}
print(jax.__version__, seen)
sys.exit(seen != {1: False, 4: True})
PYTHON
