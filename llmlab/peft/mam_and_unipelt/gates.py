"""Gates that the input opens, and what they stand before: a LoRA change, a prefix, a
bottleneck.

Mao et al. 2022, https://arxiv.org/abs/2110.07577, section 3.1:    g = mean over tokens of σ(w · x + b)

    x  (B, T, d)  what the gated method reads      g  (B, 1, 1)  one number for each
                                                      sequence

A gate remembers its value. `Call` tells it which tokens are padding, and when a cache
holds the prompt already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.peft import walk
from llmlab.peft.lora import LoRALinear
from llmlab.peft.prompt_and_prefix_tuning import PrefixCache


def pooled_gate(
    x: Float[Tensor, "B T d"],
    w: Float[Tensor, "1 d"],
    b: Float[Tensor, "1"],
    mask: Int[Tensor, "B T"] | None = None,
    tokens: int | None = None,
) -> Float[Tensor, "B 1 1"]:
    """σ(w · x + b), averaged over the real tokens, or over the first `tokens` of
    these.
    """
    g = torch.sigmoid(x @ w.T + b)  # (B, T, 1)
    real = torch.ones_like(g) if mask is None else mask[..., None].to(g.dtype)
    if tokens is not None:
        real = real * (real.cumsum(1) <= tokens)
    return (g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


class Call:
    """What the gates must know of the forward pass under way."""

    mask: Tensor | None = None  # (B, T), of the new tokens
    # decoding after a prompt: the gates stay as the prompt set them
    continues: bool = False


class Gate(nn.Module):
    """One gate. It remembers its last value: to decode, and to be looked at."""

    def __init__(
        self, d: int, like: Tensor, call: Call, tokens: int | None, generator
    ) -> None:
        super().__init__()
        kind = {
            "device": like.device,
            "dtype": torch.promote_types(like.dtype, torch.float32),
        }
        self.weight = nn.Parameter(
            torch.randn(1, d, generator=generator).to(**kind) * 0.02
        )
        self.bias = nn.Parameter(torch.zeros(1, **kind))
        self.call, self.tokens, self.value = call, tokens, None

    def __getstate__(self) -> dict:
        """What a copy or a pickle gets: all but the last value, which hangs on its
        forward pass's graph.
        """
        return self.__dict__ | {"value": None}

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B 1 1"]:
        """g of each row."""
        if not (
            self.call.continues and self.value is not None and len(self.value) == len(x)
        ):
            self.value = pooled_gate(
                x.to(self.weight.dtype),
                self.weight,
                self.bias,
                self.call.mask,
                self.tokens,
            )
        return self.value


class GatedLoRALinear(LoRALinear):
    """A LoRA layer, each of whose changes has a gate. It cannot be merged: the gate
    depends on the input.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.gates = nn.ModuleDict()

    def change(self, x: Tensor, adapter: str) -> Tensor:
        """g_L (α/r) B A x."""
        return super().change(x, adapter) * self.gates[adapter](x)

    def merge(self) -> None:
        """Raises: ValueError: always."""
        raise ValueError(
            "merge: a gated LoRA has no merged weight, since its gate depends on the"
            " input"
        )

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters and their gates."""
        super().discard(adapters)
        for adapter in [a for a in adapters if a in self.gates]:
            del self.gates[adapter]


class PrefixGates(walk.Wrapper):
    """The gates of one block's prefixes, by adapter. A pre-hook of attention scales
    what the cache holds.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(nn.Identity())
        self.layer, self.gates, self.active = layer, nn.ModuleDict(), None

    def before(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Scale the prefix in the cache, once: on the pass that puts it there."""
        if self.active is None:
            return
        gate = self.gates[self.active]
        x, cache = (
            (args[0], args[3])
            if args
            else (kwargs["hidden_states"], kwargs["past_key_values"])
        )
        g = gate(x)[..., None]  # (B, 1, 1, 1)
        if not gate.call.continues:
            scale_prefix(cache, self.layer, g)


def scale_prefix(cache: object, layer: int, g: Float[Tensor, "B 1 1 1"]) -> None:
    """Multiply by g the keys and values of one layer of a cache that holds nothing but
    the prefix.
    """
    if isinstance(cache, PrefixCache):
        cache.pairs[layer] = tuple(g.to(t.dtype) * t for t in cache.pairs[layer])
    elif hasattr(cache, "layers"):  # of transformers
        held = cache.layers[layer]
        held.keys, held.values = (
            g.to(held.keys.dtype) * held.keys,
            g.to(held.values.dtype) * held.values,
        )
    else:
        for stored in (cache.keys[layer], cache.values[layer]):
            stored[:, :, : cache.lengths[layer]] *= g.to(stored.dtype)
