"""ZeroQuant: weights by group, activations by token, and layers that learn one by one.

Yao et al. 2022, https://arxiv.org/abs/2206.01861. Three parts. The first two need no
data:

    group-wise weights         a scale for each block of W, made once
    token-wise activations     a scale for each row of X, made when X is there

    X Wᵀ  ≈  s_x · Σ_g s_w,g (Q_x,g Q_w,gᵀ)         integers are multiplied and summed
                                                    within a group; then the scales

The third is layer-by-layer knowledge distillation (LKD), for 4 bits. L_k is layer k of
the model with floats, L̂_k the same layer with its weights and inputs quantised:

    minimise over L̂_k   MSE( L_k(h), L̂_k(h) )       h = L_{k−1} ⋯ L_1(X)

Teacher and student are given the same input h, so that nothing before layer k is
trained, and nobody needs a label. Rounding has no gradient: the straight-through
estimator takes that of the identity (`quantization_basics.fake_quantize`).

    W     weight, (out, in)          X     inputs, (tokens, in)
    Q     integer codes              s     scales: s_w of a block of W, s_x of a token
    g     group of columns           G     groups of a whole matrix (the paper's g)
    L_k   layer k, a decoder block   L̂_k   the student, whose float weights are trained
    h     what enters layer k        k     counts layers from the first

What the paper calls a group is a block of G equal parts of the matrix, read row by row:
with G below the number of rows, several whole rows. Today a group is a run of columns
within one row, `group_size` of them. Both are here.

With `inputs="quantized"` h comes from the layers L̂ that are finished, as in GPTQ. The
paper's equation, and the authors' example, have the layers L.

Simplified: symmetric codes −(2^(b−1) − 1) … 2^(b−1) − 1; products of integers run group
by group; what is quantised is for inference, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from llmlab.compression import calibration, walk
from llmlab.compression import quantization_basics as qb
from llmlab.compression.calibration import Call
from llmlab.compression.integer_matmul import multiply_codes
from llmlab.compression.quantization_basics import QuantConfig

# What scripts/zeroquant_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parent / "data" / "zeroquant.csv"

INPUTS = ("float", "quantized")
MLP = "mlp"  # the part of a linear's name that says that it is in the feed-forward


@dataclass(frozen=True)
class ZeroQuantConfig:
    """How many bits, and which numbers share a scale.

    The defaults are the paper's W4/8A8: feed-forward weights in 4 bits, those of the
    attention in 8, and inputs in 8.
    """

    attention_bits: int = 8
    mlp_bits: int = 4
    activation_bits: int | None = 8  # None: inputs stay floats
    # Columns of a row that share a scale; None: all of them.
    group_size: int | None = 64
    # The paper's way: so many scales per matrix. It needs group_size=None.
    groups: int | None = None
    # One scale for each token, or one for all of X: "per tensor".
    activation_scales: str = "token"

    def __post_init__(self) -> None:
        for name in ("attention_bits", "mlp_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is None and name == "activation_bits":
                continue
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ValueError(f"{name}={bits!r} must be an integer from 2 to 8")
        for name in ("group_size", "groups"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be None or at least 1")
        if self.group_size is not None and self.groups is not None:
            raise ValueError(
                f"groups={self.groups} and group_size={self.group_size}: one of them"
                " must be None"
            )
        if self.activation_scales not in ("token", "tensor"):
            raise ValueError(
                f"activation_scales={self.activation_scales!r} must be 'token' or"
                " 'tensor'"
            )

    def weight_bits(self, name: str) -> int:
        """Bits of the weights of the linear of this name."""
        return self.mlp_bits if MLP in name.split(".") else self.attention_bits

    @property
    def activations(self) -> QuantConfig | None:
        """How inputs are quantised."""
        if self.activation_bits is None:
            return None
        per = "row" if self.activation_scales == "token" else "tensor"
        return QuantConfig(self.activation_bits, per=per, scale_dtype=torch.float32)


@dataclass(frozen=True)
class LKDConfig:
    """How a layer is trained."""

    steps: int = 32  # for each layer, on one batch each, in turn
    learning_rate: float = 1e-3  # of Adam; falls to 0 on a straight line
    # What enters teacher and student: what the float layers before put out, as in the
    # paper's equation, or what the finished students put out.
    inputs: str = "float"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be an integer, at least 1")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be above 0 and at most 1"
            )
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs={self.inputs!r} must be one of {INPUTS}")


# Group-wise weights -------------------------------------------------------------------


def block_size(rows: int, columns: int, config: ZeroQuantConfig) -> int:
    """Weights that share a scale, in a matrix read row by row.

    Raises:
        ValueError: the blocks do not fill rows evenly.
    """
    if config.groups is not None:
        size, left = divmod(rows * columns, config.groups)
        if left or (size % columns and columns % size):
            raise ValueError(
                f"groups={config.groups} must cut a weight of {rows} x {columns} into"
                " whole rows, or whole rows into equal parts"
            )
        return size
    if config.group_size is None:
        return columns
    if columns % config.group_size:
        raise ValueError(
            f"group_size={config.group_size} must divide the {columns} columns"
        )
    return config.group_size


def weight_blocks(
    W: Float[Tensor, "out in"], config: ZeroQuantConfig
) -> Float[Tensor, "blocks size"]:
    """W with one block per row."""
    return W.reshape(-1, block_size(*W.shape, config))  # (out, in) -> (blocks, size)


def quantize_weight(
    W: Float[Tensor, "out in"], bits: int, config: ZeroQuantConfig
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "blocks"]]:
    """Q_w and s_w, one scale for each block.

    Raises:
        ValueError: W holds NaN or ∞, or the blocks do not fill its rows evenly.
    """
    blocks = weight_blocks(W, config)
    codes, scale, _ = qb.encode(blocks, QuantConfig(bits, per="row"))
    return codes.reshape(W.shape).to(torch.int8), scale[:, 0]


def column_scales(
    scale: Float[Tensor, "blocks"], rows: int, columns: int
) -> Float[Tensor, "out groups"]:
    """s_w by row and group of columns; a block of several rows is said for each."""
    if len(scale) < rows:
        scale = scale.repeat_interleave(rows // len(scale))
    return scale.reshape(rows, -1)  # (blocks,) -> (out, groups)


def fake_quantize_weight(
    W: Float[Tensor, "out in"], bits: int, config: ZeroQuantConfig
) -> Float[Tensor, "out in"]:
    """Ŵ in floats; its gradient goes straight through to W."""
    blocks = weight_blocks(W, config)
    return qb.fake_quantize(blocks, QuantConfig(bits, per="row")).reshape(W.shape)


# Token-wise activations, and the product ----------------------------------------------


def quantize_tokens(
    X: Float[Tensor, "tokens in"], config: ZeroQuantConfig
) -> tuple[Int8[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    """Q_x and s_x, made from X itself: no calibration. A token of zeros has s_x = 1."""
    codes, scale, _ = qb.encode(X, config.activations)
    return codes.to(torch.int8), scale.expand(len(X), 1)


def integer_product(
    Q_x: Int8[Tensor, "tokens in"],
    s_x: Float[Tensor, "tokens 1"],
    Q_w: Int8[Tensor, "out in"],
    s_w: Float[Tensor, "out groups"],
) -> Float[Tensor, "tokens out"]:
    """X Wᵀ from codes: a sum of integers for each group, and then both scales.

    s_w differs from group to group and must come in before the groups are added. s_x is
    the same in all of them: it comes last.
    """
    groups = s_w.shape[1]
    size = Q_w.shape[1] // groups
    y = torch.zeros(len(Q_x), len(Q_w), device=Q_x.device)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        sums = multiply_codes(Q_x[:, columns], Q_w[:, columns])
        y += sums * s_w[:, g]
    return y * s_x


class ZeroQuantLinear(nn.Module):
    """A linear that stores codes and scales, and multiplies integers."""

    is_compressed = True

    def __init__(self, linear: nn.Linear, bits: int, config: ZeroQuantConfig) -> None:
        super().__init__()
        with torch.no_grad():
            codes, scale = quantize_weight(linear.weight, bits, config)
        self.bits = bits
        self.config = config
        self.shape = tuple(linear.weight.shape)
        self.dtype = linear.weight.dtype
        if bits < 8:
            top = 2 ** (bits - 1) - 1
            codes = qb.pack(codes + top, bits)
        self.register_buffer("codes", codes)  # int8; below 8 bits packed, uint8
        self.register_buffer("scale", scale.half())  # (blocks,)
        self.bias = linear.bias

    @property
    def weight_codes(self) -> Int8[Tensor, "out in"]:
        """Q_w."""
        if self.bits == 8:
            return self.codes
        rows, columns = self.shape
        top = 2 ** (self.bits - 1) - 1
        codes = qb.unpack(self.codes, self.bits, rows * columns)
        return codes.to(torch.int8).reshape(rows, columns) - top

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ, in the dtype that W had."""
        s_w = column_scales(self.scale.float(), *self.shape)
        size = self.shape[1] // s_w.shape[1]
        levels = self.weight_codes * s_w.repeat_interleave(size, 1)
        return qb.finite(levels, self.dtype)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """X Wᵀ + b, in the dtype of x."""
        tokens = x.reshape(-1, x.shape[-1])  # (…, in) -> (tokens, in)
        if self.config.activation_bits is None or len(tokens) == 0:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        s_w = column_scales(self.scale.float(), *self.shape)
        y = integer_product(
            *quantize_tokens(tokens, self.config), self.weight_codes, s_w
        )
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        rows, columns = self.shape
        return f"in={columns}, out={rows}, bits={self.bits}, {self.config}"


