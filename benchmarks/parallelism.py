"""Training steps on two real processes against torch's engines.

And how long four processes take to start.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.case import Case
from benchmarks.models import SHAPE
from llmlab.models.llama import Llama
from llmlab.parallelism import launch, tensor
from llmlab.parallelism.data_parallel import DataParallel
from llmlab.parallelism.frameworks import loss_of
from llmlab.parallelism.pipeline import Pipeline, schedules, split
from llmlab.parallelism.zero_and_fsdp import Adam, Fsdp

RANKS = 4


def _ours(comm) -> None:
    comm.barrier()


def _theirs(rank: int, folder: str) -> None:
    """What PyTorch's tutorials do in a spawned process."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", RANKS),
        rank=rank,
        world_size=RANKS,
    )
    dist.barrier()
    dist.destroy_process_group()


def _spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_theirs, args=(folder,), nprocs=RANKS)


def start_up() -> Case:
    """How long processes take to start, forked and spawned.

    Imports are the difference: a forked rank has them already, a spawned one imports
    torch anew.
    """
    return Case(
        "4-rank start-up (launch; torch.multiprocessing.spawn)",
        lambda: launch(_ours, RANKS),
        _spawn,
        rounds=3,
    )


def _model() -> Llama:
    torch.manual_seed(0)
    return Llama(SHAPE)


def _data(rank: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(rank)
    tokens = torch.randint(SHAPE.vocab_size, (batch, 129), generator=dice)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _adamw(parameters) -> tuple[Callable, Callable]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    return optimizer.step, optimizer.zero_grad


def _step(model, data, *after: Callable):
    """Forward, loss, backward, and what comes after it."""
    x, y = data

    def step() -> float:
        loss = loss_of(model(x), y)
        loss.backward()
        for call in after:
            call()
        return loss.item()

    return step


def data_parallel() -> Case:
    """Buckets that leave during backward, ours and DistributedDataParallel's."""

    def ours(comm):
        model = DataParallel(_model(), comm)
        return _step(model, _data(comm.rank), model.finish, *_adamw(model.parameters()))

    def theirs(comm):
        model = torch.nn.parallel.DistributedDataParallel(_model())
        return _step(model, _data(comm.rank), *_adamw(model.parameters()))

    name = "data parallel step, 2 ranks (DistributedDataParallel)"
    return Case(name, ours, theirs, ranks=2)


def fully_sharded() -> Case:
    """Weights gathered block by block, ours and `fully_shard`."""

    def ours(comm):
        model = _model()
        return _step(model, _data(comm.rank), Fsdp(model, comm, Adam(lr=1e-3)).step)

    def theirs(comm):
        from torch.distributed.fsdp import fully_shard

        model = _model()
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        return _step(model, _data(comm.rank), *_adamw(model.parameters()))

    return Case("fully sharded step, 2 ranks (`fully_shard`)", ours, theirs, ranks=2)


def tensor_parallel() -> Case:
    """Column and row cuts of every block, ours and as DTensors.

    The head is whole in theirs; ours gathers its logits.
    """

    def ours(comm):
        model = tensor.parallelize(_model(), comm, gather_output=True)
        return _step(model, _data(), *_adamw(model.parameters()))

    def theirs(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        model = _model()
        mesh = init_device_mesh("cpu", (comm.size,))
        cuts = {
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for block in model.model.layers:
            parallelize_module(block, mesh, cuts)
        return _step(model, _data(), *_adamw(model.parameters()))

    name = "tensor parallel step, 2 ranks (`parallelize_module`)"
    return Case(name, ours, theirs, ranks=2)


def pipeline() -> Case:
    """1F1B over two stages and four microbatches, ours and torch's."""
    microbatches = 4
    config = replace(SHAPE, tie_word_embeddings=False)  # theirs cannot tie weights

    def stage_of(comm):
        torch.manual_seed(0)
        return split(Llama(config), comm.rank, comm.size)

    def ours(comm):
        pipe = Pipeline(stage_of(comm), comm)
        update, zero_grad = _adamw(pipe.parameters())
        schedule = schedules.one_f_one_b(comm.size, microbatches)
        x, y = _data(batch=4)
        data = list(zip(x.chunk(microbatches), y.chunk(microbatches), strict=True))

        def step() -> None:
            pipe.step(schedule, data)
            update()
            zero_grad()

        return step

    def theirs(comm):
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        (stage,) = stage_of(comm)
        x, y = _data(batch=4)
        place = PipelineStage(stage, comm.rank, comm.size, comm.device)
        schedule = Schedule1F1B(place, microbatches, loss_fn=loss_of)
        update, zero_grad = _adamw(stage.parameters())
        inputs = [x] if stage.is_first else []
        targets = {"target": y} if stage.is_last else {}

        def step() -> None:
            schedule.step(*inputs, **targets, return_outputs=False)
            update()
            zero_grad()

        return step

    name = "1F1B pipeline step, 2 ranks, 4 microbatches (torch.distributed.pipelining)"
    return Case(name, ours, theirs, ranks=2)


CASES = (start_up, data_parallel, fully_sharded, tensor_parallel, pipeline)
