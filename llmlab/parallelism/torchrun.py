"""The third distance: a rank function as one process of a job that torchrun started, on one machine or many.

    # train.py                                        $ torchrun --nproc-per-node 8 train.py
    from llmlab.parallelism import attach
    attach(fn, *args)                                 # calls fn(comm, *args)

Slurm's and Kubernetes' launchers set the same environment variables, and so work too.

A thread of gloo's that is still there when the interpreter ends can abort it ("terminate called without an active exception",
https://github.com/pytorch/pytorch/issues/190489), and a job which has done its work counts as failed. So the communicator is closed
when `fn` is done: a model whose hooks refer to it would keep it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from llmlab.parallelism.process import world_comm


def attach(fn: Callable, *args, backend: str | None = None):
    """Run `fn(comm, *args)` as one rank of a job that torchrun started; return its result.

    Args:
        backend: "nccl" or "gloo"; by default NCCL where there is a GPU. Under NCCL the process takes GPU number LOCAL_RANK.
    Raises:
        RuntimeError: the process was not started by a launcher.
    """
    if "RANK" not in os.environ:
        raise RuntimeError("attach() needs a launcher: run this script with `torchrun --nproc-per-node N script.py`")
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    comm = world_comm(device)
    try:
        return fn(comm, *args)
    finally:
        dist.destroy_process_group()
        comm.close()
