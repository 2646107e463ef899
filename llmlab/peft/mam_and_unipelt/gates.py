"""Gates that the input opens, before a LoRA change, a prefix or a bottleneck.

Mao et al. 2022, https://arxiv.org/abs/2110.07577, section 3.1:

    g = mean over tokens of σ(w · x + b)

    x  (B, T, d)  what the gated method reads
    w  (1, d), b (1)  trained
    g  (B, 1, 1)  one number for each sequence

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
    """σ(w · x + b), averaged over the real tokens, or over the first `tokens` of them.

    Args:
        mask: 1 for a real token, 0 for padding; None: all are real.
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
        dtype = torch.promote_types(like.dtype, torch.float32)
        weight = torch.randn(1, d, generator=generator).to(like.device, dtype) * 0.02
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(1, device=like.device, dtype=dtype))
        self.call = call
        self.tokens = tokens
        self.value: Tensor | None = None

    def __getstate__(self) -> dict:
        """What a copy or a pickle gets: all but the last value.

        That value belongs to the graph of its forward pass, which cannot be copied.
        """
        return self.__dict__ | {"value": None}

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B 1 1"]:
        """g of each row."""
        fits = self.value is not None and len(self.value) == len(x)
        if self.call.continues and fits:
            return self.value  # decoding: the value that the prompt gave
        x = x.to(self.weight.dtype)
        self.value = pooled_gate(x, self.weight, self.bias, self.call.mask, self.tokens)
        return self.value


class GatedLoRALinear(LoRALinear):
    """A LoRA layer with a gate for each change.

    It cannot be merged, since the gate depends on the input.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.gates = nn.ModuleDict()

    def change(self, x: Tensor, adapter: str) -> Tensor:
        """g_L (α/r) B A x."""
        return super().change(x, adapter) * self.gates[adapter](x)

    @property
    def weight(self) -> Tensor:
        """Raises: ValueError: there is none while an adapter is active."""
        if self.active or self.rows is not None:
            raise ValueError(
                "a gated LoRA has no weight that could be read, since its gate depends"
                " on the input"
            )
        return walk.weight_of(self.base)

    def merge(self) -> None:
        """Raises: ValueError: always."""
        raise ValueError(
            "merge: a gated LoRA has no merged weight, since its gate depends on the"
            " input"
        )

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters and their gates."""
        super().discard(adapters)
        for adapter in adapters:
            if adapter in self.gates:
                del self.gates[adapter]


class PrefixGates(walk.Wrapper):
    """The gates of one block's prefixes, by adapter.

    A pre-hook of attention scales what the cache holds.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(nn.Identity())
        self.layer = layer
        self.gates = nn.ModuleDict()
        self.active: str | None = None

    def before(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Scale the prefix in the cache, once: on the pass that puts it there."""
        if self.active is None:
            return
        gate = self.gates[self.active]
        if args:  # our attention: (x, rope, mask, cache, …)
            x = args[0]
            cache = args[3]
        else:  # that of transformers
            x = kwargs["hidden_states"]
            cache = kwargs["past_key_values"]
        g = gate(x)[..., None]  # (B, 1, 1) → (B, 1, 1, 1), for (B, K, p, D)
        if not gate.call.continues:
            scale_prefix(cache, self.layer, g)


def scale_prefix(cache: object, layer: int, g: Float[Tensor, "B 1 1 1"]) -> None:
    """Multiply by g one layer's part of a cache that holds only the prefix."""
    if isinstance(cache, PrefixCache):
        k, v = cache.pairs[layer]
        cache.pairs[layer] = (g.to(k.dtype) * k, g.to(v.dtype) * v)
    elif hasattr(cache, "layers"):  # of transformers
        stored = cache.layers[layer]
        stored.keys = g.to(stored.keys.dtype) * stored.keys
        stored.values = g.to(stored.values.dtype) * stored.values
    else:  # ours with room for more: in place
        for stored in (cache.keys[layer], cache.values[layer]):
            stored[:, :, : cache.lengths[layer]] *= g.to(stored.dtype)
