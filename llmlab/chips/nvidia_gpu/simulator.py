"""Kernels in numba's CUDA simulator, with every address that is used written down.

`record` runs a kernel on arrays that note who reads and writes what. The accesses of a
warp's lanes that belong together are then counted as a GPU serves them: sectors of
global memory, cycles of shared memory.

A GPU takes without a word what the simulator takes, too, and gives something else. So
this is refused: an index outside of an array (also a negative one), shared memory that
is read before the block has written it, and two threads at one place of shared memory
with no barrier between them, where one of them writes.

Simplified: the n-th time that each lane of a warp comes to a place in the program is
one request. Arrays begin at a multiple of 256 bytes, as those of CUDA do.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from llmlab.chips.nvidia_gpu.transactions import (
    LANES,
    BankCycles,
    Transactions,
    global_memory,
    shared_memory,
)


class Race(RuntimeError):
    """Two threads use one place of shared memory, and no barrier orders them."""


def cuda_simulator() -> ModuleType:
    """numba's `cuda`, as its simulator.

    numba settles at the first import of `numba.cuda` whether it simulates.

    Raises:
        RuntimeError: it was imported before, for a real GPU.
    """
    from numba.core import config

    if "numba.cuda" not in sys.modules:
        config.ENABLE_CUDASIM = 1
    from numba import cuda

    if "numba.cuda.simulator_init" not in sys.modules:
        raise RuntimeError(
            "numba.cuda was imported for a real GPU before: start a new process, and"
            " call this first, or set NUMBA_ENABLE_CUDASIM=1"
        )
    return cuda


class Access(NamedTuple):
    """One thread, once, at one place.

    Attributes:
        site: where in the program; `visit`: the how manieth time the thread is there.
        barriers: that the thread has passed.
    """

    block: tuple[int, ...]
    thread: int
    name: str
    kind: str  # "load" or "store"
    site: tuple
    visit: int
    barriers: int
    offset: int  # bytes from the array's beginning


@cache
def positions(code: CodeType) -> list[tuple]:
    """Line and columns of each instruction.

    Python rewrites an instruction that runs often; its place in the text remains.
    """
    return list(code.co_positions())


class Here(threading.local):
    """Of the simulated thread that runs now: who it is, and how far it has come."""

    def __init__(self) -> None:
        thread = threading.current_thread()  # the program's own is in no block
        self.block = tuple(getattr(thread, "blockIdx", ()))
        self.thread = getattr(thread, "thread_id", 0)
        self.visits: dict[tuple, int] = {}
        self.barriers = 0


class Log:
    """All accesses of a launch, and the blocks' shared memory."""

    def __init__(self) -> None:
        self.accesses: list[tuple] = []  # of the fields of Access
        self.widths: dict[str, int] = {}
        self.shared: dict[tuple, Recorded] = {}
        self.here = Here()

    def note(self, name: str, kind: str, offset: int, frame: FrameType) -> None:
        """The thread that runs now uses this place."""
        here = self.here
        site = positions(frame.f_code)[frame.f_lasti // 2]
        key = (site, name, kind)
        visit = here.visits[key] = here.visits.get(key, -1) + 1
        self.accesses.append(
            (here.block, here.thread, name, kind, site, visit, here.barriers, offset)
        )

    def shared_array(self, shape: Any, dtype: Any, frame: FrameType) -> Recorded:
        """The block's array that is made at this place of the program."""
        from numba.core import types
        from numba.np import numpy_support

        if isinstance(dtype, types.Type):
            dtype = numpy_support.as_dtype(dtype)
        key = (self.here.block, frame.f_code, frame.f_lineno)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        name = re.match(r"\s*(\w+)\s*=", line)
        called = name[1] if name else f"shared, line {frame.f_lineno}"
        array = Recorded(called, np.zeros(shape, dtype), self, shared=True)
        # the block's threads come here at once: setdefault keeps the first array
        return self.shared.setdefault(key, array)


class Recorded:
    """An array that writes down who uses which of its places."""

    def __init__(self, name: str, array: np.ndarray, log: Log, shared: bool) -> None:
        self.name = name
        self.array = array
        self.log = log
        self.sides = [*zip(array.shape, array.strides, strict=True)]
        self.written = np.zeros(array.shape, bool) if shared else None
        log.widths[name] = array.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def size(self) -> int:
        return self.array.size

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        place = index if type(index) is tuple else (index,)
        offset = self._offset(place)
        if self.written is not None and not self.written[place]:
            raise IndexError(
                f"{self.name}{list(place)} is read before this block has written it:"
                f" on a GPU, shared memory holds whatever was there"
            )
        self.log.note(self.name, "load", offset, sys._getframe(1))
        return self.array[place]

    def __setitem__(self, index: Any, value: Any) -> None:
        place = index if type(index) is tuple else (index,)
        offset = self._offset(place)
        if self.written is not None:
            self.written[place] = True
        self.log.note(self.name, "store", offset, sys._getframe(1))
        self.array[place] = value

    def _offset(self, place: tuple[int, ...]) -> int:
        """In bytes.

        Raises:
            IndexError: there is no such place.
        """
        offset, fits = 0, len(place) == len(self.sides)
        for i, (size, stride) in zip(place, self.sides, strict=False):
            fits = fits and 0 <= i < size
            offset += int(i) * stride
        if not fits:
            thread = threading.current_thread()
            raise IndexError(
                f"{self.name}{list(place)} is outside of shape {self.array.shape}, in"
                f" thread {list(thread.threadIdx)} of block {list(thread.blockIdx)}"
            )
        return offset


@contextmanager
def noting(log: Log) -> Iterator[None]:
    """The simulator's shared arrays, barriers and blocks, with the log in between."""
    from numba.cuda.simulator import kernel, kernelapi

    shared, thread, manager = (
        kernelapi.FakeCUDAShared,
        kernel.BlockThread,
        kernel.BlockManager,
    )
    kept = shared.array, thread.syncthreads, manager.run

    def recorded_array(self: Any, shape: Any, dtype: Any) -> Recorded:
        return log.shared_array(shape, dtype, sys._getframe(1))

    def counted_barrier(self: Any) -> None:
        self._manager.stopped.release()
        kept[1](self)
        log.here.barriers += 1

    shared.array, thread.syncthreads = recorded_array, counted_barrier
    manager.run = run_in_turn
    try:
        yield
    finally:
        shared.array, thread.syncthreads, manager.run = kept


def run_in_turn(manager: Any, block: tuple[int, ...], *args: Any) -> None:
    """A block of the simulator, one thread at a time, each up to its next barrier.

    The simulator lets all run at once and polls them, which takes many times as long.

    Raises:
        Exception: what a thread raised.
    """
    from numba.cuda.simulator.kernel import BlockThread

    manager.stopped = threading.Semaphore(0)

    def body() -> None:
        try:
            manager._f(*args)
        finally:
            ended.add(threading.current_thread())
            manager.stopped.release()

    ended: set = set()
    left = [
        BlockThread(body, manager, block, place, False)
        for place in np.ndindex(*manager._block_dim)
    ]
    first = True
    while left:
        for thread in left:
            if first:
                thread.start()
            else:
                thread.syncthreads_event.set()
            manager.stopped.acquire()
            if thread in ended:
                thread.join()
            if thread.exception:
                stop([other for other in left if other.ident and other not in ended])
                problem, trace = thread.exception
                raise problem.with_traceback(trace)
        left = [thread for thread in left if thread not in ended]
        first = False


def stop(threads: list) -> None:
    """Ends threads that wait at a barrier."""
    for thread in threads:
        thread.abort = True
        thread.syncthreads_event.set()
        thread.join()


@dataclass
class Traffic:
    """What a launch moved: array → what its loads and stores took."""

    loads: dict[str, Transactions] = field(default_factory=dict)
    stores: dict[str, Transactions] = field(default_factory=dict)
    shared_loads: dict[str, BankCycles] = field(default_factory=dict)
    shared_stores: dict[str, BankCycles] = field(default_factory=dict)

    @property
    def in_global(self) -> Transactions:
        """All loads and stores of global memory."""
        every = (*self.loads.values(), *self.stores.values())
        return sum(every, Transactions())

    @property
    def in_shared(self) -> BankCycles:
        """All loads and stores of shared memory."""
        every = (*self.shared_loads.values(), *self.shared_stores.values())
        return sum(every, BankCycles())

    @property
    def sectors(self) -> int:
        """Of all loads and stores."""
        return self.in_global.sectors

    @property
    def asked(self) -> int:
        """Bytes that the threads asked for, in all."""
        return self.in_global.asked

    @property
    def cycles(self) -> int:
        """Of the banks."""
        return self.in_shared.cycles

    @property
    def conflicts(self) -> int:
        """Cycles of the banks that other addresses would have saved."""
        return self.in_shared.conflicts


def record(
    kernel: Callable, grid: Sequence[int] | int, block: Sequence[int] | int, *args: Any
) -> Traffic:
    """Runs a kernel in the simulator; its arrays are changed, its traffic is returned.

    Args:
        kernel: a function of Python whose module has `cuda` from numba; not decorated.
        args: its arguments; arrays are called by the names of its parameters.

    Raises:
        ValueError: a block of more than 1,024 threads, which the simulator would run.
        IndexError: an index outside of an array, or shared memory read before written.
        Race: two threads at one place, with no barrier between them.
    """
    cuda = cuda_simulator()
    shape = (block,) if isinstance(block, int) else tuple(block)
    if not 1 <= np.prod(shape) <= 1024:
        raise ValueError(f"block={block} must have from 1 to 1024 threads")
    log = Log()
    names = kernel.__code__.co_varnames
    recorded = [
        Recorded(name, arg, log, shared=False) if isinstance(arg, np.ndarray) else arg
        for name, arg in zip(names, args, strict=False)
    ]
    with noting(log):
        cuda.jit(kernel)[grid, block](*recorded)
    in_shared = {each.name for each in log.shared.values()}
    accesses = [Access(*each) for each in log.accesses]
    refuse_races([a for a in accesses if a.name in in_shared])
    return counted(accesses, log.widths, in_shared)


def refuse_races(accesses: list[Access]) -> None:
    """
    Raises:
        Race: between two barriers a thread writes where another reads or writes.
    """
    seen: dict[tuple, tuple[set[int], set[int]]] = {}
    for a in accesses:
        key = (a.block, a.name, a.barriers, a.offset)
        users, writers = seen.setdefault(key, (set(), set()))
        users.add(a.thread)
        if a.kind == "store":
            writers.add(a.thread)
        if writers and len(users) > 1:
            one, other = sorted(users)[:2]
            raise Race(
                f"threads {one} and {other} of block {list(a.block)} both use byte"
                f" {a.offset} of {a.name}, one of them writes, and no syncthreads lies"
                " between"
            )


def counted(
    accesses: list[Access], widths: dict[str, int], in_shared: set[str]
) -> Traffic:
    """The accesses, request by request.

    Args:
        widths: array → bytes of a number; `in_shared`: arrays in shared memory.
    """
    requests: dict[tuple, dict[int, int]] = {}
    for a in accesses:
        warp, lane = divmod(a.thread, LANES)
        key = (a.name, a.kind, a.block, warp, a.site, a.visit)
        requests.setdefault(key, {})[lane] = a.offset
    lists: dict[tuple[str, str], list[dict[int, int]]] = {}
    for (name, kind, *_), lanes in requests.items():
        lists.setdefault((name, kind), []).append(lanes)
    traffic = Traffic()
    for (name, kind), rows in lists.items():
        offsets = np.zeros((len(rows), LANES), np.int64)
        active = np.zeros(offsets.shape, bool)
        for row, lanes in enumerate(rows):
            offsets[row, list(lanes)] = list(lanes.values())
            active[row, list(lanes)] = True
        width = widths[name]
        if name in in_shared:
            into = traffic.shared_loads if kind == "load" else traffic.shared_stores
            into[name] = shared_memory(offsets, width, active)
        else:
            into = traffic.loads if kind == "load" else traffic.stores
            into[name] = global_memory(offsets, width, active)
    return traffic
