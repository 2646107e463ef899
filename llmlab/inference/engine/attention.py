"""Paged attention in C where it can be compiled, with the lesson's own as fall-back."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.inference import paged_attention as paged
from llmlab.models.c_library import LONG, POINTER, NoCompiler, build

SOURCE = Path(__file__).parent / "attention.c"
ARGUMENTS = {"paged_attention": [POINTER] * 6 + [LONG] * 6}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler."""
    try:
        return build(SOURCE, ARGUMENTS)
    except NoCompiler:
        return None


def paged_attention(
    q: Float[Tensor, "R H D"],
    keys: Float[Tensor, "N b K D"],
    values: Float[Tensor, "N b K D"],
    tables: Int[Tensor, "R M"],
    lengths: Int[Tensor, "R"],
) -> Float[Tensor, "R H D"]:
    """As `llmlab.inference.paged_attention.paged_attention`; the blocks are read where
    they are.

    Raises:
        ValueError: heads that do not divide, lengths that do not fit the tables, or a
            block that there is not.
    """
    paged.check_shapes(q, keys, tables, lengths)
    if int(tables.min()) < 0 or int(tables.max()) >= len(keys):
        raise ValueError(f"tables must name blocks from 0 to {len(keys) - 1}")
    return unchecked(q, keys, values, tables, lengths)


def unchecked(
    q: Float[Tensor, "R H D"],
    keys: Float[Tensor, "N b K D"],
    values: Float[Tensor, "N b K D"],
    tables: Int[Tensor, "R M"],
    lengths: Int[Tensor, "R"],
) -> Float[Tensor, "R H D"]:
    """The same for tables and lengths that are known to be right.

    Numbers other than float32 on the CPU, and machines without a compiler, take the
    lesson's function.
    """
    all_float = q.dtype == keys.dtype == values.dtype == torch.float32
    if not all_float or q.device.type != "cpu" or library() is None:
        return paged.paged_attention(q, keys, values, tables, lengths)
    R, H, D = q.shape
    b, K = keys.shape[1:3]
    # kept until the function has returned, where a copy was made
    arrays = [each.contiguous() for each in (q, keys, values, tables, lengths)]
    out = torch.empty_like(arrays[0])
    pointers = [each.data_ptr() for each in (*arrays, out)]
    library().paged_attention(*pointers, R, H, K, D, b, tables.shape[1])
    return out
