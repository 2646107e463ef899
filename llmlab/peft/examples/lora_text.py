"""Fine-tune any Llama-shaped model on a text file with LoRA.

On one device or, under torchrun, on many:

    python -m llmlab.peft.examples.lora_text --model FOLDER_OR_HUB_NAME \\
        --text notes.txt --out adapter
    torchrun --nproc-per-node 8 -m llmlab.peft.examples.lora_text --model … \\
        --text notes.txt --out adapter

Each process holds the frozen model and draws its own windows; only the gradients of A
and B are averaged. The folder that comes out is opened by `llmlab.peft.lora.files.load`
and by `peft.PeftModel.from_pretrained`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmlab.models.language_model import next_token_loss
from llmlab.peft import lora, walk
from llmlab.peft.lora import files


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, train, and save the adapter."""
    args = parser().parse_args(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model, tokens = load(args, device)
    torch.manual_seed(args.seed)  # the same A on every rank
    lora.apply(
        model,
        lora.LoRAConfig(
            r=args.rank, alpha=args.alpha, target_modules=tuple(args.targets)
        ),
    )
    if rank == 0:
        print(
            "training {:,} of {:,} parameters on {} × {}".format(
                *walk.trainable(model), world, device.type
            ),
            flush=True,
        )
    losses = train(model, tokens, args, rank, world)
    if rank == 0:
        files.save(model, args.out)
        print(
            f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last;"
            f" adapter saved in {args.out}"
        )
    if world > 1:
        dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--model",
        required=True,
        help="a checkpoint folder, or a name on the Hugging Face hub",
    )
    p.add_argument("--text", required=True, type=Path, help="a file of plain text")
    p.add_argument("--out", required=True, type=Path, help="where the adapter goes")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=float, default=16)
    p.add_argument(
        "--targets",
        nargs="+",
        default=["q_proj", "v_proj"],
        help="endings of the layers' names",
    )
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=4, help="windows a step on each device")
    p.add_argument("--context", type=int, default=512, help="tokens in a window")
    p.add_argument("--seed", type=int, default=0)
    return p


def load(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor]:
    """(frozen model on the device, tokens of the text).

    Bfloat16 on a GPU, float32 on a CPU, where half is slow.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    tokens = AutoTokenizer.from_pretrained(args.model)(
        args.text.read_text(encoding="utf-8"), verbose=False
    )["input_ids"]
    if len(tokens) <= args.context:
        raise ValueError(
            f"{args.text} has {len(tokens)} tokens; it must have more than --context"
            f" {args.context}"
        )
    return model, torch.tensor(tokens, device=device)


def train(
    model: nn.Module, tokens: Tensor, args: argparse.Namespace, rank: int, world: int
) -> list[float]:
    """AdamW on the adapter; a loss for each step, the mean over all processes."""
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=args.lr, weight_decay=0.0)
    # other windows on every rank
    dice = torch.Generator().manual_seed(args.seed * world + rank)
    losses = []
    model.train()
    for _ in range(args.steps):
        starts = torch.randint(
            len(tokens) - args.context, (args.batch,), generator=dice
        ).to(tokens.device)
        window = tokens[
            starts[:, None] + torch.arange(args.context, device=tokens.device)
        ]
        loss = next_token_loss(model(window).logits, window)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        report = average([loss.detach(), *(p.grad for p in factors)], world)
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        losses.append(report)
    return losses


def average(tensors: list[Tensor], world: int) -> float:
    """Each tensor becomes its mean over all processes.

    Returns the first, which is a number.
    """
    if world > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world
    return tensors[0].item()


if __name__ == "__main__":
    main()
