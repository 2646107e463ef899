"""Kernels for a TPU in Pallas, run on a CPU by JAX's interpreter of a TPU.

Pallas, https://docs.jax.dev/en/latest/pallas/tpu/pipelining.html and for the rings
https://docs.jax.dev/en/latest/pallas/tpu/distributed.html: a kernel is a function on
references. Arrays lie in HBM; the core computes on VMEM only, so every number is copied
there first. Who copies?

    the pipeline      pallas_call(grid, BlockSpecs): before each step of the grid it
                      loads the blocks whose index differs from the step before
    the kernel        make_async_copy(from, to, semaphore): start(), then wait()
    another chip      make_async_remote_copy: the same, into a neighbour's memory

    M, N, K    sizes of a product: x is M × K, w is K × N
    p          chips on a ring
    slot       one of two blocks in VMEM: one is used while the other one is filled

interpreter.py says what each of them moved, and which accesses nothing orders.

Simplified: float32 only; the interpreter knows no time, so bytes and steps are counted
and seconds are not; a ragged block counts as a whole one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from llmlab.chips.tpu.array import whole
from llmlab.chips.tpu.interpreter import (
    BYTES,
    CHIPS,
    Report,
    settings,
    start_jax,
    watch,
)

BUGS = ("no wait", "next slot", "one slot")


# ------------------------------------------------------- a product, by the pipeline


def loads(grid: Sequence[int], index_map: Callable[..., tuple[int, ...]]) -> int:
    """Blocks that the pipeline moves: one whenever the index is not the last one.

    The last axis of the grid runs fastest.
    """
    count = 0
    before = None
    for point in itertools.product(*(range(size) for size in grid)):
        index = index_map(*point)
        count += index != before
        before = index
    return count


Sizes = tuple[int, int, int]  # along m, n and k
IndexMap = Callable[..., tuple[Any, Any]]


def _plan(sizes: Sizes, blocks: Sizes, order: str) -> tuple[Sizes, dict[str, IndexMap]]:
    """The grid, and which block of each matrix a step (a, b, k) of it is about."""
    (m, n, k), (block_m, block_n, block_k) = sizes, blocks
    whole(m=m, n=n, k=k, block_m=block_m, block_n=block_n, block_k=block_k)
    rows, columns, inner = -(-m // block_m), -(-n // block_n), -(-k // block_k)
    if order == "mn":
        return (rows, columns, inner), {
            "x": lambda i, j, k: (i, k),
            "w": lambda i, j, k: (k, j),
            "y": lambda i, j, k: (i, j),
        }
    if order == "nm":
        return (columns, rows, inner), {
            "x": lambda j, i, k: (i, k),
            "w": lambda j, i, k: (k, j),
            "y": lambda j, i, k: (i, j),
        }
    raise ValueError(
        f"order={order!r} must be 'mn' or 'nm': the outer axis first, k is within"
    )


def matmul_loads(
    m: int,
    n: int,
    k: int,
    block_m: int,
    block_n: int,
    block_k: int,
    order: str = "mn",
) -> dict[str, tuple[int, int]]:
    """(blocks, bytes) that a product moves: x and w to VMEM, y back.

    Order counts only if K is one block: then the outer axis' matrix is loaded once.

    Raises:
        ValueError: a size is not a whole number of at least 1, or an unknown order.
    """
    grid, maps = _plan((m, n, k), (block_m, block_n, block_k), order)
    sizes = {
        "x": block_m * block_k,
        "w": block_k * block_n,
        "y": block_m * block_n,
    }
    counts = {name: loads(grid, index_map) for name, index_map in maps.items()}
    return {
        name: (count, BYTES * count * sizes[name]) for name, count in counts.items()
    }


def vmem_bytes(block_m: int, block_n: int, block_k: int) -> int:
    """Bytes of VMEM that `matmul` takes: two slots for each block, and the total.

    One slot is computed on while the pipeline fills or empties the other one.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """
    whole(block_m=block_m, block_n=block_n, block_k=block_k)
    inputs = block_m * block_k + block_k * block_n
    return BYTES * (2 * inputs + 3 * block_m * block_n)


def _matmul_kernel(k: int, block_k: int) -> Callable:
    """One step of the grid: y block += x block · w block, over the blocks of K."""
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl

    def kernel(x, w, y, total):
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)  # VMEM holds anything at first

        # What a ragged block holds beyond the matrix is anything, too. Rows of x and
        # columns of w out there end up in parts of y that are dropped; along K both
        # would be added, and 0 · NaN is NaN, so both are masked.
        inside = k - step * block_k
        columns = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        rows = lax.broadcasted_iota(jnp.int32, w.shape, 0)
        x_block = jnp.where(columns < inside, x[...], 0)
        w_block = jnp.where(rows < inside, w[...], 0)
        total[...] += jnp.dot(x_block, w_block, preferred_element_type=jnp.float32)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            y[...] = total[...]

    return kernel


def _matmul_call(sizes: Sizes, blocks: Sizes, order: str, interpret: Any) -> Callable:
    """The product as a pallas_call."""
    jax = start_jax()
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    grid, maps = _plan(sizes, blocks, order)
    (m, n, k), (block_m, block_n, block_k) = sizes, blocks
    return pl.pallas_call(
        _matmul_kernel(k, block_k),
        grid=grid,
        in_specs=[
            pl.BlockSpec((block_m, block_k), maps["x"]),
            pl.BlockSpec((block_k, block_n), maps["w"]),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), maps["y"]),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        interpret=interpret,
    )


def matmul(
    x: Float[np.ndarray, "m k"],
    w: Float[np.ndarray, "k n"],
    block_m: int,
    block_n: int,
    block_k: int,
    order: str = "mn",
) -> tuple[Float[np.ndarray, "m n"], Report]:
    """x · w in blocks and in float32, and what was moved: blocks `report.loaded("x")`,
    `report.loaded("w")` and `report.stored("y")`.

    Raises:
        ValueError: a size is not a whole number of at least 1, an unknown order, or
            the inner sizes differ.
    """
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"x is {x.shape} and w is {w.shape}: inner sizes must agree")
    blocks = (block_m, block_n, block_k)
    sizes = (x.shape[0], w.shape[1], x.shape[1])
    call = _matmul_call(sizes, blocks, order, settings())
    buffers = [
        ("x", x.shape),
        ("w", w.shape),
        ("y", (sizes[0], sizes[1])),
        ("x block", (block_m, block_k)),
        ("w block", (block_k, block_n)),
        ("y block", (block_m, block_n)),
        ("total", (block_m, block_n)),
    ]
    return watch(call, np.float32(x), np.float32(w), buffers=buffers)


def refusal(m: int, n: int, k: int, block_m: int, block_n: int, block_k: int) -> str:
    """What JAX's compiler for TPUs says against a product's blocks; "" if nothing.

    The lowering runs without a TPU. It checks shapes; it does not check that VMEM
    suffices.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """
    jax = start_jax()
    from jax import export

    call = _matmul_call((m, n, k), (block_m, block_n, block_k), "mn", False)
    x = jax.ShapeDtypeStruct((m, k), np.float32)
    w = jax.ShapeDtypeStruct((k, n), np.float32)
    try:
        export.export(jax.jit(call), platforms=["tpu"])(x, w)
    except ValueError as error:
        return str(error).split(". ")[0]
    return ""


# ------------------------------------------------------------------ copies by hand


def _sum_kernel(blocks: int, rows: int, bug: str | None) -> Callable:
    """Adds up blocks that lie in HBM; the next one comes while this one is added."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def slot(block):
        return 0 if bug == "one slot" else block % 2

    def kernel(x, y, slots, arrived):
        def copy(block):
            source = x.at[pl.ds(block * rows, rows)]
            target = slots.at[slot(block)]
            return pltpu.make_async_copy(source, target, arrived.at[block % 2])

        y[...] = jnp.zeros_like(y)
        copy(0).start()
        for block in range(blocks):
            more = block + 1 < blocks
            if more:
                copy(block + 1).start()
            if bug is None or bug == "one slot":
                copy(block).wait()
            elif bug == "next slot" and more:
                copy(block + 1).wait()
            y[...] += slots[slot(block)]

    return kernel


