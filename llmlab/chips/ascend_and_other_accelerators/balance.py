"""Cube or vector: which unit of an Ascend core a layer of a Llama waits for.

A layer is products, which the cube computes, and everything else, which the vector unit
computes in instructions on 128 numbers. `INSTRUCTIONS` is how this lesson writes each
of them; a good kernel saves some, an exponential in hardware may take longer.

    T    tokens that are computed      S    keys that each of them sees
    H    query heads                   D    width of a head
    d    width of the model            f    width of the feed-forward network

    attention     cube 2 T S D H / 4096 cycles, vector 5 T S H / 128: with D = 64 the
                  vector unit needs longer, with D = 128 the cube

Simplified: all T tokens see all S keys (a causal kernel skips half of both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmlab.chips.ascend_and_other_accelerators.core import Core, cube_cycles
from llmlab.models.llama import LlamaConfig

# what the vector unit does with each number
INSTRUCTIONS = {
    "norm": ("square", "sum", "times 1/rms", "times weight"),
    "rope": ("rotate", "times cos", "times sin", "add"),
    "softmax": ("max", "minus max", "exp", "sum", "divide"),
    "swiglu": ("negate", "exp", "plus 1", "divide", "times up"),
    "gelu": ("cube", "times", "add", "times", "tanh", "plus 1", "times x", "halve"),
    "residual": ("add",),
}


@dataclass(frozen=True)
class Part:
    """Cycles of one part of a layer, on one core."""

    name: str
    cube: float
    vector: float

    @property
    def bound(self) -> str:
        """Which unit takes longer, the other one working at the same time."""
        return "cube" if self.cube >= self.vector else "vector"


def vector_cycles(core: Core, what: str, numbers: int) -> float:
    """Cycles of the vector units of one core for so many numbers.

    Raises:
        ValueError: `what` is not one of `INSTRUCTIONS`.
    """
    if what not in INSTRUCTIONS:
        raise ValueError(f"what={what!r} must be one of {', '.join(INSTRUCTIONS)}")
    rounds = math.ceil(numbers / core.lanes)
    return len(INSTRUCTIONS[what]) * rounds / core.vectors


def layer(core: Core, config: LlamaConfig, tokens: int, keys: int) -> list[Part]:
    """The parts of one layer, computed on one core.

    Raises:
        ValueError: tokens or keys are not at least 1.
    """
    for name, value in (("tokens", tokens), ("keys", keys)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    d, f = config.hidden_size, config.intermediate_size
    heads, width = config.num_attention_heads, config.head_dim
    q, kv = heads * width, config.num_key_value_heads * width

    def vector(what: str, numbers: int) -> float:
        return vector_cycles(core, what, numbers)

    projections = cube_cycles(tokens, d, q + 2 * kv) + cube_cycles(tokens, q, d)
    scores = cube_cycles(tokens, width, keys) + cube_cycles(tokens, keys, width)
    feed_forward = 2 * cube_cycles(tokens, d, f) + cube_cycles(tokens, f, d)
    return [
        Part("norms", 0, 2 * vector("norm", tokens * d)),
        Part("q, k, v, o", projections, vector("rope", tokens * (q + kv))),
        Part("attention", heads * scores, vector("softmax", tokens * keys * heads)),
        Part("feed-forward", feed_forward, vector("swiglu", tokens * f)),
        Part("residuals", 0, 2 * vector("residual", tokens * d)),
    ]
