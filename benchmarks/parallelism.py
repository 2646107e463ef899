"""Four ranks over gloo, from nothing to the first barrier and back: `launch` against torch.multiprocessing's spawn."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.case import Case
from llmlab.parallelism import launch

RANKS = 4


def _ours(comm) -> None:
    comm.barrier()


def _theirs(rank: int, folder: str) -> None:
    """What PyTorch's tutorials do in a spawned process."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    dist.barrier()
    dist.destroy_process_group()


def _spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_theirs, args=(folder,), nprocs=RANKS)


def start_up() -> Case:
    """Imports are the difference: a forked rank has them already, a spawned one imports torch anew."""
    return Case("4-rank start-up (launch; torch.multiprocessing.spawn)", lambda: launch(_ours, RANKS), _spawn, rounds=3)


CASES = (start_up,)
