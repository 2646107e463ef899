"""The same communicator over `torch.distributed`: gloo on CPUs, NCCL on GPUs.

`launch` makes one in each process that it forks; `torchrun.attach` makes one in a
process that torchrun has started.

    rank, ranks   this process in its group; the group's members as global ranks
    pg            torch's process group
    root          the rank that a call names: its source, its destination or its peer
    local         the tensor that this rank brings, or the part that it receives

The ledger counts what this process sends under the ring algorithm. gloo and NCCL reduce
in an order of their own, so sums may differ from `World`'s in the last bits. Under
NCCL, which has no tags, wait for receives in the order in which you posted them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmlab.parallelism.runtime import cost
from llmlab.parallelism.runtime.calls import Call
from llmlab.parallelism.runtime.communicator import Communicator
from llmlab.parallelism.runtime.ledger import Event, Ledger

# A header names a dtype by its place in this list.
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_HEADER = 10  # dtype, number of dimensions, up to 8 sizes
# Every message is two: the header with an even tag, the data with the next odd one.
_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,  # divided by the number of ranks afterwards
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def world_comm(device: torch.device | str = "cpu") -> ProcessComm:
    """The communicator of all processes, once `torch.distributed` is initialized."""
    size = dist.get_world_size()
    return ProcessComm(
        dist.group.WORLD,
        tuple(range(size)),
        dist.get_rank(),
        torch.device(device),
        Ledger(size),
    )


def _nothing() -> None:
    """The result of a call that has none."""


class _Work:
    """A `torch.distributed` work, and the function that makes its result.

    `keep` holds the buffers that must live until the wait.
    """

    def __init__(
        self, work, result: Callable = _nothing, keep: tuple[Tensor, ...] = ()
    ) -> None:
        self.works = work if isinstance(work, list) else [work]
        self.result = result
        self.keep = keep

    def wait(self):
        for work in self.works:
            if work is not None:  # this rank has no part in it
                work.wait()
        return self.result()


class _Incoming:
    """A receive: the header first, then the data of the shape that it names.

    Receives of one sender and tag complete in the order of posting.
    """

    def __init__(self, pg, src: int, tag: int, device, queue: deque) -> None:
        self.pg = pg
        self.src = src
        self.tag = tag
        self.queue = queue
        self.value: Tensor | None = None
        self.header = torch.zeros(_HEADER, dtype=torch.int64, device=device)
        self.work = dist.irecv(self.header, src, group=pg, tag=2 * tag)
        queue.append(self)

    def wait(self) -> Tensor:
        while self.value is None:
            # Those posted before this one come first, this one last.
            earliest = self.queue.popleft()
            earliest.receive_data()
        return self.value

    def receive_data(self) -> None:
        """Wait for the header, then receive the data."""
        self.work.wait()
        buffer = _buffer(self.header)
        dist.recv(buffer, self.src, group=self.pg, tag=2 * self.tag + 1)
        self.value = buffer


class ProcessComm(Communicator):
    """One process's communicator over a `torch.distributed` group."""

    def __init__(
        self,
        pg,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self._pg = pg
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self.device = device
        self.ledger = ledger
        # torch numbers a group's members by ascending global rank, `split` by key.
        ascending = sorted(ranks)
        self._torch_rank = [ascending.index(global_rank) for global_rank in ranks]
        self._receives: dict[tuple[int, int], deque] = defaultdict(deque)
        self._subgroups: list[ProcessComm] = []

    def close(self) -> None:
        """Drop torch's group, and the groups that were split off.

        The threads of a group end when nothing refers to it.
        """
        self._pg = None
        for subgroup in self._subgroups:
            subgroup.close()

    def __repr__(self) -> str:
        return f"<process {self.rank} of {self.size}>"

    def split(self, color: int | None, key: int | None = None) -> ProcessComm | None:
        """A communicator of the processes that say the same color.

        Its ranks are in the order of `key`. None for a process that says None.
        """
        own_color = -1 if color is None else color
        own_key = self.rank if key is None else key
        answers = self._gather_ints([own_color, own_key])
        if color is None:
            return None
        keyed = []
        for rank, (other_color, other_key) in enumerate(answers):
            if other_color == color:
                keyed.append((other_key, rank))
        members = [rank for _, rank in sorted(keyed)]
        ranks = tuple(self.ranks[rank] for rank in members)
        pg = dist.new_group(sorted(ranks), use_local_synchronization=True)
        new_rank = members.index(self.rank)
        subgroup = ProcessComm(pg, ranks, new_rank, self.device, self.ledger)
        self._subgroups.append(subgroup)
        return subgroup

    def sendrecv(self, x: Tensor, dst: int, src: int, tag: int = 0) -> Tensor:
        """Send and receive in one batch (NCCL would deadlock on two single calls)."""
        if dst == src == self.rank:
            return x.detach().clone()
        target = self.ranks[self._other(dst, "dst")]
        source = self.ranks[self._other(src, "src")]
        x = x.detach().contiguous()
        header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
        self._swap(_header(x, self.device), header, target, source, 2 * tag)
        received = _buffer(header)
        self._swap(x, received, target, source, 2 * tag + 1)
        self._count(Call("send", x), [_nbytes(x)])
        return received

    def _swap(
        self, out: Tensor, into: Tensor, target: int, source: int, tag: int
    ) -> None:
        """Send `out` to `target` while `into` is filled from `source`."""
        receive = dist.P2POp(dist.irecv, into, source, self._pg, tag)
        send = dist.P2POp(dist.isend, out, target, self._pg, tag)
        for work in dist.batch_isend_irecv([receive, send]):
            work.wait()

    def _start(self, call: Call) -> _Work | _Incoming:
        return self._start_of[call.op](self, call)

    def _count(self, call: Call, sizes: list[int]) -> None:
        """Write one line of the ledger. `sizes`: the bytes of each piece."""
        if call.op == "send":
            sent = sum(sizes)
        elif call.op == "recv":
            sent = 0
        else:
            sent = cost.sent(call.op, self.rank, sizes, call.root or 0)
        shape = tuple(call.tensors[0].shape) if call.tensors else ()
        event = Event(
            self.ranks[self.rank],
            call.op,
            self.ranks,
            sent,
            sum(sizes),
            shape,
            site=call.site,
        )
        self.ledger.add(event)

    def _even(self, x: Tensor) -> list[int]:
        """The bytes of `x` cut into one piece per rank."""
        pieces = cost.chunks(x.numel(), self.size)
        return [count * x.element_size() for count in pieces]

    def _gather_ints(self, row: list[int]) -> list[list[int]]:
        """Every rank's row of integers, in this group's order."""
        local = torch.tensor(row, dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(rows, local, group=self._pg)
        return [row.tolist() for row in self._group_order(rows)]

    def _torch_order(self, items: list) -> list:
        """From this group's order to torch's."""
        ordered = [None] * self.size
        for torch_rank, item in zip(self._torch_rank, items, strict=True):
            ordered[torch_rank] = item
        return ordered

    def _group_order(self, items: list) -> list:
        """From torch's order to this group's."""
        return [items[torch_rank] for torch_rank in self._torch_rank]

    def _all_reduce(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        op = _REDUCE_OPS[call.reduction]
        work = dist.all_reduce(y, op, group=self._pg, async_op=True)
        return _Work(work, lambda: self._mean(call, y))

    def _reduce(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        op = _REDUCE_OPS[call.reduction]
        root = self.ranks[call.root]
        work = dist.reduce(y, root, op, group=self._pg, async_op=True)
        if self.rank != call.root:
            return _Work(work, keep=(y,))
        return _Work(work, lambda: self._mean(call, y))

    def _mean(self, call: Call, total: Tensor) -> Tensor:
        """The total, or the mean where the call asks for it."""
        return total / self.size if call.reduction == "mean" else total

    def _broadcast(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        root = self.ranks[call.root]
        work = dist.broadcast(y, root, group=self._pg, async_op=True)
        return _Work(work, lambda: y)

    def _all_gather(self, call: Call) -> _Work:
        x = call.value.movedim(call.dim, 0).contiguous()
        lengths = [length for (length,) in self._gather_ints([x.shape[0]])]
        row_bytes = _nbytes(x[:1])
        self._count(call, [length * row_bytes for length in lengths])
        # torch wants equal shapes: everybody pads to the longest.
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        work = dist.all_gather(parts, padded, group=self._pg, async_op=True)

        def result() -> Tensor:
            pairs = zip(self._group_order(parts), lengths, strict=True)
            joined = torch.cat([part[:length] for part, length in pairs])
            return joined.movedim(0, call.dim)

        return _Work(work, result)

    def _gather(self, call: Call) -> _Work:
        x = call.value.contiguous()
        self._count(call, [_nbytes(x)] * self.size)
        root = self.ranks[call.root]
        if self.rank != call.root:
            work = dist.gather(x, None, dst=root, group=self._pg, async_op=True)
            return _Work(work, keep=(x,))
        parts = [torch.empty_like(x) for _ in range(self.size)]
        work = dist.gather(x, parts, dst=root, group=self._pg, async_op=True)
        return _Work(work, lambda: self._group_order(parts))

    def _scatter(self, call: Call) -> _Work:
        # Only the root knows the shape: it sends a header first.
        is_root = self.rank == call.root
        root = self.ranks[call.root]
        header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
        parts = None
        if is_root:
            header = _header(call.value[0], self.device)
            parts = self._torch_order([x.contiguous() for x in call.value])
        dist.broadcast(header, root, group=self._pg)
        local = _buffer(header)
        self._count(call, [_nbytes(local)] * self.size)
        work = dist.scatter(local, parts, root, group=self._pg, async_op=True)
        return _Work(work, lambda: local)

    def _reduce_scatter(self, call: Call) -> _Work:
        chunks = call.value.chunk(self.size, dim=call.dim)
        parts = self._torch_order([part.contiguous() for part in chunks])
        local = torch.empty_like(parts[0])
        self._count(call, [_nbytes(local)] * self.size)
        op = _REDUCE_OPS[call.reduction]
        work = dist.reduce_scatter(local, parts, op, group=self._pg, async_op=True)
        return _Work(work, lambda: self._mean(call, local))

    def _all_to_all(self, call: Call) -> _Work:
        xs = call.value
        # lengths[i][j]: rows that rank i sends to rank j
        lengths = self._gather_ints([len(x) for x in xs])
        self._count(call, [_nbytes(x) for x in xs])
        outgoing = self._torch_order(xs)
        send_rows = [len(x) for x in outgoing]
        receive_rows = self._torch_order([row[self.rank] for row in lengths])
        received = xs[0].new_empty(sum(receive_rows), *xs[0].shape[1:])
        work = dist.all_to_all_single(
            received,
            torch.cat(outgoing),
            receive_rows,
            send_rows,
            group=self._pg,
            async_op=True,
        )
        return _Work(work, lambda: self._group_order(received.split(receive_rows)))

    def _barrier(self, call: Call) -> _Work:
        self._count(call, [0] * self.size)
        return _Work(dist.barrier(group=self._pg, async_op=True))

    def _send(self, call: Call) -> _Work:
        x = call.value.contiguous()
        target = self.ranks[call.root]
        self._count(call, [_nbytes(x)])
        header = _header(x, self.device)
        works = [
            dist.isend(header, target, group=self._pg, tag=2 * call.tag),
            dist.isend(x, target, group=self._pg, tag=2 * call.tag + 1),
        ]
        return _Work(works, keep=(header, x))

    def _recv(self, call: Call) -> _Incoming:
        self._count(call, [0])
        source = self.ranks[call.root]
        queue = self._receives[source, call.tag]
        return _Incoming(self._pg, source, call.tag, self.device, queue)

    _start_of: ClassVar[dict[str, Callable]] = {
        "all_reduce": _all_reduce,
        "reduce": _reduce,
        "broadcast": _broadcast,
        "all_gather": _all_gather,
        "gather": _gather,
        "scatter": _scatter,
        "reduce_scatter": _reduce_scatter,
        "all_to_all": _all_to_all,
        "barrier": _barrier,
        "send": _send,
        "recv": _recv,
    }


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _header(x: Tensor, device: torch.device) -> Tensor:
    """What the receiver must know to make a buffer for x: dtype, dimensions, sizes."""
    if x.dtype not in _DTYPES or x.dim() > _HEADER - 2:
        raise ValueError(
            f"x of dtype {x.dtype} with {x.dim()} dimensions cannot be sent: use up to"
            f" 8 dimensions of {_DTYPES}"
        )
    row = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    padding = [0] * (_HEADER - len(row))
    return torch.tensor(row + padding, dtype=torch.int64, device=device)


def _buffer(header: Tensor) -> Tensor:
    """An empty tensor of the dtype and shape that a header names."""
    dtype, dims, *sizes = header.tolist()
    return torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=header.device)
