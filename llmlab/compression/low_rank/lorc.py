"""LoRC: a weight in few bits, and a product of low rank that makes up for its error.

ZeroQuant-V2 (Yao et al. 2023, https://arxiv.org/abs/2303.08302) and ZeroQuant-FP (Wu,
Yao & He 2023, https://arxiv.org/abs/2307.09782):

    E  =  W − Ŵ  =  U Σ Vᵀ        A = U_r Σ_r^½,  B = Σ_r^½ V_rᵀ
    y  =  Ŵ x + A (B x)

Ŵ is rounded to integers or small floats; A and B are stored in 8 or 16 bits. With
`aware`, A B is the best for E X in place of E (`svd.truncate_whitened`).

    W     weight, (out, in)         A     (out, r)      r   rank
    Ŵ     W in few bits             B     (r, in)       X   inputs, (in, tokens)
    E     its error, (out, in)

With `grid=None` nothing is rounded and A B stands for W itself: compression by SVD.

Simplified: the inputs for `aware` are those of the float model, in one pass; and codes
are stored packed, but computed with as floats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlab.compression import calibration, walk
from llmlab.compression import quantization_basics as qb
from llmlab.compression.low_rank import block_formats, float_formats, svd
from llmlab.compression.low_rank.block_formats import BlockFormat, Blocks
from llmlab.compression.low_rank.float_formats import E4M3, FloatFormat
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear

# What scripts/low_rank_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parents[1] / "data" / "low_rank.csv"
Grid = QuantConfig | BlockFormat
# Factors in 8 bits: a scale for each column of A, and for each row of B.
FACTOR_GRID = QuantConfig(8, per="row")


@dataclass(frozen=True)
class LowRankConfig:
    """What W is rounded to, and what is added to it."""

    grid: Grid | None = field(default_factory=QuantConfig)
    rank: int = 8  # 0: nothing is added
    factor_bits: int = 8
    aware: bool = False  # whether A B is the best for the outputs
    damping: float = 0.01  # of X Xᵀ, read when `aware`
    # With grid=None: the rank is the largest that fits into so many bits per weight.
    bits: float | None = None
    fp8_inputs: bool = False  # inputs in E4M3, with a scale per token (W4A8)

    def __post_init__(self) -> None:
        if self.factor_bits not in (8, 16):
            raise ValueError(f"factor_bits={self.factor_bits} must be 8 or 16")
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be 0 or more")
        if self.grid is None and self.bits is None and self.rank == 0:
            raise ValueError("rank=0 with grid=None leaves nothing of the weight")
        if self.grid is not None and self.bits is not None:
            raise ValueError(f"bits={self.bits} is read with grid=None alone")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be 0 or more")

    def rank_of(self, out: int, columns: int) -> int:
        """r for a weight of this shape."""
        if self.bits is None:
            return self.rank
        return svd.rank_within(self.bits, out, columns, self.factor_bits)


# The algorithm on one matrix ----------------------------------------------------------


@dataclass
class LowRank:
    """Ŵ as it is stored, and the factors; each is None where there is none."""

    base: nn.Module | None  # a QuantLinear or a BlockLinear
    factors: tuple[Tensor, Tensor] | None  # A (out, r) and B (r, in)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ + A B."""
        if self.factors is None:
            return self.base.weight
        A, B = self.factors
        return A @ B if self.base is None else self.base.weight + A @ B


def lorc(
    W: Float[Tensor, "out in"],
    config: LowRankConfig,
    gram: Float[Tensor, "in in"] | None = None,
) -> LowRank:
    """Round W, and find the factors for what it lost.

    Args:
        gram: X Xᵀ, needed when `config.aware`.
    Raises:
        ValueError: `gram` is missing, the format does not fit W, W has no such rank, or
            as `svd.truncate_whitened`.
    """
    if config.aware and gram is None:
        raise ValueError("gram=None: with aware=True it must be X Xᵀ of the inputs")
    W = W.detach().float()
    base = None if config.grid is None else rounded(W, config.grid)
    rank = config.rank_of(*W.shape)
    if rank == 0:
        return LowRank(base, None)
    E = W if base is None else W - base.weight
    if not E.any():  # nothing was lost: SVD of zeros is zeros
        factors = E.new_zeros(len(W), rank), E.new_zeros(rank, W.shape[1])
    elif config.aware:
        factors = svd.truncate_whitened(E, gram, rank, config.damping)
    else:
        factors = svd.truncate(E, rank)
    return LowRank(base, stored_factors(*factors, config.factor_bits))


def rounded(W: Float[Tensor, "out in"], grid: Grid) -> nn.Module:
    """Ŵ as it is stored: a linear without its bias."""
    if isinstance(grid, BlockFormat):
        return BlockLinear(block_formats.encode(W, grid), grid)
    return QuantLinear.of(*qb.encode(W, grid), grid)


