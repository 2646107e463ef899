"""LLM.int8(): products of 8-bit integers, but for a few columns that stay in 16 bits.

Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, sections 2 and 3, equation 8:

    X W ≈ Σ_{h ∈ O} X^h W^h  +  1 / (c_x ⊗ c_w) · Σ_{h ∉ O} X^h_i8 W^h_i8
          16 bits               int8 × int8 → int32, then scaled

    X     inputs (s, h): s tokens, h features
    W     weight. The paper writes (h, o); here (o, h), as torch stores it: y = X Wᵀ
    O     outlier features: columns of X with |x| ≥ α in at least one token
    α     threshold, 6.0
    a_x   largest |x| of each row of X, the columns in O left out (s,); c_x = 127 / a_x
    a_w   largest |w| of each row of W (o,); c_w = 127 / a_w
    i8    codes −127 … 127: round(127 · x / a), ties to even

*Vector-wise*: each inner product has two scales of its own, one of a token and one of
an output. The decomposition is the sum over O.

O is only known once X is there. So W is stored as codes alone, 8 bits each, and the
columns in O are decoded when they are needed, as bitsandbytes does. (The paper's
equation has them in 16 bits from the start.) What they lose is the rounding of W.

Differs from bitsandbytes 0.50: a_x leaves out whole columns, as in the equation;
bitsandbytes leaves out the outliers alone, so that a 5.9 in an outlier column still
sets the scale of its row. And inputs are not cast to float16 first, where 65,520 is ∞.

Simplified: symmetric codes only (the paper also tries a zero point); no training with
int8 gradients. The gradient of x is that of the decoded weight; the codes are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from llmlab.compression import walk
from llmlab.compression.integer_matmul import multiply_codes

TOP = 127  # the largest code; −128 is not used


SCALES = ("token", "tensor")


@dataclass(frozen=True)
class Int8Config:
    """How a linear is computed.

    The defaults are LLM.int8(). `threshold=None` is plain vector-wise quantization: no
    column stays in 16 bits. The other two settings are there to measure what each half
    of the method is worth.
    """

    threshold: float | None = 6.0  # α
    # That many columns with the largest |x| stay in 16 bits as well, whatever their α.
    columns: int = 0
    # One a_x for each token, or one for all of X: "absmax" in the paper's table 1.
    scales: str = "token"

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ValueError(f"scales={self.scales!r} must be one of {SCALES}")
        if not isinstance(self.columns, int) or self.columns < 0:
            raise ValueError(
                f"columns={self.columns!r} must be a whole number, 0 or more"
            )
        alpha = self.threshold
        # a NaN fails the comparison, too
        if alpha is not None and not alpha > 0:
            raise ValueError(
                f"threshold={alpha!r} must be above 0: 0 would keep every column in 16"
                " bits. For none, say None (bitsandbytes says 0.0)"
            )


# One matrix product -------------------------------------------------------------------


def quantize_rows(
    x: Float[Tensor, "rows n"], scales: str = "token"
) -> tuple[Tensor, Tensor]:
    """Codes −127 … 127 of each row, int8, and a, the largest |x| of each row, float32.

    A row of zeros has a = 0 and codes 0; one below 1e-36 has codes 0, too. With
    `scales="tensor"` all rows get the largest a of them.
    """
    x = x.float()
    absmax = x.abs().amax(-1)  # (rows,)
    if scales == "tensor":
        absmax = absmax.amax().expand(len(absmax))
    # The paper's c; 0 for a row of zeros, and for one so small that 127 / a is ∞.
    c = torch.where(absmax > 1e-36, TOP / absmax, 0.0)
    codes = torch.round(x * c[:, None])
    return codes.to(torch.int8), absmax


def dequantize_rows(
    codes: Int8[Tensor, "rows n"], absmax: Float[Tensor, "rows"]
) -> Float[Tensor, "rows n"]:
    """codes · a / 127, in float32."""
    return codes.float() * (absmax / TOP)[:, None]


def outlier_columns(
    x: Float[Tensor, "tokens features"], config: Int8Config
) -> Bool[Tensor, "features"]:
    """O as a mask: True where any token has |x| ≥ α in that column."""
    largest = x.abs().amax(0)  # (features,)
    if config.threshold is None:
        out = torch.zeros_like(largest, dtype=torch.bool)
    else:
        out = largest >= config.threshold
    if config.columns:
        count = min(config.columns, len(largest))
        out[largest.topk(count).indices] = True
    return out


def int8_matmul(
    x: Float[Tensor, "tokens features"],
    codes: Int8[Tensor, "out features"],
    absmax: Float[Tensor, "out"],
    config: Int8Config,
) -> Float[Tensor, "tokens out"]:
    """x Wᵀ, W stored as `codes` and `absmax`, in the dtype of x: equation 8."""
    out = outlier_columns(x, config)
    # The regular part. Columns in O count as zeros: for the scales, and in the product.
    x_codes, x_absmax = quantize_rows(x.masked_fill(out, 0), config.scales)
    sums = multiply_codes(x_codes, codes).float()  # (tokens, out)
    # a_x a_w could be more than a float32 holds where their quotient is not
    y = sums * (x_absmax / TOP)[:, None] * (absmax / TOP)
    y = y.to(x.dtype)
    if out.any():
        # The outliers: a thin product in the dtype of x.
        few = dequantize_rows(codes[:, out], absmax)  # (out, |O|)
        y = y + x[:, out] @ few.to(x.dtype).t()
    return y


class _FrozenProduct(torch.autograd.Function):
    """Forward `int8_matmul`. Backward: the gradient of x through the decoded weight."""

    @staticmethod
    def forward(ctx, x, codes, absmax, config):
        ctx.save_for_backward(codes, absmax)
        return int8_matmul(x, codes, absmax, config)

    @staticmethod
    def backward(ctx, grad):
        codes, absmax = ctx.saved_tensors
        weight = dequantize_rows(codes, absmax).to(grad.dtype)
        return grad @ weight, None, None, None


class Int8Linear(nn.Module):
    """A linear that stores 8 bits per weight and multiplies integers.

    Training and evaluation compute the same. (Linear8bitLt of bitsandbytes multiplies
    floats while it is in training mode, and looks for no outliers then.)
    """

    is_compressed = True

    def __init__(self, linear: nn.Linear, config: Int8Config) -> None:
        super().__init__()
        with torch.no_grad():
            codes, absmax = quantize_rows(linear.weight)
        self.config = config
        self.register_buffer("codes", codes)  # (out, in), int8
        self.register_buffer("absmax", absmax)  # (out,), float32
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded weight, in the dtype that it came in."""
        return dequantize_rows(self.codes, self.absmax).to(self.dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x Wᵀ + b. All tokens of x, whatever its leading dimensions, share one O."""
        tokens = x.reshape(-1, x.shape[-1])  # (…, in) -> (tokens, in)
        if len(tokens) == 0:
            return x.new_zeros(*x.shape[:-1], len(self.codes))
        y = _FrozenProduct.apply(tokens, self.codes, self.absmax, self.config)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        rows, columns = self.codes.shape
        return f"in={columns}, out={rows}, {self.config}"


# The walk over a model ----------------------------------------------------------------


def apply(
    model: nn.Module,
    config: Int8Config | None = None,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Every linear becomes an `Int8Linear`, in place.

    All are made before the first is put in, so that a model which cannot be quantised
    stays as it was.

    Raises:
        ValueError: as `walk.linears`.
    """
    config = config or Int8Config()
    made = {}
    for name, linear in walk.linears(model, skip).items():
        made[name] = Int8Linear(linear, config)
    return walk.put_modules(model, made)


def configure(model: nn.Module, config: Int8Config) -> nn.Module:
    """Another config for every `Int8Linear` of a model; the codes stay as they are."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.config = config
    return model


# Looking at outliers ------------------------------------------------------------------


@contextmanager
def inputs_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside the `with`, what enters each layer is collected, (tokens, features).

    >>> layers = {"up": nn.Linear(4, 2)}
    >>> with inputs_of(layers) as seen:
    ...     _ = layers["up"](torch.zeros(3, 4))
    >>> seen["up"].shape
    torch.Size([3, 4])
    """
    batches: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen: dict[str, Tensor] = {}

    def collect(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            batches[name].append(args[0].detach().flatten(0, -2))

        return hook

    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(collect(name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    for name, parts in batches.items():
        if parts:
            seen[name] = torch.cat(parts)


@dataclass(frozen=True)
class OutlierFeature:
    """A dimension of the hidden state that is an outlier again and again."""

    dimension: int
    layers: float  # share of the layers where it reaches α for some token
    tokens: float  # share of all hidden vectors where it reaches α
    one_sided: bool  # whether those values have one sign


def outlier_features(
    hidden: list[Float[Tensor, "tokens features"]],
    threshold: float = 6.0,
    min_layers: float = 0.25,
    min_tokens: float = 0.06,
) -> list[OutlierFeature]:
    """The outlier features of section 4.1, from the hidden states of all layers.

    A dimension counts that reaches α in at least a quarter of the layers, and in at
    least 6% of the hidden vectors.

    Args:
        hidden: for each layer what enters its attention and its feed-forward network,
            one below the other.
    Raises:
        ValueError: no hidden states, or hidden states of several shapes.
    """
    if len({h.shape for h in hidden}) != 1:
        raise ValueError(
            f"hidden={[tuple(h.shape) for h in hidden]} must be one or more tensors of"
            " one shape"
        )
    states = torch.stack(hidden)  # (layers, tokens, features)
    large = states.abs() >= threshold
    layers = large.any(1).float().mean(0)  # (features,)
    tokens = large.float().mean((0, 1))  # (features,)
    found = []
    for i in torch.nonzero((layers >= min_layers) & (tokens >= min_tokens)).flatten():
        signs = states[..., i][large[..., i]].sign()
        one_sided = bool((signs == signs[0]).all())
        found.append(
            OutlierFeature(int(i), layers[i].item(), tokens[i].item(), one_sided)
        )
    return found
