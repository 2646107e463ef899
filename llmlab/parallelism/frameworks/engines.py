"""One small Llama, the same data, trained by each engine that people use.

The losses must be the same. Every function below is a rank function `fn(comm)` and
returns the losses of `STEPS` steps of AdamW. Read two of them side by side to see what
an engine asks of you; what differs is a few lines:

    plain                one process: the reference
    ddp                  torch DistributedDataParallel: one replica per rank
    fsdp2                torch fully_shard: sharded weights, gathered block by block
    dtensor              torch parallelize_module: Megatron's cuts as DTensors
    pipelining           torch.distributed.pipelining: 1F1B over stages
    deepspeed            DeepSpeed ZeRO 1, 2, 3
    deepspeed_pipeline   DeepSpeed PipelineModule
    megatron             Megatron-core's ColumnParallelLinear and RowParallelLinear

DeepSpeed takes half a minute to import and start, and Megatron-core needs an
environment of its own: what they gave is recorded in `data/engines.json` with the
versions (scripts/golden/engines_goldens.py), and a test runs DeepSpeed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama, LlamaConfig, rope_tables
from llmlab.parallelism.pipeline import split
from llmlab.parallelism.runtime import Communicator

CONFIG = LlamaConfig(
    96, 64, 160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
STEPS = 4
BATCH = 8  # sequences
LENGTH = 24  # tokens per sequence
MICROBATCHES = 4
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
DEEPSPEED = {"gradient_clipping": 0.0, "steps_per_print": 10**9}
ADAM = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01}


def build() -> Llama:
    """The model, the same in every process."""
    torch.manual_seed(0)
    return Llama(CONFIG)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of a step, (8, 24) each.

    They repeat every other step, so that there is something to learn.
    """
    dice = torch.Generator().manual_seed(step % 2)
    x = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1), generator=dice)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def shard(step: int, comm: Communicator) -> tuple[Tensor, Tensor]:
    """This rank's sequences.

    Raises:
        ValueError: they do not divide over the ranks; the mean of the ranks' means
            would be another loss.
    """
    if BATCH % comm.size:
        raise ValueError(
            f"{BATCH} sequences must be a multiple of the {comm.size} ranks"
        )
    x, y = batch(step)
    return x.chunk(comm.size)[comm.rank], y.chunk(comm.size)[comm.rank]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    model: nn.Module,
    data: Callable[[int], tuple[Tensor, Tensor]],
    parameters: Sequence | None = None,
) -> list[Tensor]:
    """The loop that PyTorch's engines leave to you."""
    optimizer = torch.optim.AdamW(parameters or model.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        x, y = data(step)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def averaged(losses: list[Tensor], comm: Communicator) -> list[float]:
    """Each rank saw its own sequences: the mean over ranks is the loss."""
    return comm.all_reduce(torch.stack(losses), op="mean").tolist()


def plain(comm: Communicator) -> list[float]:
    """One process, all sequences."""
    return [loss.item() for loss in train(build(), batch)]


def ddp(comm: Communicator) -> list[float]:
    """DistributedDataParallel: gradients are averaged in buckets during backward."""
    model = nn.parallel.DistributedDataParallel(build())
    return averaged(train(model, lambda step: shard(step, comm)), comm)


def fsdp2(comm: Communicator) -> list[float]:
    """fully_shard: each block is gathered before its forward and its backward pass."""
    from torch.distributed.fsdp import fully_shard

    model = build()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return averaged(train(model, lambda step: shard(step, comm)), comm)


def dtensor(comm: Communicator) -> list[float]:
    """parallelize_module: q, k, v, gate, up are cut by columns, o and down by rows.

    Every rank sees all sequences.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = build()
    mesh = init_device_mesh("cpu", (comm.size,))
    styles = {name: ColwiseParallel() for name in COLUMN_PARALLEL}
    styles |= {name: RowwiseParallel() for name in ROW_PARALLEL}
    for block in model.model.layers:
        plan = {}
        for name, _ in block.named_modules():
            leaf = name.split(".")[-1]
            if leaf in styles:
                plan[name] = styles[leaf]
        parallelize_module(block, mesh, plan)
    return [loss.item() for loss in train(model, batch)]


def pipelining(comm: Communicator) -> list[float]:
    """torch.distributed.pipelining: its PipelineStage and 1F1B around our stages."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    (stage,) = split(build(), comm.rank, comm.size)
    schedule = Schedule1F1B(
        PipelineStage(stage, comm.rank, comm.size, comm.device),
        MICROBATCHES,
        loss_fn=loss_of,
    )
    optimizer = torch.optim.AdamW(stage.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        microbatch_losses: list[Tensor] = []
        # The first stage is given the tokens, the last one the targets.
        inputs = [x] if stage.is_first else []
        last = {}
        if stage.is_last:
            last = {"target": y, "losses": microbatch_losses}
        optimizer.zero_grad()
        schedule.step(*inputs, **last, return_outputs=False)
        optimizer.step()
        if stage.is_last:
            losses.append(torch.stack(microbatch_losses).mean())
        else:
            losses.append(torch.zeros(()))
    return comm.broadcast(torch.stack(losses), comm.size - 1).tolist()


def deepspeed(
    comm: Communicator, stage: int = 2, settings: dict = DEEPSPEED
) -> list[float]:
    """deepspeed.initialize: the engine owns backward and step, and averages over ranks.

    It clips at 1.0 unless told not to.
    """
    model = build()
    sizes = {
        "train_micro_batch_size_per_gpu": BATCH // comm.size,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    engine, *_ = _deepspeed(comm).initialize(
        model=model, config=sizes | settings, optimizer=optimizer
    )
    losses = []
    for step in range(STEPS):
        x, y = shard(step, comm)
        loss = loss_of(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return averaged(losses, comm)


def deepspeed_pipeline(comm: Communicator) -> list[float]:
    """PipelineModule: a list of layers, each with one tensor in and one out.

    The engine fetches the microbatches itself.
    """
    library = _deepspeed(comm)
    from deepspeed.pipe import PipelineModule

    model = build()
    inner = model.model
    layers = [
        inner.embed_tokens,
        *(_BlockWithRope(block, inner.theta) for block in inner.layers),
        inner.norm,
        model.lm_head,
    ]
    net = PipelineModule(
        layers=layers, num_stages=comm.size, loss_fn=loss_of, partition_method="uniform"
    )
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // MICROBATCHES,
        "gradient_accumulation_steps": MICROBATCHES,
    }
    optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
    engine, *_ = library.initialize(
        model=net, config=settings | DEEPSPEED, optimizer=optimizer
    )
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        pairs = zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True)
        losses.append(engine.train_batch(iter(pairs)).item())
    return losses


class _BlockWithRope(nn.Module):
    """A block that makes its own RoPE tables."""

    def __init__(self, block: nn.Module, theta: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("theta", theta.clone(), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        rope = rope_tables(torch.arange(h.shape[1])[None], self.theta)
        return self.block(h, rope, None, None, sdpa)


def _deepspeed(comm: Communicator):
    """DeepSpeed on a CPU, without compiling anything. It reads what launchers set."""
    os.environ.setdefault("RANK", str(comm.rank))
    os.environ.setdefault("LOCAL_RANK", str(comm.rank))
    os.environ.setdefault("WORLD_SIZE", str(comm.size))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # it would be compiled for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed


def megatron(comm: Communicator) -> list[float]:
    """Megatron-core's two layers in the place of ours.

    Their weights are (out, in) shards, as those of the room `tensor`.
    """
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    parallel_state.initialize_model_parallel(comm.size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=comm.size,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    common = {
        "config": config,
        "init_method": nn.init.zeros_,
        "bias": False,
        "skip_bias_add": False,
    }
    model = build()
    for name, module in list(model.named_modules()):
        leaf = name.split(".")[-1]
        if leaf not in COLUMN_PARALLEL + ROW_PARALLEL:
            continue
        size_out, size_in = module.weight.shape
        if leaf in COLUMN_PARALLEL:
            new = ColumnParallelLinear(size_in, size_out, gather_output=False, **common)
            shards = module.weight.chunk(comm.size, dim=0)
        else:
            new = RowParallelLinear(size_in, size_out, input_is_parallel=True, **common)
            shards = module.weight.chunk(comm.size, dim=1)
        new.weight.data.copy_(shards[comm.rank])
        # they return (output, bias)
        new.register_forward_hook(lambda _module, _args, out: out[0])
        model.get_submodule(name.rpartition(".")[0]).register_module(leaf, new)
    return [loss.item() for loss in train(model, batch)]


def recorded() -> dict:
    """What the engines gave that are too slow for a page.

    Returns:
        {"versions": …, "losses": {engine: …}}
    """
    path = Path(__file__).parents[1] / "data" / "engines.json"
    return json.loads(path.read_text(encoding="utf-8"))
