"""The two functions that this part takes from Python to machine code.

    mlp             GELU(x w + b): a product, and what is done with each of its numbers
    attention_row   softmax(q kᵀ / √D) v: one query over all keys

Both are plain torch, so every tool of the part can read them.

    T  rows          d  columns in        f  columns out
    S  keys          D  width of a head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def mlp(
    x: Float[Tensor, "T d"], w: Float[Tensor, "d f"], b: Float[Tensor, "f"]
) -> Float[Tensor, "T f"]:
    """GELU(x w + b), the GELU in its tanh form."""
    return F.gelu(x @ w + b, approximate="tanh")


def attention_row(
    q: Float[Tensor, "1 D"], k: Float[Tensor, "S D"], v: Float[Tensor, "S D"]
) -> Float[Tensor, "1 D"]:
    """softmax(q kᵀ / √D) v."""
    scores = q @ k.T / q.shape[-1] ** 0.5  # (1, S)
    return torch.softmax(scores, dim=-1) @ v


# by the names that `example_inputs` knows
FUNCTIONS = {"mlp": mlp, "attention_row": attention_row}


def example_inputs(
    function: str, seed: int = 0, T: int = 128, d: int = 256, f: int = 512
) -> tuple[Tensor, ...]:
    """Inputs of "mlp" or of "attention_row", in fp32, always the same.

    For attention, T is the number of keys and d the width of the head.

    Raises:
        ValueError: another name.
    """
    random = torch.Generator().manual_seed(seed)
    if function == "mlp":
        shapes = [(T, d), (d, f), (f,)]
    elif function == "attention_row":
        shapes = [(1, d), (T, d), (T, d)]
    else:
        raise ValueError(f"function={function!r} must be 'mlp' or 'attention_row'")
    return tuple(torch.randn(shape, generator=random) for shape in shapes)