def stored_factors(
    A: Float[Tensor, "out r"], B: Float[Tensor, "r in"], factor_bits: int
) -> tuple[Tensor, Tensor]:
    """A and B on the values that can be stored."""
    if factor_bits == 16:
        return tuple(qb.finite(t, torch.float16).float() for t in (A, B))
    left = qb.decode(*qb.encode(A.T, FACTOR_GRID), FACTOR_GRID).T
    return left, qb.decode(*qb.encode(B, FACTOR_GRID), FACTOR_GRID)


def bits_per_weight(config: LowRankConfig, out: int, columns: int) -> float:
    """Stored bits per weight, to the last: codes, scales, and both factors."""
    weights = out * columns
    rank = config.rank_of(out, columns)
    bits = config.factor_bits * svd.parameters(out, columns, rank) / weights
    bits += rank * svd.factor_overhead(config.factor_bits) / weights
    if isinstance(config.grid, BlockFormat):
        bits += block_formats.bits_per_weight(config.grid, weights)
    elif config.grid is not None:
        sizes = {"tensor": weights, "row": columns, "group": config.grid.group_size}
        bits += qb.bits_per_weight(config.grid, sizes[config.grid.per])
    return bits


# Storage ------------------------------------------------------------------------------


class BlockLinear(nn.Module):
    """A weight in blocks of small floats, packed."""

    is_compressed = True

    def __init__(self, stored: Blocks, kind: BlockFormat) -> None:
        super().__init__()
        self.kind = kind
        codes = stored.codes
        if kind.element.bits == 4:
            codes = block_formats.pack_nibbles(codes)
        self.register_buffer("packed", codes)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("global_scale", stored.global_scale)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded weight."""
        codes = self.packed
        if self.kind.element.bits == 4:
            codes = block_formats.unpack_nibbles(codes)
        stored = Blocks(codes, self.scale, self.global_scale)
        return block_formats.decode(stored, self.kind)


class LowRankLinear(nn.Module):
    """y = Ŵ x + A (B x) + bias, from what is stored."""

    is_compressed = True

    def __init__(
        self, found: LowRank, config: LowRankConfig, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.base = found.base
        self.bias = bias
        self.register_buffers(found.factors)

    def register_buffers(self, factors: tuple[Tensor, Tensor] | None) -> None:
        """A transposed, (r, out), so that its scales are per row, as those of B."""
        for name in ("A", "A_scale", "B", "B_scale"):
            self.register_buffer(name, None)
        if factors is None:
            return
        for name, factor in zip("AB", (factors[0].T, factors[1]), strict=True):
            if self.config.factor_bits == 16:
                setattr(self, name, qb.finite(factor, torch.float16).contiguous())
                continue
            codes, scale, _ = qb.encode(factor, FACTOR_GRID)
            setattr(self, name, codes.to(torch.int8).contiguous())
            setattr(self, f"{name}_scale", scale.half())

    def factor(self, name: str) -> Float[Tensor, "r n"]:
        """Aᵀ or B, in float32."""
        values = getattr(self, name).float()
        scale = getattr(self, f"{name}_scale")
        return values if scale is None else values * scale.float()

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ + A B."""
        if self.A is None:
            return self.base.weight
        low_rank = self.factor("A").T @ self.factor("B")
        return low_rank if self.base is None else self.base.weight + low_rank

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """In the dtype of x."""
        if self.config.fp8_inputs:
            x = round_tokens(x, E4M3)
        out = 0.0
        if self.base is not None:
            out = F.linear(x, qb.finite(self.base.weight, x.dtype))
        if self.A is not None:
            inner = F.linear(x, self.factor("B").to(x.dtype))  # (…, r)
            out = out + F.linear(inner, self.factor("A").T.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(x.dtype)


def round_tokens(x: Float[Tensor, "... in"], kind: FloatFormat) -> Tensor:
    """Each token's inputs on floats of this format times the token's scale."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / kind.top  # (…, 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return (float_formats.round_to(wide / scale, kind) * scale).to(x.dtype)


# The walk over a model ----------------------------------------------------------------


@torch.no_grad()
def apply(
    model: nn.Module,
    config: LowRankConfig,
    batches: Iterable[Int[Tensor, "batch seq"]] | None = None,
    skip: tuple[str, ...] = ("lm_head",),
    store: bool = False,
) -> nn.Module:
    """The weight of every linear becomes Ŵ + A B, in place, a float still.

    All are computed before the first is put in.

    Args:
        batches: token ids to read, (batch, seq) each, when `config.aware`.
        skip: last names of linears that are left out.
        store: the linears become `LowRankLinear`, which hold codes and factors.
    Raises:
        ValueError: text is missing or bad, a weight cannot be compressed so (named), or
            inputs shall be rounded and the linears stay floats; the model is then as it
            was.
    """
    if config.fp8_inputs and not store:
        raise ValueError("fp8_inputs=True needs store=True: a plain linear rounds none")
    linears = walk.linears(model, skip)
    grams = {}
    if config.aware:
        if batches is None:
            raise ValueError("batches=None: with aware=True the model must read text")
        seen = calibration.inputs(model, linears, batches)
        grams = {name: statistics.gram for name, statistics in seen.items()}
    found = {}
    for name, linear in linears.items():
        try:
            found[name] = lorc(linear.weight, config, grams.get(name))
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    if not store:
        weights = {
            name: qb.finite(result.weight, linears[name].weight.dtype)
            for name, result in found.items()
        }
        return walk.put_weights(model, weights)
    made = {}
    for name, result in found.items():
        made[name] = LowRankLinear(result, config, linears[name].bias)
    return walk.put_modules(model, made)


def stored(model: nn.Module) -> dict[str, LowRankLinear]:
    """The linears that `apply` made, by name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, LowRankLinear)}