def sum_blocks(
    x: Float[np.ndarray, "m n"],
    rows: int,
    bug: str | None = None,
    dma: str = "on_wait",
) -> tuple[Float[np.ndarray, "rows n"], Report]:
    """x[:rows] + x[rows:2 rows] + …, copied by hand into two slots of VMEM.

    Args:
        x: stays in HBM; zeros are put below it if the last block is not full.
        rows: of a block.
        bug: None; "no wait": a block is added without waiting for its copy;
            "next slot": the copy just started is waited for, not this block's;
            "one slot": both copies go to the same slot.
        dma: when the interpreter carries a copy out, "on_wait" or "eager".

    Raises:
        ValueError: a size is not a whole number of at least 1, an unknown bug, or an
            unknown dma.
    """
    whole(rows=rows, m=len(x), n=x.shape[1])
    if bug is not None and bug not in BUGS:
        raise ValueError(f"bug={bug!r} must be None or one of {BUGS}")
    jax = start_jax()
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks = -(-len(x) // rows)
    filled = np.zeros((blocks * rows, x.shape[1]), np.float32)
    filled[: len(x)] = x
    shape = (rows, x.shape[1])
    call = pl.pallas_call(
        _sum_kernel(blocks, rows, bug),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(shape, np.float32),
        scratch_shapes=[
            pltpu.VMEM((2, *shape), np.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        interpret=settings(dma),
    )
    buffers = [
        ("x", filled.shape),
        ("y", shape),
        ("total", shape),
        ("slots", (2, *shape)),
    ]
    return watch(call, filled, buffers=buffers)


# ------------------------------------------------------------------ a ring of chips


def _meet(left: Any, right: Any) -> None:
    """Wait until both neighbours run the kernel, too: their memory is then theirs."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    here = pltpu.get_barrier_semaphore()
    for neighbour in (left, right):
        pl.semaphore_signal(
            here, 1, device_id=(neighbour,), device_id_type=pl.DeviceIdType.MESH
        )
    pl.semaphore_wait(here, 2)


def _check_ring(p: int, **sizes: int) -> None:
    if not 2 <= p <= CHIPS:
        raise ValueError(
            f"p={p} chips must be from 2 to {CHIPS}: one row for each chip"
        )
    whole(**sizes)


def _on_ring(
    kernel: Callable,
    shards: np.ndarray,
    out: tuple[int, ...],
    scratch: list,
    buffers: list,
    dma: str,
) -> tuple[np.ndarray, Report]:
    """The kernel on p chips at once; shards and the result begin with the chip."""
    jax = start_jax()
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    p = len(shards)
    devices = jax.devices("cpu")
    if len(devices) < p:
        raise RuntimeError(
            f"a ring of {p} chips, but JAX runs with {len(devices)} CPU devices: call "
            f"jax.config.update('jax_num_cpu_devices', {CHIPS}) before its first use"
        )
    mesh = jax.make_mesh((p,), ("ring",), devices=devices[:p])
    spec = jax.sharding.PartitionSpec("ring")
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out, np.float32),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(collective_id=0),
        interpret=settings(dma),
    )

    def on_a_chip(shard):
        return call(shard[0])[None]

    ring = jax.shard_map(
        on_a_chip, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    placed = jax.device_put(shards, jax.NamedSharding(mesh, spec))
    return watch(jax.jit(ring), placed, buffers=buffers)


def _send(source: Any, target: Any, sent: Any, arrived: Any, chip: Any) -> Any:
    """A copy into a neighbour's memory, not yet started."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.make_async_remote_copy(
        source,
        target,
        sent,
        arrived,
        device_id=(chip,),
        device_id_type=pl.DeviceIdType.MESH,
    )


def ring_all_gather(
    shards: Float[np.ndarray, "p m n"], dma: str = "on_wait"
) -> tuple[Float[np.ndarray, "p p m n"], Report]:
    """Every chip gets all shards, in p − 1 steps; `report.sent` lists the copies.

    In each step a chip passes on what came in the step before. Result [chip] is what
    that chip holds.

    Raises:
        ValueError: fewer than 2 chips or more than CHIPS, nothing to send, or an
            unknown dma.
        RuntimeError: JAX was started with fewer CPU devices.
    """
    p, m, n = shards.shape
    _check_ring(p, m=m, n=n)
    start_jax()
    from jax import lax
    from jax.experimental.pallas import tpu as pltpu

    shape = (m, n)

    def kernel(x, y, sent, arrived):
        me = lax.axis_index("ring")
        left, right = (me + p - 1) % p, (me + 1) % p
        _meet(left, right)
        y[me] = x[...]
        for step in range(p - 1):
            shard = (me + p - step) % p
            place = y.at[shard]
            copy = _send(place, place, sent.at[step], arrived.at[step], right)
            copy.start()
            copy.wait()  # until ours has left and the left neighbour's has come

    semaphores = [pltpu.SemaphoreType.DMA((p - 1,))] * 2
    everything = (p, *shape)
    buffers = [("x", shape), ("y", everything), ("shard", shape), ("all", everything)]
    return _on_ring(kernel, np.float32(shards), everything, semaphores, buffers, dma)


def _all_reduce_kernel(p: int, back_pressure: bool) -> Callable:
    """Chunks are added up on their way round the ring, then the sums go round."""
    from jax import lax
    from jax.experimental import pallas as pl

    def kernel(x, y, inbox, sent, arrived, free):
        me = lax.axis_index("ring")
        left, right = (me + p - 1) % p, (me + 1) % p
        _meet(left, right)
        y[...] = x[...]
        for step in range(p - 1):
            if back_pressure and step >= 2:
                pl.semaphore_wait(free, 1)  # the neighbour has emptied that slot
            mine = y.at[(me + p - step) % p]
            slot = inbox.at[step % 2]
            copy = _send(mine, slot, sent.at[step], arrived.at[step], right)
            copy.start()
            copy.wait()
            y[(me + 2 * p - step - 1) % p] += inbox[step % 2]
            if back_pressure and step + 2 < p - 1:
                pl.semaphore_signal(
                    free, 1, device_id=(left,), device_id_type=pl.DeviceIdType.MESH
                )
        for step in range(p - 1, 2 * p - 2):
            place = y.at[(me + 2 * p - step) % p]
            copy = _send(place, place, sent.at[step], arrived.at[step], right)
            copy.start()
            copy.wait()

    return kernel


def ring_all_reduce(
    values: Float[np.ndarray, "p n"],
    back_pressure: bool = True,
    dma: str = "on_wait",
) -> tuple[Float[np.ndarray, "p n"], Report]:
    """Every chip gets the sum over chips, in 2 (p − 1) steps of n / p numbers each.

    Chunks are received in two slots in turn. With back pressure a chip tells its left
    neighbour that a slot is empty; without it the neighbour may overwrite a chunk that
    is not added yet. Zeros fill the last chunk if p does not divide n.

    Raises:
        ValueError: fewer than 2 chips or more than CHIPS, nothing to send, or an
            unknown dma.
        RuntimeError: JAX was started with fewer CPU devices.
    """
    p, n = values.shape
    _check_ring(p, n=n)
    start_jax()
    from jax.experimental.pallas import tpu as pltpu

    chunk = -(-n // p)
    chunks = np.zeros((p, p * chunk), np.float32)
    chunks[:, :n] = values
    chunks = chunks.reshape(p, p, 1, chunk)  # chip, chunk, row, number
    shape, slots = (p, 1, chunk), (2, 1, chunk)
    steps = 2 * p - 2
    scratch = [
        pltpu.VMEM(slots, np.float32),
        pltpu.SemaphoreType.DMA((steps,)),
        pltpu.SemaphoreType.DMA((steps,)),
        pltpu.SemaphoreType.REGULAR,
    ]
    buffers = [("x", shape), ("y", shape), ("chunks", shape)]
    buffers += [("sums", shape), ("inbox", slots)]
    kernel = _all_reduce_kernel(p, back_pressure)
    sums, report = _on_ring(kernel, chunks, shape, scratch, buffers, dma)
    return sums.reshape(p, -1)[:, :n], report
