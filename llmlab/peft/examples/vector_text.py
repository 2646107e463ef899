"""Fine-tune any Llama-shaped model on a text file with BitFit or (IA)³.

On one device or, under torchrun, on many:

    python -m llmlab.peft.examples.vector_text --method ia3 \\
        --model FOLDER_OR_HUB_NAME --text notes.txt --out adapter
    torchrun --nproc-per-node 8 -m llmlab.peft.examples.vector_text --method ia3 \\
        --model … --text notes.txt --out adapter

The folder that comes out is opened by the method's `load` and by
`peft.PeftModel.from_pretrained`. BitFit trains the biases of the linears that have one;
a model without any gets one on every linear but the head.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from llmlab.peft import bitfit, ia3, walk
from llmlab.peft.examples import lora_text

RATES = {"bitfit": 1e-2, "ia3": 1e-2}  # where a search may start


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, train, and save the vectors."""
    args = parser().parse_args(arguments)
    args.lr = args.lr or RATES[args.method]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if cuda
        else torch.device("cpu")
    )
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    model, tokens = lora_text.load(args, device)
    module = put_on(model, args.method)
    if rank == 0:
        print(
            "training {:,} of {:,} parameters on {} processes".format(
                *walk.trainable(model), world
            ),
            flush=True,
        )
    losses = lora_text.train(model, tokens, args, rank, world)
    if rank == 0:
        module.save(model, args.out)
        print(
            f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last;"
            f" adapter saved in {args.out}"
        )
    if world > 1:
        dist.destroy_process_group()


def put_on(model: nn.Module, method: str):
    """Apply the method, and return its module."""
    if method == "ia3":
        ia3.apply(model, ia3.IA3Config())
        return ia3
    biased = tuple(
        name
        for name, layer in walk.find(model, walk.ALL_LINEAR).items()
        if bitfit.has_bias(layer)
    )
    bitfit.apply(model, bitfit.BitFitConfig(biased or walk.ALL_LINEAR))
    return bitfit


def parser() -> argparse.ArgumentParser:
    """The command line: that of lora_text without what is LoRA's own."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], conflict_handler="resolve"
    )
    for action in lora_text.parser()._actions:
        if action.dest not in ("help", "rank", "alpha", "targets", "lr"):
            p._add_action(action)
    p.add_argument("--method", required=True, choices=RATES)
    p.add_argument(
        "--lr", type=float, help="learning rate; by default one to start a search from"
    )
    return p


if __name__ == "__main__":
    main()
