"""SmoothQuant: outliers move from activations to weights, then both are 8 bits.

Xiao et al. 2022, https://arxiv.org/abs/2211.10438, equations 3 and 4:

    Y  =  (X diag(s)⁻¹) (diag(s) W)  =  X̂ Ŵ            for any s > 0
    s_j  =  max|X_j|^α / max|W_j|^(1−α)

Channels of X that are large become smaller, and the columns of W that read them larger.
diag(s)⁻¹ is folded into the norm that makes X (see `folding`), so that X̂ costs nothing
to compute. Then X̂ and Ŵ are rounded to 8 bits and multiplied as integers: W8A8.

    X     inputs (tokens, in)             X_j   channel j, a column of X
    W     weight. The paper writes (in, out); here (out, in), as torch stores it, so
          that its W_j, row j, is column j here
    s     one scale for each channel; linears that read the same X share it, and
          max|W_j| is over all of them
    α     migration strength: at 1 every X̂_j reaches 1, at 0 every Ŵ_j does
    step  distance of two levels: the largest |x| that shares it, over 127

α = 0 is not "off": it moves what makes columns of W differ into X. Off is alpha=None.

Where a channel was always 0 while calibrating, or no weight reads it, the equation
gives 0 or ∞. Such a channel keeps s = 1. (The authors' code takes 1e-5: if the channel
comes alive later, it is multiplied by 100,000.)

Simplified: products of attention (q kᵀ and the one with v) stay in floats, where the
paper has them in 8 bits, too; codes are symmetric.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlab.compression import calibration, folding, walk
from llmlab.compression.calibration import InputStatistics
from llmlab.compression.folding import Seam
from llmlab.compression.integer_matmul import multiply_codes

TOP = 127  # the largest code; −128 is not used
WEIGHTS = ("tensor", "channel")  # a channel of the output: a row
ACTIVATIONS = ("tensor", "token")
NORMS = ("input_layernorm", "post_attention_layernorm")  # what the paper smooths

# What scripts/smoothquant_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parent / "data" / "smoothquant.csv"


@dataclass(frozen=True)
class SmoothQuantConfig:
    """What is smoothed, and which numbers share a step. The default is the paper's O1.

    `alpha=None` smooths nothing.
    """

    alpha: float | None = 0.5
    weights: str = "tensor"  # one step for W, or one for each of its rows
    activations: str = "token"  # one step for X, or one for each token
    # The step of X is fixed beforehand, from calibration; else it is found anew for
    # each X.
    static: bool = False
    seams: tuple[str, ...] = NORMS  # `before` of each seam that is smoothed

    def __post_init__(self) -> None:
        object.__setattr__(self, "seams", tuple(self.seams))
        # a NaN fails the comparison, too
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r} must be from 0 to 1, or None")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} must be one of {WEIGHTS}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(
                f"activations={self.activations!r} must be one of {ACTIVATIONS}"
            )
        if self.static and self.activations == "token":
            raise ValueError(
                "static=True needs activations='tensor': the tokens of another text"
                " are not known beforehand"
            )
        known = [seam.before for seam in folding.SEAMS]
        for name in self.seams:
            if name not in known:
                raise ValueError(f"seams: {name!r} must be one of {known}")


# The paper's table 2, from slow and exact to fast and rough.
SETTINGS = {
    "O1": SmoothQuantConfig(0.5, "tensor", "token"),
    "O2": SmoothQuantConfig(0.5, "tensor", "tensor"),
    "O3": SmoothQuantConfig(0.5, "tensor", "tensor", static=True),
}


# The mathematics ----------------------------------------------------------------------


def smoothing_scale(
    x_max: Float[Tensor, "in"], w_max: Float[Tensor, "in"], alpha: float
) -> Float[Tensor, "in"]:
    """s of each channel, equation 4; 1 where nothing enters or nothing reads it.

    Args:
        x_max: max|X_j|.
        w_max: max|W_j| over all the linears that read X.
    """
    scale = x_max.pow(alpha) / w_max.pow(1 - alpha)
    alive = (x_max > 0) & (w_max > 0)
    return torch.where(alive, scale, 1.0)


def quantize_weight(
    W: Float[Tensor, "out in"], per: str = "tensor"
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "steps"]]:
    """Codes, and the step of each row or, `per="tensor"`, the one step, float32."""
    W = W.detach().float()
    size = W.abs().amax(1) if per == "channel" else W.abs().amax().reshape(1)
    step = size / TOP
    return codes_of(W, step), step


def quantize_activations(
    X: Float[Tensor, "tokens in"], per: str = "token", step: Tensor | None = None
) -> tuple[Int8[Tensor, "tokens in"], Float[Tensor, "steps"]]:
    """Codes, and the step of each token or, `per="tensor"`, the one step, float32.

    Args:
        step: a static one, (1,): what is larger than 127 steps is clipped.
    """
    X = X.detach().float()
    if step is None:
        size = X.abs().amax(1) if per == "token" else X.abs().amax().reshape(1)
        step = size / TOP
    return codes_of(X, step), step


def codes_of(
    x: Float[Tensor, "rows n"], step: Float[Tensor, "steps"]
) -> Int8[Tensor, "rows n"]:
    """clamp(⌊x / step⌉, −127, 127); ties go to even, and 0 / 0 is 0."""
    safe = torch.where(step > 0, step, 1.0)[:, None]
    return (x / safe).round_().clamp_(-TOP, TOP).to(torch.int8)


def w8a8(
    X: Float[Tensor, "tokens in"],
    codes: Int8[Tensor, "out in"],
    w_step: Float[Tensor, "w_steps"],
    per: str = "token",
    x_step: Float[Tensor, "1"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """X Wᵀ as a product of integers, in float32."""
    x_codes, step = quantize_activations(X, per, x_step)
    sums: Int[Tensor, "tokens out"] = multiply_codes(x_codes, codes)
    # steps of tokens are rows of Y, those of output channels its columns
    Y = sums.float() * step[:, None] * w_step
    if x_step is not None:
        # codes hide a NaN or ∞; with a dynamic step it is in the step
        bad = ~X.isfinite().all(1, keepdim=True)
        Y = Y.masked_fill(bad, torch.nan)
    return Y


def output_error(
    X: Float[Tensor, "tokens in"],
    weights: Iterable[Float[Tensor, "out in"]],
    scale: Float[Tensor, "in"] | None,
    config: SmoothQuantConfig,
    x_step: Float[Tensor, "1"] | None = None,
) -> float:
    """Σ ‖X Wᵀ − Ŷ‖² / Σ ‖X Wᵀ‖² over linears that read X, Ŷ in W8A8 after smoothing."""
    scale = torch.ones(X.shape[1]) if scale is None else scale
    lost = 0.0
    whole = 0.0
    for W in weights:
        W = W.detach().float()
        codes, w_step = quantize_weight(W * scale, config.weights)
        right = X @ W.T
        found = w8a8(X / scale, codes, w_step, config.activations, x_step)
        lost += (found - right).square().sum().item()
        whole += right.square().sum().item()
    return lost / whole


# The linear ---------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """Forward `w8a8`. Backward: through the decoded weight, as if X were not rounded,
    and 0 where a static step clipped it.
    """

    @staticmethod
    def forward(ctx, x, codes, w_step, per, x_step):
        ctx.save_for_backward(x, codes, w_step, x_step)
        return w8a8(x, codes, w_step, per, x_step).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, codes, w_step, x_step = ctx.saved_tensors
        weight = codes.float() * w_step[:, None]
        grad_x = grad @ weight.to(grad.dtype)
        if x_step is not None:
            grad_x = grad_x * (x.abs() <= TOP * x_step)
        return grad_x, None, None, None, None


class W8A8Linear(nn.Module):
    """A linear that stores 8 bits per weight and multiplies integers.

    `x_step` is None where the step of the inputs is found anew for each X.
    """

    is_compressed = True

    def __init__(
        self,
        codes: Int8[Tensor, "out in"],
        step: Float[Tensor, "steps"],
        bias: nn.Parameter | None = None,
        activations: str = "token",
        x_step: Float[Tensor, "1"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("step", step)
        self.register_buffer("x_step", x_step)
        self.bias = bias
        self.activations = activations
        self.dtype = dtype

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        config: SmoothQuantConfig,
        x_step: Float[Tensor, "1"] | None = None,
    ) -> W8A8Linear:
        """The linear in 8 bits; its bias is shared with it."""
        codes, step = quantize_weight(linear.weight, config.weights)
        dtype = linear.weight.dtype
        return cls(codes, step, linear.bias, config.activations, x_step, dtype)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded weight, in the dtype that it came in."""
        return (self.codes.float() * self.step[:, None]).to(self.dtype)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x Wᵀ + b. With a dynamic step for the tensor, all tokens of x share it."""
        tokens = x.reshape(-1, x.shape[-1])  # (…, in) -> (tokens, in)
        if len(tokens) == 0:
            return x.new_zeros(*x.shape[:-1], len(self.codes))
        y = _Product.apply(tokens, self.codes, self.step, self.activations, self.x_step)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        rows, columns = self.codes.shape
        steps = "row" if len(self.step) > 1 else "tensor"
        static = "static" if self.x_step is not None else "dynamic"
        return (
            f"in={columns}, out={rows}, weight per {steps}, inputs per"
            f" {self.activations}, {static}"
        )


# The walk over a model ----------------------------------------------------------------


def statistics(
    model: nn.Module, batches: Iterable[Int[Tensor, "batch seq"]]
) -> dict[str, InputStatistics]:
    """What enters each linear of the blocks, by name: enough for every config.

    Raises:
        ValueError: as `apply`.
    """
    inside = tuple(f"{prefix}." for prefix in calibration.blocks(model))
    linears = {}
    for name, linear in walk.linears(model).items():
        if name.startswith(inside):
            linears[name] = linear
    return calibration.inputs(model, linears, batches, gram=False)


def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: SmoothQuantConfig | None = None,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Scales are folded into the model, and every linear in its blocks becomes a
    `W8A8Linear`, in place.

    Args:
        batches: token ids to calibrate on, (batch, seq) each. With neither smoothing
            nor static steps none are needed.
        skip: last names of linears that are left out; they are smoothed as all others.
    Raises:
        ValueError: bad text, a weight that cannot be quantised (named), a seam that the
            model has not, or scales that its dtype cannot hold; the model is then as it
            was.
    """
    config = config or SmoothQuantConfig()
    seen = {}
    if config.alpha is not None or config.static:
        seen = statistics(model, batches)
    return quantize(model, seen, config, skip)