# Files --------------------------------------------------------------------------------


def save(model: nn.Module, file: Path | str) -> None:
    """What the compressed linears store, into one safetensors file.

    The rest of the model is not in it.

    Raises:
        ValueError: there is no such linear.
    """
    linears = stored(model)
    if not linears:
        raise ValueError(
            f"model={type(model).__name__} has no LowRankLinear: apply with store=True"
        )
    tensors = {}
    for name, linear in linears.items():
        for key, value in linear.state_dict().items():
            if key != "bias":  # belongs to the model
                tensors[f"{name}.{key}"] = value.contiguous()
    config = next(iter(linears.values())).config
    save_file(tensors, str(file), {"config": json.dumps(as_data(config))})


@torch.no_grad()
def load(model: nn.Module, file: Path | str) -> nn.Module:
    """Put the linears of a file into the float model, in place.

    Raises:
        ValueError: the file is not of this model: a linear is missing, or has another
            shape; the model is then as it was.
    """
    with safe_open(str(file), "pt") as opened:
        config = from_data(json.loads(opened.metadata()["config"]))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    linears = {name: m for name, m in model.named_modules() if is_float_linear(m)}
    by_linear: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if name.endswith(".base"):
            name, part = name.removesuffix(".base"), f"base.{part}"
        by_linear.setdefault(name, {})[part] = value
    made = {}
    for name, parts in by_linear.items():
        if name not in linears:
            raise ValueError(f"file={str(file)!r} holds {name}, no linear of the model")
        made[name] = filled(linears[name], parts, config, name)
    return walk.put_modules(model, made)


def filled(
    linear: nn.Linear, parts: dict[str, Tensor], config: LowRankConfig, name: str
) -> LowRankLinear:
    """The compressed linear that these tensors of a file are."""
    blank = LowRankLinear(blank_of(linear.weight, config), config, linear.bias)
    expected = {key: v for key, v in blank.state_dict().items() if key != "bias"}
    if expected.keys() != parts.keys():
        raise ValueError(
            f"{name} has {sorted(parts)} in the file, not {list(expected)}"
        )
    for part, value in parts.items():
        if value.shape != expected[part].shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(value.shape)} in the file, not"
                f" {tuple(expected[part].shape)}"
            )
    blank.load_state_dict(parts, strict=False)
    return blank


def is_float_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear."""
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()


def blank_of(W: Tensor, config: LowRankConfig) -> LowRank:
    """Of the right shapes, to be filled from a file."""
    zeros = torch.zeros(W.shape)
    base = None if config.grid is None else rounded(zeros, config.grid)
    rank = config.rank_of(*W.shape)
    if rank == 0:
        return LowRank(base, None)
    return LowRank(base, (zeros.new_zeros(len(W), rank), zeros[:rank] * 0))


def as_data(config: LowRankConfig) -> dict:
    """The settings as json holds them."""
    data = asdict(config)
    if isinstance(config.grid, QuantConfig):
        dtype = str(config.grid.scale_dtype).removeprefix("torch.")
        data["grid"]["scale_dtype"] = dtype
    return data


def from_data(data: dict) -> LowRankConfig:
    """The settings that `as_data` wrote."""
    grid = data["grid"]
    if grid is not None and "element" in grid:
        grid = BlockFormat(**grid | {"element": FloatFormat(**grid["element"])})
    elif grid is not None:
        dtype = getattr(torch, grid["scale_dtype"])
        grid = QuantConfig(**grid | {"scale_dtype": dtype})
    return LowRankConfig(**data | {"grid": grid})
