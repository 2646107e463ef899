"""GPTQ: each weight is rounded, and those not rounded yet make up for the error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, after Optimal Brain Surgeon
(Hassibi & Stork 1992) and OBQ (Frantar, Singh & Alistarh 2022,
https://arxiv.org/abs/2208.11580). A linear should give the outputs that it gave before:

    ‖W X − Ŵ X‖²  =  Σ_rows δ (X Xᵀ) δᵀ        δ = ŵ − w, one row

Its Hessian, the same for every row, is H = 2 X Xᵀ. Optimal Brain Surgeon: when weight q
of a row is set to quant(w_q), the best that all the others can do is

    δ  =  − (w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_:,q        OBQ's equation 2
    and the loss grows by  ½ (w_q − quant(w_q))² / [H⁻¹]_qq

OBQ takes next whichever weight costs least, row by row. GPTQ takes all rows in the same
order, first column to last. Then one H⁻¹ serves all rows, and what is needed of it at
each step is a row of U, the upper Cholesky factor: H⁻¹ = Uᵀ U.

    W     weight, (out, in)            X    inputs, (in, tokens): our gram is X Xᵀ
    Ŵ     the weight that is kept      E    errors (w_q − ŵ_q) / U_qq, (out, block)
    B     columns per block            g    columns that share a scale
    λ     damping, in mean diagonals   perm column that is rounded i-th

Simplified: all linears of a block of the model see the same quantised blocks before
them, but not each other's (the authors' `--true-sequential`); weights stay floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import calibration, walk
from llmlab.compression import quantization_basics as qb
from llmlab.compression.hessian import (
    check,
    inverse_factor,
    output_error,
    without_dead,
)
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear, nearest

__all__ = [
    "FILE",
    "GPTQConfig",
    "Rounded",
    "apply",
    "check",
    "gptq",
    "inverse_factor",
    "nearest",
    "obq",
    "output_error",
    "round_column",
    "rounded_linears",
    "scales_of",
    "surgeon",
    "without",
]

# What scripts/gptq_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parent / "data" / "gptq.csv"


@dataclass(frozen=True)
class GPTQConfig:
    """What is rounded to, and how errors are passed on."""

    grid: QuantConfig = field(default_factory=QuantConfig)
    damping: float = 0.01  # λ: this much of H's mean diagonal is added to the diagonal
    block_size: int = 128  # columns whose errors are passed on together; for speed only
    act_order: bool = False  # the columns with the largest inputs first
    # Scales from the weights as they were, not as they are when their group's turn
    # comes. Under act_order it is always so: then a group's columns come one by one.
    static_groups: bool = False

    def __post_init__(self) -> None:
        if self.grid.per == "tensor":
            raise ValueError(
                "grid.per='tensor' must be 'row' or 'group': rows are rounded apart"
            )
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")

    @property
    def fixed_scales(self) -> bool:
        """Whether all the scales are made before the first weight is rounded."""
        return self.static_groups or self.act_order or self.grid.per == "row"


# The algorithm on one matrix ----------------------------------------------------------


def surgeon(
    w: Float[Tensor, "in"], q: int, value: float, H_inv: Float[Tensor, "in in"]
) -> Float[Tensor, "in"]:
    """Optimal Brain Surgeon: w with weight q set to `value`, the others at their best.

    Those rounded before have zeros in their row and column of H_inv (see `without`).
    """
    error = (w[q] - value) / H_inv[q, q]
    updated = w - error * H_inv[:, q]
    updated[q] = value
    return updated


def without(H_inv: Float[Tensor, "in in"], q: int) -> Float[Tensor, "in in"]:
    """The inverse of H without row and column q, by one step of Gauss elimination.

    OBQ's equation 3. Row and column q are left as zeros.
    """
    smaller = H_inv - torch.outer(H_inv[:, q], H_inv[q]) / H_inv[q, q]
    smaller[q] = 0
    smaller[:, q] = 0
    return smaller


def round_column(
    w: Float[Tensor, "out"], scale: Tensor, zero: Tensor, config: QuantConfig
) -> Float[Tensor, "out"]:
    """quant(w): one weight of each row to its nearest level."""
    return qb.dequantize(
        qb.quantize(w, scale, zero, *config.range), scale, zero
    )  # (out,)


def obq(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    scale: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    config: QuantConfig,
    greedy: bool = True,
) -> Float[Tensor, "out in"]:
    """OBQ, one row after the other: O(out · in³), to learn from and to test against.

    Args:
        scale: of each weight, fixed beforehand, as is `zero`.
        greedy: the weight that costs least comes next; else the first column first.
    """
    W = W.clone()
    for row, s, z in zip(W, scale, zero, strict=True):
        H_inv = torch.linalg.inv(H)
        left = list(range(len(row)))
        while left:
            levels = round_column(row, s, z, config)
            q = left[0]
            if greedy:
                cost = (row - levels).square() / H_inv.diagonal()
                q = min(left, key=cost.tolist().__getitem__)
            row.copy_(surgeon(row, q, levels[q].item(), H_inv))
            H_inv = without(H_inv, q)
            left.remove(q)
    return W


def scales_of(
    W: Float[Tensor, "out columns"], config: QuantConfig
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """s and z of each run of `group_size` columns, or of the whole rows."""
    blocks = qb.to_blocks(W.float(), config)  # (out · groups, size)
    low, high = qb.RANGES[config.calibration](blocks, config)
    scale, zero = qb.scale_and_zero(low, high, config)
    scale = scale.to(W.dtype).reshape(len(W), -1)
    return scale, zero.to(W.dtype).reshape(len(W), -1)


@dataclass
class Rounded:
    """Ŵ, and what stores it: Ŵ[:, j] = scale[:, group[j]] · (codes[:, j] − zero[…])."""

    weight: Float[Tensor, "out in"]
    codes: Float[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    group: Int[Tensor, "in"]


def gptq(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], config: GPTQConfig
) -> Rounded:
    """W on its levels, so that its outputs change little for inputs X with H ~ X Xᵀ.

    A factor in H changes nothing. Columns whose input was always 0 are set to 0.

    Raises:
        ValueError: W or H is not finite, H does not fit W or is all zeros, or the
            group size does not divide the columns.
    """
    check(W, H)
    W, H = without_dead(W, H)  # columns that nothing enters become 0
    grid = config.grid
    columns = W.shape[1]
    size = columns if grid.per == "row" else grid.group_size

    perm = torch.arange(columns)
    if config.act_order:
        perm = H.diagonal().argsort(descending=True, stable=True)
    U = inverse_factor(H[perm][:, perm], config.damping)
    group = (perm // size).tolist()  # of the column that is rounded i-th

    # From here on transposed, so that a column of W lies in one piece: (in, out).
    scale, zero = (t.T.contiguous() for t in scales_of(W, grid))  # (groups, out)
    W = W.T[perm]
    codes = torch.empty_like(W)
    levels = torch.empty_like(W)
    for start in range(0, columns, config.block_size):
        stop = min(start + config.block_size, columns)
        block = W[start:stop].clone()  # (B, out), each error passed on at once
        E = torch.zeros_like(block)
        for i in range(start, stop):
            if not config.fixed_scales and i % size == 0:
                # The group as it is now: the errors of this block are not in W yet.
                now = W[i : i + size] - U[start:stop, i : i + size].T @ E
                s, z = scales_of(now.T, grid)
                scale[group[i]] = s[:, 0]
                zero[group[i]] = z[:, 0]
            s, z = scale[group[i]], zero[group[i]]
            w = block[i - start]
            codes[i] = qb.quantize(w, s, z, *grid.range)
            levels[i] = qb.dequantize(codes[i], s, z)
            E[i - start] = (w - levels[i]) / U[i, i]
            # the step of Optimal Brain Surgeon, for all rows at once
            block[i - start :].addr_(U[i, i:stop], E[i - start], alpha=-1)
        # lazily, for all columns after the block, in one product of matrices
        W[stop:] -= U[start:stop, stop:].T @ E

    back = perm.argsort()
    return Rounded(levels[back].T, codes[back].T, scale.T, zero.T, perm[back] // size)


# The walk over a model ----------------------------------------------------------------


@torch.no_grad()
def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: GPTQConfig,
    skip: tuple[str, ...] = ("lm_head",),
    store: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """The weight of every linear in the blocks becomes its Ŵ, in place, a float still.

    Each block is calibrated on what the quantised blocks before it put out. All are
    computed before the first weight is put in.

    Args:
        batches: token ids to calibrate on, (batch, seq) each.
        skip: last names of linears that are left out.
        store: the linears become `QuantLinear`, which hold codes and scales.
        progress: called with the blocks that are done, and how many there are.
    Raises:
        ValueError: bad text, a weight that cannot be quantised (named), or adapters on
            the model; the model is then as it was.
    """
    found: dict[str, Rounded] = {}

    def run() -> None:
        found.update(rounded_linears(model, batches, config, skip, progress))

    calibration.in_eval_mode(model, run)
    if not store:
        return walk.put_weights(model, {name: r.weight for name, r in found.items()})
    linears = walk.linears(model, skip)
    made = {}
    for name, rounded in found.items():
        made[name] = QuantLinear.of(
            rounded.codes, rounded.scale, rounded.zero, config.grid, linears[name].bias
        )
    return walk.put_modules(model, made)


def rounded_linears(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: GPTQConfig,
    skip: tuple[str, ...] = ("lm_head",),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rounded]:
    """Ŵ and codes of every linear in the blocks, by name; the model is not changed.

    Raises:
        ValueError: as `apply`.
    """
    walk.linears(model, skip)  # refuses what cannot be compressed
    calls = calibration.first_calls(model, batches)
    found: dict[str, Rounded] = {}
    blocks = calibration.blocks(model)
    for i, (prefix, block) in enumerate(blocks.items()):
        block = deepcopy(block)  # its weights become Ŵ, those of the model do not
        linears = qb.linears(block, skip)
        read = partial(calibration.next_calls, block, calls)
        seen = calibration.collect(linears, read)
        for name, linear in linears.items():
            try:
                rounded = gptq(linear.weight, seen[name].gram, config)
            except ValueError as problem:
                raise ValueError(f"{prefix}.{name}: {problem}") from None
            rounded.weight = qb.finite(rounded.weight, linear.weight.dtype)
            linear.weight.copy_(rounded.weight)
            rounded.codes = rounded.codes.to(torch.int16)  # half of the memory
            found[f"{prefix}.{name}"] = rounded
        calls = read()  # what the quantised block puts out
        progress(i + 1, len(blocks))
    return found