def quantize(
    model: nn.Module,
    seen: Mapping[str, InputStatistics],
    config: SmoothQuantConfig,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """`apply`, with what `statistics` found."""
    walk.linears(model, skip)  # refuses what cannot be compressed
    smoothed = smoothed_blocks(model, seen, config)
    made: dict[str, nn.Module] = {}
    for prefix, (block, x_max) in smoothed.items():
        for name, linear in walk.linears(block, skip).items():
            x_step = None
            if config.static:
                x_step = static_step(f"{prefix}.{name}", x_max[name])
            made[f"{prefix}.{name}"] = W8A8Linear.of(linear, config, x_step)
    put_blocks(model, smoothed)
    for name, layer in made.items():
        layer.bias = model.get_submodule(name).bias
    return walk.put_modules(model, made)


def smooth(
    model: nn.Module,
    seen: Mapping[str, InputStatistics],
    config: SmoothQuantConfig,
) -> nn.Module:
    """Only the first half: scales are folded, in place; the outputs stay.

    Raises:
        ValueError: as `apply`.
    """
    walk.linears(model)
    put_blocks(model, smoothed_blocks(model, seen, config))
    return model


Smoothed = tuple[nn.Module, dict[str, Tensor]]  # a block, max|X̂_j| of its linears


def smoothed_blocks(
    model: nn.Module, seen: Mapping[str, InputStatistics], config: SmoothQuantConfig
) -> dict[str, Smoothed]:
    """A copy of each block with its scales folded; the model is not changed.

    Seams are taken in their order in `folding.SEAMS`: folding one changes the rows of
    the linear before it, but no weight that a later seam reads.
    """
    found = {}
    for prefix, block in calibration.blocks(model).items():
        block = deepcopy(block)
        x_max = {}
        for name in walk.linears(block, skip=()):
            if f"{prefix}.{name}" in seen:
                x_max[name] = seen[f"{prefix}.{name}"].absmax
        if config.alpha is not None:
            for seam in chosen_seams(block, config):
                fold_seam(block, prefix, seam, x_max, config.alpha)
        found[prefix] = (block, x_max)
    return found


def chosen_seams(block: nn.Module, config: SmoothQuantConfig) -> list[Seam]:
    """The seams of a block that are smoothed.

    Raises:
        ValueError: a seam is asked for that the block has not.
    """
    seams = {seam.before: seam for seam in folding.seams(block)}
    for name in config.seams:
        if name not in seams:
            raise ValueError(
                f"seams: no scale can be folded into {name}, whose channels several"
                f" heads share; this model has {list(seams)}"
            )
    return [seam for name, seam in seams.items() if name in config.seams]


def fold_seam(
    block: nn.Module, prefix: str, seam: Seam, x_max: dict[str, Tensor], alpha: float
) -> None:
    """Equation 4 at one seam of a block, in place, in the block and in `x_max`."""
    first = seam.after[0]
    linears = {name: block.get_submodule(name) for name in seam.after}
    w_max = folding.largest_columns(linears, seam.after)
    scale = smoothing_scale(x_max[first], w_max, alpha)
    try:
        folding.fold(block, seam, scale)
    except ValueError as problem:
        raise ValueError(f"{prefix}: {problem}") from None
    for name in (seam.before, *seam.after):
        weight = block.get_submodule(name).weight
        if not weight.isfinite().all():
            raise ValueError(
                f"{prefix}.{name}.weight would not be finite in {weight.dtype}:"
                f" alpha={alpha} gives scales up to {scale.max().item():.3g}"
            )
    for name in seam.after:
        x_max[name] = x_max[name] / scale


def static_step(name: str, x_max: Float[Tensor, "in"]) -> Float[Tensor, "1"]:
    """The step of a linear's inputs, from the largest of its channels."""
    if not x_max.any():
        raise ValueError(f"{name}: its input was always 0, so no static step fits it")
    return x_max.amax().reshape(1) / TOP


def put_blocks(model: nn.Module, smoothed: Mapping[str, Smoothed]) -> None:
    """The weights of the blocks become those of their copies, in place."""
    for prefix, (block, _) in smoothed.items():
        model.get_submodule(prefix).load_state_dict(block.state_dict())


# To disk and back ---------------------------------------------------------------------

CONFIG = "smoothquant.json"
TENSORS = "model.safetensors"


def save(model: nn.Module, folder: str | Path, config: SmoothQuantConfig) -> None:
    """The whole model, the smoothed norms with it; tensors that are tied, once.

    Each file is replaced whole.

    Raises:
        ValueError: no linear of the model is a `W8A8Linear`.
    """
    if not any(isinstance(module, W8A8Linear) for module in model.modules()):
        raise ValueError("model has no W8A8Linear: apply SmoothQuant first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    places = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in places:
            stored[name] = tensor.detach().contiguous()
        places.add(tensor.data_ptr())
    text = json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"
    new_config = folder / f"{CONFIG}.tmp"
    new_tensors = folder / f"{TENSORS}.tmp"
    new_config.write_text(text, encoding="utf-8")
    save_file(stored, new_tensors, metadata={"format": "pt"})
    # safetensors makes its files readable by the owner alone
    shutil.copymode(new_config, new_tensors)
    os.replace(new_config, folder / CONFIG)
    os.replace(new_tensors, folder / TENSORS)


def read_config(folder: str | Path) -> SmoothQuantConfig:
    """The settings that `save` wrote.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is not JSON, or a setting is unknown or wrong (named).
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        unknown = sorted(settings.keys() - asdict(SmoothQuantConfig()).keys())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} holds no JSON object: {error}") from None
    if unknown:
        raise ValueError(f"{file}: the setting {unknown[0]!r} is not known")
    try:
        return SmoothQuantConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model of the same sizes, with whatever weights, becomes the saved one in place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, or tensors that do not fit the model
            (named); the model is then as it was.
    """
    config = read_config(folder)
    file = Path(folder) / TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    linears = walk.linears(model)
    made = {}
    for key, codes in tensors.items():
        name, _, last = key.rpartition(".")
        if last != "codes":
            continue
        if name not in linears:
            raise ValueError(f"{file}: the model has no linear {name!r}")
        if f"{name}.step" not in tensors:
            raise ValueError(f"{file} has no {name}.step")
        made[name] = W8A8Linear(
            codes,
            tensors[f"{name}.step"],
            linears[name].bias,
            config.activations,
            tensors.get(f"{name}.x_step"),
            linears[name].weight.dtype,
        )
    check_tensors(model, tensors, made, config, file)
    walk.put_modules(model, made)
    model.load_state_dict(tensors, strict=False)
    return model


def check_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    made: Mapping[str, W8A8Linear],
    config: SmoothQuantConfig,
    file: Path,
) -> None:
    """Raises: ValueError: a tensor is missing, unknown, or of another shape; named.

    What is tied to a tensor in the file need not be there itself.
    """
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in made:
        rows, columns = wanted.pop(f"{name}.weight")
        wanted[f"{name}.codes"] = (rows, columns)
        wanted[f"{name}.step"] = (rows if config.weights == "channel" else 1,)
        if config.static:
            wanted[f"{name}.x_step"] = (1,)
    unknown = sorted(tensors.keys() - wanted.keys())
    if unknown:
        raise ValueError(f"{file}: the tensor {unknown[0]!r} is not known")
    places = {state[name].data_ptr() for name in tensors if name in state}
    for name, shape in wanted.items():
        if name not in tensors:
            if name in state and state[name].data_ptr() in places:
                continue
            raise ValueError(f"{file} has no {name}")
        found = tuple(tensors[name].shape)
        if found != shape:
            raise ValueError(f"{file}: {name} has shape {found}, not {shape}")
