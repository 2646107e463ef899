"""The same training as `train_zero`, in PyTorch's FSDP2 and in DeepSpeed.

Both average gradients over ranks, where the loss of a batch is a mean over tokens of
all ranks: so each rank's loss is multiplied by the number of ranks. DeepSpeed divides
by the number of microbatches, too.

    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.zero_libraries \\
        --library fsdp2
    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.zero_libraries \\
        --library deepspeed --stage 3
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from llmlab.parallelism.examples.train_zero import (
    Settings,
    Trained,
    adam,
    batches,
    build,
)
from llmlab.parallelism.runtime import Communicator, attach
from llmlab.parallelism.zero_and_fsdp import summed_loss


def train_fsdp2(comm: Communicator, s: Settings) -> Trained:
    """What `train` gives, from `fully_shard`: a unit a block, and the root."""
    from torch.distributed.fsdp import fully_shard

    model = build(s, comm.device)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    a = adam(s)
    optimizer = torch.optim.AdamW(
        model.parameters(), a.lr, a.betas, a.eps, a.weight_decay
    )
    history = []
    for step in range(s.steps):
        loss = _backward(
            comm, s, step, model, lambda loss: (loss * comm.size).backward()
        )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss, norm.full_tensor().item()))
    return history, {
        name: w.full_tensor().detach().cpu() for name, w in model.named_parameters()
    }


def deepspeed_config(s: Settings, ranks: int) -> dict:
    """DeepSpeed's JSON, as a dictionary.

    `torch_adam`: its own Adam kernels would be compiled first.
    """
    a = adam(s)
    return {
        "train_micro_batch_size_per_gpu": s.sequences // ranks,
        "gradient_accumulation_steps": s.microbatches,
        "gradient_clipping": s.clip,
        "zero_optimization": {"stage": s.stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": a.lr,
                "betas": list(a.betas),
                "eps": a.eps,
                "weight_decay": a.weight_decay,
                "torch_adam": True,
            },
        },
    }


def train_deepspeed(comm: Communicator, s: Settings) -> Trained:
    """What `train` gives, from DeepSpeed's stage `s.stage`."""
    deepspeed = import_deepspeed(comm)
    model = build(s, comm.device)
    engine, *_ = deepspeed.initialize(
        model=model, config=deepspeed_config(s, comm.size)
    )
    history = []
    for step in range(s.steps):

        def backward(loss: Tensor) -> None:
            engine.backward(loss * comm.size * s.microbatches)
            engine.step()  # steps at the last microbatch only

        loss = _backward(comm, s, step, engine, backward)
        history.append((loss, float(engine.get_global_grad_norm())))
    with deepspeed.zero.GatheredParameters(
        list(model.parameters()), enabled=s.stage == 3
    ):
        return history, {
            name: w.detach().cpu().clone() for name, w in model.named_parameters()
        }


def import_deepspeed(comm: Communicator):
    """DeepSpeed, on a CPU without compiling anything.

    It reads LOCAL_RANK, which launchers set and `launch` does not.
    """
    os.environ.setdefault("LOCAL_RANK", str(comm.rank))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # it would be compiled for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def recorded() -> dict:
    """What `train_deepspeed` gave on two ranks when it was recorded: "versions", and
    "history" by stage.

    scripts/golden/zero_goldens.py writes it;
    tests/parallelism/zero_and_fsdp/test_zero_oracles.py runs DeepSpeed again and
    compares.
    """
    path = Path(__file__).parents[1] / "data" / "zero_deepspeed.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _backward(comm: Communicator, s: Settings, step: int, model, backward) -> float:
    """All microbatches of a step; returns the mean loss a token over all ranks."""
    mine = batches(s, step, comm.rank, comm.size, comm.device)
    total = comm.all_reduce(
        torch.tensor(sum(int((y != -100).sum()) for _, y in mine), device=comm.device)
    ).item()
    loss = torch.zeros((), device=comm.device)
    for x, y in mine:
        part = summed_loss(model, x, y) / total
        backward(part)
        loss += part.detach()
    return comm.all_reduce(loss).item()


def _main(comm: Communicator, library: str, s: Settings) -> None:
    history, _ = {"fsdp2": train_fsdp2, "deepspeed": train_deepspeed}[library](comm, s)
    if comm.rank == 0:
        print("losses", " ".join(f"{loss:.4f}" for loss, _ in history))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", choices=["fsdp2", "deepspeed"], default="fsdp2")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    chosen = parser.parse_args()
    attach(_main, chosen.library, Settings(stage=chosen.stage))
