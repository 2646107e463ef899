"""Adapt any Llama-shaped model to a text file with virtual tokens.

On one device or, under torchrun, on many:

    python -m llmlab.peft.examples.virtual_text --method prefix \\
        --model FOLDER_OR_HUB_NAME --text notes.txt --out adapter
    torchrun --nproc-per-node 8 -m llmlab.peft.examples.virtual_text --method prefix \\
        --model … --text notes.txt --out adapter

The four methods differ in one line. The folder that comes out is opened by the method's
`load` and by `peft.PeftModel.from_pretrained`; the network of an encoder stays behind.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from llmlab.peft import p_tuning, walk
from llmlab.peft.examples import lora_text
from llmlab.peft.p_tuning import p_tuning_v2
from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning, prompt_tuning

METHODS = {
    "prompt": (prompt_tuning, prompt_tuning.PromptTuningConfig, 0.1),
    "prefix": (prefix_tuning, prefix_tuning.PrefixTuningConfig, 5e-3),
    "p-tuning": (p_tuning, p_tuning.PTuningConfig, 5e-3),
    "p-tuning-v2": (p_tuning_v2, p_tuning_v2.PTuningV2Config, 0.1),
}  # name: (module, its settings, a learning rate to start a search from)


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, train, and save the virtual tokens."""
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
    dice = torch.Generator().manual_seed(args.seed)  # the same start on every rank
    module.apply(model, config(args.tokens), generator=dice)
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
    p.add_argument("--tokens", type=int, default=20, help="virtual tokens")
    p.add_argument(
        "--lr", type=float, help="learning rate; by default one that suits the method"
    )
    return p


if __name__ == "__main__":
    main()
