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

The interpreter keeps a vector clock for the core and for each copy. Two accesses to the
same place, of which one writes, *race* if neither clock is at or below the other one
everywhere: then nothing says which comes first, whatever the numbers were this time.

Simplified: float32 only; the interpreter knows no time, so bytes and steps are counted
and seconds are not; a ragged block counts as a whole one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

CHIPS = 8
"""CPU devices that JAX is started with: chips that a ring may have."""
FIRST = 100
"""The interpreter's first number for a buffer, and for a copy."""
BYTES = 4
MODES = ("on_wait", "eager")
BUGS = ("no wait", "next slot", "one slot")


@dataclass(frozen=True)
class Access:
    """One read or write that the interpreter recorded.

    place holds (start, stop) of each axis; by is "chip 0" or "copy 3 of chip 0"; line
    is the kernel's line, or "pallas_call" where the pipeline did it.
    """

    kind: str
    buffer: str
    chip: int
    place: tuple[tuple[int, int], ...]
    by: str
    line: str
    clock: np.ndarray = field(compare=False, repr=False)

    @property
    def elements(self) -> int:
        return math.prod(stop - start for start, stop in self.place)

    def __str__(self) -> str:
        return f"{self.kind} of {self.buffer} by {self.by} in `{self.line}`"


@dataclass(frozen=True)
class Copy:
    """A copy that was carried out; number counts those that its chip has started."""

    number: int
    source: str
    source_chip: int
    target: str
    target_chip: int
    place: tuple[tuple[int, int], ...]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What the interpreter saw of one kernel.

    left_over is whether a semaphore was not back at zero at the end.
    """

    accesses: tuple[Access, ...]
    left_over: bool

    @cached_property
    def races(self) -> tuple[tuple[Access, Access], ...]:
        """Pairs that nothing orders; of pairs of the same two lines the first one."""
        found = {}
        for _, group in itertools.groupby(self.accesses, _memory):
            for a, b in itertools.combinations(group, 2):
                if "write" in (a.kind, b.kind) and _touch(a, b) and unordered(a, b):
                    lines = frozenset((x.kind, x.buffer, x.line) for x in (a, b))
                    found.setdefault(lines, (a, b))
        return tuple(found.values())

    def loaded(self, buffer: str) -> int:
        """Blocks that the pipeline loaded from a buffer in HBM."""
        return self._moved("read", buffer)

    def stored(self, buffer: str) -> int:
        """Blocks that the pipeline stored to a buffer in HBM."""
        return self._moved("write", buffer)

    def _moved(self, kind: str, buffer: str) -> int:
        asked = (kind, buffer, "pallas_call")
        return sum((a.kind, a.buffer, a.line) == asked for a in self.accesses)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Copies by the kernel that were carried out, chip by chip."""
        sides: dict[str, dict[str, Access]] = {}
        for access in self.accesses:
            if access.by.startswith("copy"):
                sides.setdefault(access.by, {})[access.kind] = access
        copies = []
        for name, side in sides.items():
            if len(side) == 2:
                read = side["read"]
                write = side["write"]
                copy = Copy(
                    number=int(name.split()[1]),
                    source=read.buffer,
                    source_chip=read.chip,
                    target=write.buffer,
                    target_chip=write.chip,
                    place=write.place,
                    bytes=BYTES * write.elements,
                )
                copies.append(copy)
        return tuple(sorted(copies, key=lambda c: (c.source_chip, c.number)))

    @property
    def sent(self) -> tuple[Copy, ...]:
        """The copies that went from one chip to another one."""
        return tuple(c for c in self.copies if c.source_chip != c.target_chip)


def _memory(access: Access) -> tuple[str, int]:
    """Which memory an access is to: a buffer of a chip."""
    return access.buffer, access.chip


def _touch(a: Access, b: Access) -> bool:
    """Whether two accesses to one memory have a place in common."""
    return all(
        start < other_stop and other_start < stop
        for (start, stop), (other_start, other_stop) in zip(
            a.place, b.place, strict=True
        )
    )


def unordered(a: Access, b: Access) -> bool:
    """Neither clock is at or below the other one everywhere: both may be at once."""
    return bool((a.clock > b.clock).any() and (a.clock < b.clock).any())


# ---------------------------------------------------------------- the interpreter


def _start() -> Any:
    """JAX with enough CPU devices for a ring, if it is not running already."""
    import jax

    # too late if JAX runs already; the ring then says so
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", CHIPS)
    return jax


def settings(dma: str = "on_wait") -> Any:
    """How to interpret a kernel: `pallas_call(..., interpret=settings())`.

    dma says when a copy is carried out: "eager" at its start, "on_wait" when somebody
    waits for it, so never if nobody does. A right kernel cannot tell them apart. Clocks
    have 1024 places, so that hardly any two copies share one; by JAX's default all
    copies on one chip share one, and those that race with each other go unseen.

    Raises:
        ValueError: dma is neither of the two.
    """
    if dma not in MODES:
        raise ValueError(f"dma={dma!r} must be one of {MODES}")
    _start()
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=dma, vector_clock_size=1024
    )


def _recorded() -> tuple[dict, dict]:
    """The interpreter's records of reads and writes: private, read here alone.

    Raises:
        RuntimeError: they are not where they were in JAX 0.10.
    """
    import jax

    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        races = interpret_pallas_call.races
        return dict(races.reads), dict(races.writes)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"JAX {jax.__version__} keeps the races that its TPU interpreter finds "
            "elsewhere than 0.10 did (jax._src.pallas.mosaic.interpret"
            f".interpret_pallas_call.races): {error}"
        ) from error


