"""The third distance: a rank function as one process of a job under torchrun.

    # train.py                                    $ torchrun --nproc-per-node 8 train.py
    from llmlab.parallelism import attach
    attach(fn, *args)                             # calls fn(comm, *args)

Slurm's and Kubernetes' launchers set the same environment variables, and so work too.

A thread of gloo's that is still there when the interpreter ends can abort it
("terminate called without an active exception",
https://github.com/pytorch/pytorch/issues/190489), and a job which has done its work
counts as failed. So the communicator is closed when `fn` is done: a model whose hooks
refer to it would keep it.

torchrun gives each rank a session of its own, and a killed torchrun leaves its ranks
running: they wait in a collective for half an hour. So a rank checks twice per second
whether its torchrun is still there, and ends when it is not. Under other launchers the
parent may rightly end first (`nohup python train.py &`), and nothing is checked.

After a restart torchrun's store still holds the addresses of the attempt before, and
gloo may wait at a dead one for ever. On one machine each attempt has its own keys. On
several, agents may count attempts differently, so the keys are torch's: set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and each attempt has a store of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from llmlab.parallelism.runtime.child import end_with
from llmlab.parallelism.runtime.process import world_comm


def attach(
    fn: Callable,
    *args,
    backend: str | None = None,
    timeout: float | None = None,
):
    """Run `fn(comm, *args)` as one rank of a job that torchrun started.

    Return its result.

    Args:
        backend: "nccl" or "gloo"; by default NCCL where there is a GPU. Under NCCL the
            process takes GPU number LOCAL_RANK.
        timeout: seconds that a collective waits for the other ranks; by default torch's
            30 minutes (gloo) or 10 (NCCL).
    Raises:
        RuntimeError: the process was not started by a launcher.
        ValueError: `timeout` is not above 0 seconds.
    """
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout={timeout} must be above 0 seconds")
    if "RANK" not in os.environ:
        raise RuntimeError(
            "attach() needs a launcher: run this script with `torchrun --nproc-per-node"
            " N script.py`"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if backend == "nccl"
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(backend, timedelta(seconds=timeout) if timeout else None)
    comm = world_comm(device)
    try:
        return fn(comm, *args)
    finally:
        dist.destroy_process_group()
        comm.close()


def _join(backend: str, timeout: timedelta | None) -> None:
    """Meet the other ranks of this attempt."""
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    patience = {} if timeout is None else {"timeout": timeout}
    store, rank, size = next(dist.rendezvous("env://", **patience))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
