"""Fine-tune any Llama-shaped model on a text with adapters, MAM or UniPELT.

On one device or, under torchrun, on many:

    python -m llmlab.peft.examples.bottleneck_text --method pfeiffer \\
        --model FOLDER_OR_HUB_NAME --text notes.txt --out adapter
    torchrun --nproc-per-node 8 -m llmlab.peft.examples.bottleneck_text \\
        --method pfeiffer --model … --text notes.txt --out adapter

The folder that comes out is opened by the method's `load`, on our Llama and on
transformers'. UniPELT's gates are the mean over the first `--gate-tokens` tokens of a
window, so that they do not see what they help to predict.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from llmlab.peft import adapters, walk
from llmlab.peft.examples import lora_text
from llmlab.peft.mam_and_unipelt import mam, unipelt

METHODS = {
    "houlsby": (
        adapters,
        lambda a: adapters.AdapterConfig("houlsby", a.bottleneck),
        1e-2,
    ),
    "pfeiffer": (
        adapters,
        lambda a: adapters.AdapterConfig("pfeiffer", a.bottleneck),
        1e-2,
    ),
    "mam": (mam, lambda a: mam.MAMConfig(a.tokens, bottleneck=a.bottleneck), 2e-3),
    "unipelt": (
        unipelt,
        lambda a: unipelt.UniPELTConfig(
            a.tokens, bottleneck=a.bottleneck, gate_tokens=a.gate_tokens
        ),
        2e-3,
    ),
    # name: (module, its settings from the arguments, a learning rate to start a search
    # from)
}


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, train, and save the adapter."""
    args = parser().parse_args(arguments)
    module, config, rate = METHODS[args.method]
    args.lr = args.lr or rate
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
    torch.manual_seed(args.seed)  # the same start on every rank
    module.apply(model, config(args))
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


def parser() -> argparse.ArgumentParser:
    """The command line: that of lora_text without what is LoRA's own."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], conflict_handler="resolve"
    )
    for action in lora_text.parser()._actions:
        if action.dest not in ("help", "rank", "alpha", "targets", "lr"):
            p._add_action(action)
    p.add_argument("--method", required=True, choices=METHODS)
    p.add_argument("--bottleneck", type=int, default=64, help="width of each adapter")
    p.add_argument(
        "--tokens", type=int, default=20, help="length of the prefix of mam and unipelt"
    )
    p.add_argument(
        "--gate-tokens",
        type=int,
        default=32,
        help="unipelt: the first tokens, which set the gates",
    )
    p.add_argument(
        "--lr", type=float, help="learning rate; by default one to start a search from"
    )
    return p


if __name__ == "__main__":
    main()
