"""The same communicator over `torch.distributed`: gloo on CPUs, NCCL on GPUs.

`launch` makes one in each process that it forks; `torchrun.attach` makes one in a
process that torchrun has started.

The ledger counts what this process sends under the ring algorithm. gloo and NCCL reduce
in an order of their own, so sums may differ from `World`'s in the last bits. Under
NCCL, which has no tags, wait for receives in the order in which you posted them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llmlab.parallelism.runtime import cost
from llmlab.parallelism.runtime.calls import Call
from llmlab.parallelism.runtime.communicator import Communicator
from llmlab.parallelism.runtime.ledger import Event, Ledger

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
)
_DTYPES += (torch.uint8, torch.bool)
_HEADER = 10  # dtype, number of dimensions, up to 8 sizes


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


class _Work:
    """A `torch.distributed` work and what turns its buffers into the result."""

    def __init__(self, work, result: Callable = lambda: None, keep: tuple = ()) -> None:
        # keep: buffers that must live until the wait
        self.work, self.result, self.keep = work, result, keep

    def wait(self):
        for work in self.work if isinstance(self.work, list) else [self.work]:
            if work is not None:
                work.wait()
        return self.result()


class _Incoming:
    """A receive: the header first, then the data. Receives of one sender and tag
    complete in the order of posting.
    """

    def __init__(self, comm: ProcessComm, src: int, tag: int, queue: deque) -> None:
        self.comm, self.src, self.tag, self.queue, self.value = (
            comm,
            src,
            tag,
            queue,
            None,
        )
        self.header = torch.zeros(_HEADER, dtype=torch.int64, device=comm.device)
        self.work = dist.irecv(self.header, src, group=comm._pg, tag=2 * tag)
        queue.append(self)

    def wait(self) -> Tensor:
        while self.value is None:
            self.queue.popleft()._receive()
        return self.value

    def _receive(self) -> None:
        self.work.wait()
        buffer = _buffer(self.header)
        dist.recv(buffer, self.src, group=self.comm._pg, tag=2 * self.tag + 1)
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
        self._pg, self.ranks, self.rank, self.size = pg, ranks, rank, len(ranks)
        self.device, self.ledger = device, ledger
        # torch numbers a group's members in ascending order
        self._place = [sorted(ranks).index(g) for g in ranks]
        self._queues: dict[tuple, deque] = defaultdict(deque)
        self._parts: list[ProcessComm] = []  # what was split off

    def close(self) -> None:
        """Let go of torch's group and of those split off: the threads of a group end
        when nothing refers to it.
        """
        self._pg = None
        for part in self._parts:
            part.close()

    def __repr__(self) -> str:
        return f"<process {self.rank} of {self.size}>"

    def split(self, color: int | None, key: int | None = None) -> ProcessComm | None:
        """A communicator of the processes that say the same color; None for one that
        says None.
        """
        wish = [-1 if color is None else color, self.rank if key is None else key]
        wishes = self._gather_ints(wish)
        if color is None:
            return None
        members = [
            r
            for _, r in sorted((k, r) for r, (c, k) in enumerate(wishes) if c == color)
        ]
        ranks = tuple(self.ranks[r] for r in members)
        pg = dist.new_group(sorted(ranks), use_local_synchronization=True)
        self._parts.append(
            ProcessComm(pg, ranks, members.index(self.rank), self.device, self.ledger)
        )
        return self._parts[-1]

    def sendrecv(self, x: Tensor, dst: int, src: int, tag: int = 0) -> Tensor:
        """Send and receive at once, in one batch (NCCL would deadlock on two single
        calls).
        """
        if dst == src == self.rank:
            return x.detach().clone()
        to, frm, x = (
            self.ranks[self._other(dst, "dst")],
            self.ranks[self._other(src, "src")],
            x.detach().contiguous(),
        )
        theirs = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
        self._swap(_header(x, self.device), theirs, to, frm, 2 * tag)
        received = _buffer(theirs)
        self._swap(x, received, to, frm, 2 * tag + 1)
        self._count(Call("send", x), [x.numel() * x.element_size()])
        return received

    def _swap(self, out: Tensor, into: Tensor, to: int, frm: int, tag: int) -> None:
        pair = [
            dist.P2POp(dist.irecv, into, frm, self._pg, tag),
            dist.P2POp(dist.isend, out, to, self._pg, tag),
        ]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    def _start(self, call: Call):
        return getattr(self, f"_{call.op}")(call)

    def _count(self, call: Call, sizes: list[int]) -> None:
        """One line in the ledger."""
        p2p = call.op in ("send", "recv")
        sent = (
            sum(sizes)
            if call.op == "send"
            else 0
            if p2p
            else cost.sent(call.op, self.rank, sizes, call.root or 0)
        )
        shape = tuple(call.tensors[0].shape) if call.tensors else ()
        self.ledger.add(
            Event(
                self.ranks[self.rank],
                call.op,
                self.ranks,
                sent,
                sum(sizes),
                shape,
                site=call.site,
            )
        )

    def _even(self, x: Tensor) -> list[int]:
        return [c * x.element_size() for c in cost.chunks(x.numel(), self.size)]

    def _gather_ints(self, row: list[int]) -> list[list[int]]:
        mine = torch.tensor(row, dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self._pg)
        return [rows[place].tolist() for place in self._place]

    def _torch_order(self, xs: list) -> list:
        """From this group's order to torch's."""
        return [
            x
            for _, x in sorted(
                zip(self._place, xs, strict=True), key=lambda pair: pair[0]
            )
        ]

    def _all_reduce(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        work = dist.all_reduce(y, _op(call), group=self._pg, async_op=True)
        return _Work(work, lambda: y / self.size if call.reduction == "mean" else y)

    def _reduce(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        work = dist.reduce(
            y, self.ranks[call.root], _op(call), group=self._pg, async_op=True
        )
        mean = lambda: y / self.size if call.reduction == "mean" else y  # noqa: E731
        return _Work(work, lambda: mean() if self.rank == call.root else None)

    def _broadcast(self, call: Call) -> _Work:
        y = call.value.clone(memory_format=torch.contiguous_format)
        self._count(call, self._even(y))
        return _Work(
            dist.broadcast(y, self.ranks[call.root], group=self._pg, async_op=True),
            lambda: y,
        )

    def _all_gather(self, call: Call) -> _Work:
        x = call.value.movedim(call.dim, 0).contiguous()
        lengths = [n for (n,) in self._gather_ints([x.shape[0]])]
        row = x[:1].numel() * x.element_size() if len(x) else 0
        self._count(call, [n * row for n in lengths])
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        work = dist.all_gather(parts, padded, group=self._pg, async_op=True)

        def cut():
            return torch.cat(
                [
                    parts[place][:n]
                    for place, n in zip(self._place, lengths, strict=True)
                ]
            )

        return _Work(work, lambda: cut().movedim(0, call.dim))

    def _gather(self, call: Call) -> _Work:
        x = call.value.contiguous()
        self._count(call, [x.numel() * x.element_size()] * self.size)
        parts = (
            [torch.empty_like(x) for _ in range(self.size)]
            if self.rank == call.root
            else None
        )
        work = dist.gather(
            x, parts, dst=self.ranks[call.root], group=self._pg, async_op=True
        )
        return _Work(work, lambda: parts and [parts[place] for place in self._place])

    def _scatter(self, call: Call) -> _Work:
        root, header = (
            self.rank == call.root,
            torch.zeros(_HEADER, dtype=torch.int64, device=self.device),
        )
        if root:
            header = _header(call.value[0], self.device)
        dist.broadcast(header, self.ranks[call.root], group=self._pg)
        mine = _buffer(header)
        parts = (
            self._torch_order([x.contiguous() for x in call.value]) if root else None
        )
        self._count(call, [mine.numel() * mine.element_size()] * self.size)
        return _Work(
            dist.scatter(
                mine, parts, self.ranks[call.root], group=self._pg, async_op=True
            ),
            lambda: mine,
        )

    def _reduce_scatter(self, call: Call) -> _Work:
        parts = self._torch_order(
            [part.contiguous() for part in call.value.chunk(self.size, dim=call.dim)]
        )
        mine = torch.empty_like(parts[0])
        self._count(call, [mine.numel() * mine.element_size()] * self.size)
        work = dist.reduce_scatter(
            mine, parts, _op(call), group=self._pg, async_op=True
        )
        return _Work(
            work, lambda: mine / self.size if call.reduction == "mean" else mine
        )

    def _all_to_all(self, call: Call) -> _Work:
        xs, rest = call.value, call.value[0].shape[1:]
        # lengths[i][j]: what i sends to j
        lengths = self._gather_ints([len(x) for x in xs])
        self._count(call, [x.numel() * x.element_size() for x in xs])
        outs = self._torch_order(xs)
        take = self._torch_order([row[self.rank] for row in lengths])
        into = xs[0].new_empty(sum(take), *rest)
        work = dist.all_to_all_single(
            into,
            torch.cat(outs),
            take,
            [len(x) for x in outs],
            group=self._pg,
            async_op=True,
        )
        return _Work(work, lambda: [into.split(take)[place] for place in self._place])

    def _barrier(self, call: Call) -> _Work:
        self._count(call, [0] * self.size)
        return _Work(dist.barrier(group=self._pg, async_op=True))

    def _send(self, call: Call) -> _Work:
        x, dst = call.value.contiguous(), self.ranks[call.root]
        self._count(call, [x.numel() * x.element_size()])
        header = _header(x, self.device)
        works = [
            dist.isend(t, dst, group=self._pg, tag=2 * call.tag + i)
            for i, t in enumerate((header, x))
        ]
        return _Work(works, keep=(header, x))

    def _recv(self, call: Call) -> _Incoming:
        self._count(call, [0])
        src = self.ranks[call.root]
        return _Incoming(self, src, call.tag, self._queues[src, call.tag])


def _op(call: Call):
    return {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(
        call.reduction, dist.ReduceOp.SUM
    )


def _header(x: Tensor, device: torch.device) -> Tensor:
    if x.dtype not in _DTYPES or x.dim() > _HEADER - 2:
        raise ValueError(
            f"x of dtype {x.dtype} with {x.dim()} dimensions cannot be sent: use up to"
            f" 8 dimensions of {_DTYPES}"
        )
    row = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    return torch.tensor(
        row + [0] * (_HEADER - len(row)), dtype=torch.int64, device=device
    )


def _buffer(header: Tensor) -> Tensor:
    dtype, dims, *sizes = header.tolist()
    return torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=header.device)
