"""The communicator over real gloo gives what World gives."""

from __future__ import annotations

import pytest
import torch

from llmlab.parallelism import World, launch


def everything(comm):
    """One call of each kind; the results as a flat list."""
    p, r = comm.size, comm.rank
    x = torch.arange(2.0 * p * 3).view(2 * p, 3) * (r + 1) - 5
    root, out = p - 1, []
    out += [comm.all_reduce(x, op) for op in ("sum", "max", "min", "mean")]
    out += [
        comm.all_reduce(x.to(t)) for t in (torch.bfloat16, torch.float64, torch.int64)
    ]
    out += [
        comm.broadcast(x, root),
        comm.all_gather(x),
        comm.all_gather(x, dim=1),
        comm.all_gather(x[: r + 1].T, dim=1),
    ]
    out += [comm.reduce_scatter(x), comm.reduce_scatter(x.T, dim=1, op="mean")]
    out += [comm.reduce(x, root), *(comm.gather(x, root) or [None])]
    out += [comm.scatter([x * i for i in range(p)] if r == root else None, root)]
    out += comm.all_to_all([x[: r + j] for j in range(p)])
    out += [
        comm.all_reduce(x, async_op=True).wait(),
        comm.all_gather(x, async_op=True).wait(),
    ]
    comm.barrier()
    if p > 1:
        out += [comm.sendrecv(x[:, :1], (r + 1) % p, (r - 1) % p, tag=3)]
        if r == 0:
            for h in [
                comm.isend(x * 2, 1, tag=1),
                comm.isend(x[:1].int(), 1, tag=1),
                comm.isend(x * 3, 1),
            ]:
                h.wait()
        elif r == 1:
            first, second = comm.irecv(0, tag=1), comm.irecv(0, tag=1)
            out += [comm.recv(0), second.wait(), first.wait()]
    backwards = comm.group(list(range(p))[::-1])
    out += [
        backwards.all_gather(torch.tensor([r])),
        backwards.reduce_scatter(x),
        backwards.broadcast(x, 0),
    ]
    out += backwards.all_to_all([x * j for j in range(p)])
    out += [
        backwards.scatter([x + j for j in range(p)] if backwards.rank == 0 else None)
    ]
    if p % 2 == 0:
        out += [axis.all_reduce(x) for axis in comm.mesh(2, p // 2).axes]
    half = comm.split(0 if r < max(1, p // 2) else None)
    out += [] if half is None else [half.all_reduce(x)]
    return out, [
        comm.ledger.bytes(op, r)
        for op in (
            "all_reduce",
            "all_gather",
            "reduce_scatter",
            "all_to_all",
            "scatter",
            "send",
        )
    ]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_gloo_agrees_with_world(p):
    world = World(p)
    ours = world.run(everything)
    theirs = launch(everything, p, timeout=60)
    for r, ((a, sent), (b, sent_too)) in enumerate(zip(ours, theirs, strict=True)):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x is None:
                assert y is None
            else:
                torch.testing.assert_close(
                    x, y, msg=lambda m, i=i, r=r: f"result {i} of rank {r}: {m}"
                )
        assert sent == sent_too, f"ledger of rank {r}"


def test_what_cannot_be_sent_is_named():
    from llmlab.parallelism import RankFailed

    def fn(comm):
        if comm.rank == 0:
            comm.send(torch.zeros(2, dtype=torch.complex64), 1)
        else:
            comm.recv(0)

    with pytest.raises(RankFailed, match=r"complex64.*cannot be sent"):
        launch(fn, 2)
