"""Folding: channels made smaller at one place, larger at the next, for the same output.

Between two parts of a block each channel may have a scale s of its own:

    W₂ x  =  (W₂ diag(s)) (diag(s)⁻¹ x)

and diag(s)⁻¹ is folded into what made x: the weight of a norm, or the rows of a linear
with nothing but products between it and W₂. Nothing is computed that was not computed
before. SmoothQuant and AWQ choose s so that what is quantised afterwards loses less.

    norm before the attention  →  q, k, v   one s for the three, as they read the same x
    v                          →  o         only without GQA: else heads share a v
    norm before the MLP        →  gate, up
    up                         →  down      silu(gate) ⊙ up: s goes through the product

Simplified: places are found by the names that Llama, Mistral and Qwen use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Seam:
    """A place with a free scale: `before` makes the channels that `after` read."""

    before: str  # a norm, or a linear whose rows are those channels
    after: tuple[str, ...]


SEAMS = (
    Seam(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    Seam("self_attn.v_proj", ("self_attn.o_proj",)),
    Seam("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Seam("mlp.up_proj", ("mlp.down_proj",)),
)


def seams(block: nn.Module) -> list[Seam]:
    """The seams of one decoder layer. v → o is left out where heads share a v.

    Raises:
        ValueError: the block has not the names of a Llama's.
    """
    names = dict(block.named_modules())
    found = []
    for seam in SEAMS:
        missing = [name for name in (seam.before, *seam.after) if name not in names]
        if missing:
            raise ValueError(
                f"{type(block).__name__} has no {missing[0]}: scales are folded into"
                " blocks with the names of Llama, Mistral and Qwen"
            )
        width = len(names[seam.before].weight)  # channels
        if all(names[name].weight.shape[1] == width for name in seam.after):
            found.append(seam)
    return found


@torch.no_grad()
def fold(block: nn.Module, seam: Seam, scale: Float[Tensor, "channels"]) -> None:
    """Channels of `seam` are divided by `scale` where they arise, and multiplied by it
    where they are read, in place. The block computes what it computed.

    Raises:
        ValueError: `scale` has another length than the channels, or is not positive and
            finite; nothing is changed then.
    """
    before = block.get_submodule(seam.before)
    channels = len(before.weight)
    if scale.shape != (channels,):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; {seam.before} has {channels}"
            " channels"
        )
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError(
            f"scale for {seam.before} must be positive and finite; it reaches from"
            f" {scale.min().item():.3g} to {scale.max().item():.3g}"
        )
    # the channels of a norm are its weight's entries, those of a linear its rows
    shape = (channels,) + (1,) * (before.weight.dim() - 1)
    before.weight.div_(scale.reshape(shape))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scale)
    for name in seam.after:
        block.get_submodule(name).weight.mul_(scale)  # columns: (out, in) · (in,)


def largest_columns(
    linears: Mapping[str, nn.Module], names: tuple[str, ...]
) -> Float[Tensor, "channels"]:
    """max_i |W_ij| of each channel j, over all the linears that read it."""
    rows = [linears[name].weight.detach().float().abs().amax(0) for name in names]
    return torch.stack(rows).amax(0)