# Layer-by-layer distillation ----------------------------------------------------------


class Student(nn.Module):
    """A linear with float weights that computes what its `ZeroQuantLinear` would."""

    def __init__(self, linear: nn.Linear, bits: int, config: ZeroQuantConfig) -> None:
        super().__init__()
        self.linear = linear
        self.bits = bits
        self.config = config

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Both operands on their levels; gradients go straight through."""
        if self.config.activations is not None:
            x = qb.fake_quantize(x, self.config.activations)
        W = fake_quantize_weight(self.linear.weight, self.bits, self.config)
        return F.linear(x, W, self.linear.bias)


def student_of(
    layer: nn.Module,
    config: ZeroQuantConfig,
    prefix: str = "",
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """A copy of a layer whose linears are `Student`s; all its parameters train.

    Args:
        prefix: the layer's name in the model.
    """
    layer = deepcopy(layer).requires_grad_()
    students = {}
    for name, linear in walk.linears(layer, skip).items():
        bits = config.weight_bits(f"{prefix}.{name}")
        students[name] = Student(linear, bits, config)
    return walk.put_modules(layer, students)


def output(layer: nn.Module, call: Call) -> Float[Tensor, "batch seq hidden"]:
    """What a layer puts out, given the arguments of a call."""
    args, kwargs = call
    out = layer(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def lkd_loss(
    student: nn.Module, call: Call, target: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, ""]:
    """MSE(L_k(h), L̂_k(h)), the mean over all numbers; the teacher has no gradient."""
    return F.mse_loss(output(student, call), target.detach())


def train_layer(
    student: nn.Module,
    teacher: nn.Module,
    calls: list[Call],
    config: LKDConfig,
) -> list[float]:
    """Trains the student to put out what the teacher puts out. The loss of each step.

    The teacher reads every batch once; only the student has gradients and moments.

    Raises:
        ValueError: the loss is no longer finite.
    """
    with torch.no_grad():
        targets = [output(teacher, call) for call in calls]
    adam = torch.optim.Adam(student.parameters(), lr=config.learning_rate)
    losses = []
    for step in range(config.steps):
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        i = step % len(calls)
        with torch.enable_grad():
            loss = lkd_loss(student, calls[i], targets[i])
            if not loss.isfinite():
                raise ValueError(
                    f"the loss is {loss.item()} after {step} steps: use a smaller"
                    f" learning_rate than {config.learning_rate}"
                )
            gradients = torch.autograd.grad(loss, list(student.parameters()))
        for p, gradient in zip(student.parameters(), gradients, strict=True):
            p.grad = gradient
        adam.step()
        losses.append(loss.item())
    adam.zero_grad()
    return losses


@torch.no_grad()
def distill(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: ZeroQuantConfig,
    lkd: LKDConfig,
    skip: tuple[str, ...] = ("lm_head",),
) -> dict[str, nn.Module]:
    """The trained student of each layer, by the layer's name; the model is unchanged.

    Raises:
        ValueError: as `apply`.
    """
    calls = calibration.first_calls(model, batches)
    trained = {}
    for prefix, teacher in calibration.blocks(model).items():
        student = student_of(teacher, config, prefix, skip)
        try:
            train_layer(student, teacher, calls, lkd)
        except ValueError as problem:
            raise ValueError(f"{prefix}: {problem}") from None
        trained[prefix] = student
        goes_on = student if lkd.inputs == "quantized" else teacher
        calls = calibration.next_calls(goes_on, calls)
    return trained


# The walk over a model ----------------------------------------------------------------


@torch.no_grad()
def apply(
    model: nn.Module,
    config: ZeroQuantConfig | None = None,
    batches: Iterable[Int[Tensor, "batch seq"]] | None = None,
    lkd: LKDConfig | None = None,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Every linear becomes a `ZeroQuantLinear`, in place.

    Without `batches` no data is needed. With them each layer is distilled first; then
    all parameters of a layer have new values, those of its norms, too.

    Args:
        batches: token ids for LKD, (batch, seq) each.
        skip: last names of linears that are left out.
    Raises:
        ValueError: as `walk.linears`; the blocks do not fit a weight; no linear is in
            an "mlp" although its bits differ; `lkd` without `batches`. The model is
            then as it was.
    """
    config = config or ZeroQuantConfig()
    found = walk.linears(model, skip)
    check_names(found, config)
    for name, linear in found.items():
        try:
            block_size(*linear.weight.shape, config)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    if batches is None and lkd is not None:
        raise ValueError("lkd needs batches=: text for teacher and student to read")

    others: dict[str, Tensor] = {}
    if batches is not None:
        lkd = lkd or LKDConfig()

        def run() -> dict[str, nn.Module]:
            return distill(model, batches, config, lkd, skip)

        for prefix, student in calibration.in_eval_mode(model, run).items():
            found.update(trained_linears(prefix, student))
            others.update(trained_others(prefix, student))
    made = {}
    for name, linear in found.items():
        bits = config.weight_bits(name)
        made[name] = ZeroQuantLinear(linear, bits, config)
        if linear.bias is not None:
            old = model.get_submodule(name).bias
            made[name].bias.requires_grad_(old.requires_grad)
    for name, p in others.items():
        model.get_parameter(name).copy_(p)
    return walk.put_modules(model, made)