def _line(frame: str) -> str:
    """The text of the line that a frame such as "kernel.py:12:8 (name)" points to."""
    found = re.fullmatch(r"(.+?):(\d+)(?::\d+)? \(.*\)", frame)
    if not found:
        return frame
    text = linecache.getline(found[1], int(found[2])).strip()
    return text or f"line {found[2]}"


def _names(reads: dict) -> dict[int, str]:
    """The interpreter's number of each copy: whose copy it is, and which of them."""
    chips = {
        int(entry[0]): int(chip)
        for (_, _, chip, _), entries in reads.items()
        for entry in entries
        if entry[0] >= FIRST
    }
    if len(set(chips.values())) == 1:
        # copies that were never carried out count, too
        return {number: f"copy {number - FIRST} of chip 0" for number in chips}
    counts = dict.fromkeys(chips.values(), 0)
    names = {}
    for number in sorted(chips):
        chip = chips[number]
        names[number] = f"copy {counts[chip]} of chip {chip}"
        counts[chip] += 1
    return names


def _accesses(
    reads: dict, writes: dict, buffers: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Access, ...]:
    """The records in plain words; they name buffers and copies by numbers."""
    names = _names(reads)
    found = []
    for kind, records in (("read", reads), ("write", writes)):
        for (_, number, chip, _), entries in records.items():
            name, shape = buffers[int(number) - FIRST]
            for actor, _, clock, ranges, frame in entries:
                place = [
                    (r.start, r.stop) if isinstance(r, slice) else (r, r + 1)
                    for r in ranges
                ]
                place += [(0, size) for size in shape[len(place) :]]
                by = names.get(int(actor), f"chip {actor}")
                line = _line(frame)
                access = Access(kind, name, int(chip), tuple(place), by, line, clock)
                found.append(access)
    # those of one actor stay in the order of its program
    return tuple(sorted(found, key=lambda a: (*_memory(a), a.kind, a.by)))


def watch(
    call: Callable, *arrays: Any, buffers: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[np.ndarray, Report]:
    """A kernel's result and what the interpreter saw.

    Args:
        call: what `pallas_call(..., interpret=settings())` gave.
        arrays: its arguments.
        buffers: name and shape of each buffer as the interpreter numbers them: inputs
            and outputs in HBM, then each argument of the kernel that lies elsewhere.

    Raises:
        RuntimeError: JAX keeps its records elsewhere.
    """
    from jax.experimental.pallas import tpu as pltpu

    # the interpreter draws from NumPy's own stream of random numbers, and prints
    stream = np.random.get_state()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            value = np.asarray(call(*arrays))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        np.random.set_state(stream)
    reads, writes = _recorded()
    left_over = "has non-zero count" in said.getvalue()
    return value, Report(_accesses(reads, writes, buffers), left_over)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number of at least 1")


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


def _axes(order: str) -> dict[str, Callable[..., tuple[int, int]]]:
    """Which block of each matrix a step (a, b, k) of the grid is about."""
    if order not in ("mn", "nm"):
        raise ValueError(
            f"order={order!r} must be 'mn' or 'nm': the outer axis first, k is within"
        )
    if order == "mn":
        return {
            "x": lambda i, j, k: (i, k),
            "w": lambda i, j, k: (k, j),
            "y": lambda i, j, k: (i, j),
        }
    return {
        "x": lambda j, i, k: (i, k),
        "w": lambda j, i, k: (k, j),
        "y": lambda j, i, k: (i, j),
    }


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
    _positive(m=m, n=n, k=k, block_m=block_m, block_n=block_n, block_k=block_k)
    steps = {"m": -(-m // block_m), "n": -(-n // block_n)}
    maps = _axes(order)
    grid = (steps[order[0]], steps[order[1]], -(-k // block_k))
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
    _positive(block_m=block_m, block_n=block_n, block_k=block_k)
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


def _matmul_call(sizes: tuple, blocks: tuple, order: str, interpret: Any) -> Callable:
    """The product as a pallas_call; sizes and blocks in the order m, n, k."""
    jax = _start()
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    maps = _axes(order)
    m, n, k = sizes
    block_m, block_n, block_k = blocks
    _positive(m=m, n=n, k=k, block_m=block_m, block_n=block_n, block_k=block_k)
    steps = {"m": pl.cdiv(m, block_m), "n": pl.cdiv(n, block_n)}
    return pl.pallas_call(
        _matmul_kernel(k, block_k),
        grid=(steps[order[0]], steps[order[1]], pl.cdiv(k, block_k)),
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
    jax = _start()
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
    _positive(rows=rows, m=len(x), n=x.shape[1])
    if bug is not None and bug not in BUGS:
        raise ValueError(f"bug={bug!r} must be None or one of {BUGS}")
    jax = _start()
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks = -(-len(x) // rows)
    whole = np.zeros((blocks * rows, x.shape[1]), np.float32)
    whole[: len(x)] = x
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
        ("x", whole.shape),
        ("y", shape),
        ("total", shape),
        ("slots", (2, *shape)),
    ]
    return watch(call, whole, buffers=buffers)


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
    _positive(**sizes)


def _on_ring(
    kernel: Callable,
    shards: np.ndarray,
    out: tuple[int, ...],
    scratch: list,
    buffers: list,
    dma: str,
) -> tuple[np.ndarray, Report]:
    """The kernel on p chips at once; shards and the result begin with the chip."""
    jax = _start()
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
    _start()
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
    _start()
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
