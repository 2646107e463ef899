"""torchtitan's way: one model, and parallelisms that are applied to it, in an order.

Liang et al. 2024, https://arxiv.org/abs/2410.06511; the order is that of its
`parallelize_llama`:

    DeviceMesh   names for the axes of a block of ranks: "pp", "dp", "tp"
    1 pipeline   this rank's layers only; all that follows is done to them
    2 tensor     parallelize_module: q, k, v, gate, up by columns, o and down by rows
    3 activations  checkpoint_wrapper: a block is computed again in its backward
    4 compile    each block, so that equal blocks are compiled once
    5 data       fully_shard: each parameter is cut along its first dimension, block by
                 block; a matrix that is cut already is cut once more

None of it needs a class around the model: the code of the model knows no rank, and
each step changes what is there: parameters become DTensors, a block gets hooks. So the
same `Llama` runs on one process and on a mesh.

Simplified: no sequence parallelism between the blocks, no loss that stays cut; the
embedding, the norms and the head are whole on each tensor rank; fp32. With 5 before 2
PyTorch raises an error: a parameter of the axis "dp" cannot move to "tp".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmlab.parallelism.frameworks import engines
from llmlab.parallelism.pipeline import split
from llmlab.parallelism.runtime import Communicator


@dataclass(frozen=True)
class Axes:
    """How many ranks each parallelism has, and what else is done to a block."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    recompute: bool = False
    compile_with: str | None = None  # a backend of torch.compile

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def make_mesh(axes: Axes, ranks: int) -> DeviceMesh:
    """Neighbours share a model's matrices; the pipeline crosses the longest way.

    Raises:
        ValueError: the axes do not make up the ranks.
    """
    if axes.pp * axes.dp * axes.tp != ranks:
        raise ValueError(
            f"pp={axes.pp} · dp={axes.dp} · tp={axes.tp} must be the {ranks} ranks"
        )
    shape = (axes.pp, axes.dp, axes.tp)
    return init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))


def parallelize(part: nn.Module, mesh: DeviceMesh, axes: Axes) -> None:
    """Steps 2 to 5, in place, on this rank's layers."""
    if axes.tp > 1:
        for block in blocks(part):
            cut_matrices(block, mesh["tp"])
    if axes.recompute:
        recompute_blocks(part)
    if axes.compile_with is not None:
        for block in blocks(part):
            block.compile(backend=axes.compile_with)
    if axes.dp > 1:
        shard_parameters(part, mesh["dp"])


def blocks(part: nn.Module) -> list[nn.Module]:
    """The layers of a whole model, or of a pipeline's stage."""
    return list(part.model.layers.children())


def recompute_blocks(part: nn.Module) -> None:
    """A block keeps its input only, and is computed again in the backward pass."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        checkpoint_wrapper,
    )

    layers = part.model.layers
    for name, block in list(layers.named_children()):
        layers.register_module(name, checkpoint_wrapper(block))


def cut_matrices(block: nn.Module, mesh: DeviceMesh) -> None:
    """Megatron's cuts: parameters become DTensors on the axis "tp"."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {}
    for name, _ in block.named_modules():
        leaf = name.split(".")[-1]
        if leaf in engines.COLUMN_PARALLEL:
            plan[name] = ColwiseParallel()
        elif leaf in engines.ROW_PARALLEL:
            plan[name] = RowwiseParallel()
    parallelize_module(block, mesh, plan)


def shard_parameters(part: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: block by block, then what is left: embedding, norm and head."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks(part):
        fully_shard(block, mesh=mesh)
    fully_shard(part, mesh=mesh)


def train(comm: Communicator, axes: Axes) -> list[float]:
    """The losses of the room's task, as by any of `engines`."""
    mesh = make_mesh(axes, comm.size)
    (part,) = split(engines.build(), mesh["pp"].get_local_rank(), axes.pp)
    parallelize(part, mesh, axes)
    if axes.pp == 1:
        losses = engines.train(part, lambda step: shard(step, mesh))
    else:
        losses = train_pipeline(comm, part, mesh, axes)
    return engines.averaged(losses, comm)


def shard(step: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The sequences of this rank's place on the axis "dp"; "tp" ranks see the same."""
    x, y = engines.batch(step)
    dp = mesh["dp"]
    if len(x) % dp.size():
        raise ValueError(f"{len(x)} sequences must be a multiple of dp={dp.size()}")
    place = dp.get_local_rank()
    return x.chunk(dp.size())[place], y.chunk(dp.size())[place]


def train_pipeline(
    comm: Communicator, part: nn.Module, mesh: DeviceMesh, axes: Axes
) -> list[Tensor]:
    """The same loop, with torch's 1F1B in the place of forward and backward."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    group = mesh["pp"].get_group()
    place = mesh["pp"].get_local_rank()
    stage = PipelineStage(part, place, axes.pp, comm.device, group=group)
    microbatches = engines.MICROBATCHES
    schedule = Schedule1F1B(stage, microbatches, loss_fn=engines.loss_of)
    optimizer = torch.optim.AdamW(part.parameters(), **engines.ADAM)
    losses = []
    for step in range(engines.STEPS):
        x, y = shard(step, mesh)
        found: list[Tensor] = []
        inputs = [x] if part.is_first else []
        last = {"target": y, "losses": found} if part.is_last else {}
        optimizer.zero_grad()
        schedule.step(*inputs, **last, return_outputs=False)
        optimizer.step()
        # only the last stage knows the loss: it stands for all pp of them
        mean = torch.stack(found).mean() if found else torch.zeros(())
        losses.append(mean * axes.pp)
    return losses