def trained_linears(prefix: str, student: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a student by their names in the model."""
    found = {}
    for name, module in student.named_modules():
        if isinstance(module, Student):
            found[f"{prefix}.{name}"] = module.linear
    return found


def trained_others(prefix: str, student: nn.Module) -> dict[str, Tensor]:
    """What else was trained, a norm say, by its name in the model."""
    quantised = set()
    for linear in trained_linears(prefix, student).values():
        quantised.update(id(p) for p in linear.parameters())
    found = {}
    for name, p in student.named_parameters():
        if id(p) not in quantised:
            found[f"{prefix}.{name}"] = p
    return found


def check_names(linears: Mapping[str, nn.Module], config: ZeroQuantConfig) -> None:
    """Raises: ValueError: mlp_bits differs from attention_bits and has no linear."""
    if config.mlp_bits == config.attention_bits:
        return
    if not any(MLP in name.split(".") for name in linears):
        raise ValueError(
            f"mlp_bits={config.mlp_bits} is for linears within a module called 'mlp',"
            " and this model has none: set attention_bits to the same"
        )


# What it costs ------------------------------------------------------------------------


def training_bytes(layer: int, layers: int, other: int = 0) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's moments, in training and in LKD.

    Weights that stand still are in 16 bits. What is trained has a float32 copy, a
    float32 gradient and two float32 moments, 16 bytes, as in mixed precision.

    Args:
        layer: parameters of one layer.
        layers: how many there are.
        other: all other parameters: embeddings, head, last norm.
    """
    whole = layer * layers + other
    return {
        "the model, to run it": 2 * whole,
        "training all of it": 2 * whole + 16 * whole,
        "distilling all of it": 2 * whole + 2 * whole + 16 * whole,
        "LKD, a layer at a time": 2 * whole + 2 * layer + 16 * layer,
    }


def moved_bytes(tokens: int, width: int, out: int) -> dict[str, int]:
    """Bytes that a norm and the linear after it read and write in memory.

    A kernel of its own reads what the one before it wrote. Floats have 16 bits, codes
    8, sums 32; the scales of tokens are few and left out.

        floats      norm: X in, X out            product: X, W in, Y out
        8 bits      norm: X in, X out            quantise: X in, codes out
                    product: codes, W in, sums   dequantise: sums in, Y out
        fused       norm: X in, codes out        product: codes, W in, Y out
    """
    x = tokens * width
    y = tokens * out
    w = out * width
    return {
        "16-bit floats": 2 * x + 2 * x + 2 * x + 2 * w + 2 * y,
        "8 bits, a kernel each": (
            2 * x + 2 * x + 2 * x + x + x + w + 4 * y + 4 * y + 2 * y
        ),
        "8 bits, fused": 2 * x + x + x + w + 2 * y,
    }
