"""PEQA: fine-tune a quantised model by its scales alone, and keep its integers.

Kim et al. 2023, https://arxiv.org/abs/2305.14152. A linear is quantised once; from then
on nothing but the change Δs of its scales is trained:

    Ŵ = (s₀ + Δs) · (W̄₀ − z₀)        W̄₀ = clamp(⌊W₀ / s₀⌉ + z₀, q_min, q_max)

Every level of a block moves with its scale, and each weight stays on the level that it
was rounded to. So the gradient of a scale gathers the gradients of its whole block:

    ∂L/∂s_b = Σ_(ij in b) G_ij (W̄_ij − z_b)        G = ∂L/∂Ŵ = Σ_t g_t x_tᵀ

    W̄   integer codes, (out, in)          x   inputs, (tokens, in)
    z   zero point of a block              g   gradients of the outputs, (tokens, out)
    s   scale of a block, s₀ at first      G   gradient of the weight, (out, in)
    b   a block: a row, or a group of neighbours in a row

With a scale per row, h = s ⊙ (x (W̄ − z)ᵀ): it is the size of each output that trains.
A task is its scales. Whoever has the integers swaps tasks by swapping scales, and the
result is a quantised model like any other: nothing is merged, nothing rounded again but
the scales themselves. QLoRA (`llmlab.peft.qlora`) freezes the weight, too, but trains a
float matrix beside it, which stays there.

Simplified: s itself is the parameter and not Δs. The gradient is the same; weight decay
would pull s to 0 and not to s₀, so use none. On a GPU a kernel unpacks the codes in
registers; here each pass makes the float weight, and keeps nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression import walk
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models.accounting import linear_shapes, parameters
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import LlamaConfig

# What scripts/peqa_and_qlora_sweep.py measured, a run a line.
FILE = Path(__file__).parent / "data" / "peqa_and_qlora.csv"
METHODS = ("full", "lora", "qlora", "peqa")


def papers_grid() -> QuantConfig:
    """4 bits, a scale and a zero point per row, of least squared error."""
    return QuantConfig(4, symmetric=False, per="row", calibration="mse")


@dataclass(frozen=True)
class PEQAConfig:
    """What is rounded to, once, and how the integers lie in memory while training."""

    grid: QuantConfig = field(default_factory=papers_grid)
    # A byte or two per integer: faster than packed codes, which PyTorch cannot read.
    unpacked: bool = True


# The algorithm on one matrix ----------------------------------------------------------


def dequantize(
    integers: Float[Tensor, "out in"],
    scale: Float[Tensor, "blocks 1"],
    config: QuantConfig,
) -> Float[Tensor, "out in"]:
    """Ŵ = s · (W̄ − z), from the integers W̄ − z."""
    blocks = qb.to_blocks(integers, config)  # (out, in) -> (blocks, size)
    return (blocks * scale).reshape(integers.shape)


def scale_gradient(
    G: Float[Tensor, "out in"],
    integers: Float[Tensor, "out in"],
    config: QuantConfig,
) -> Float[Tensor, "blocks 1"]:
    """∂L/∂s of each block: Σ G · (W̄ − z) over its weights.

    Args:
        G: gradient of the loss with respect to Ŵ.
        integers: W̄ − z.
    """
    blocks = qb.to_blocks(G * integers, config)  # (out, in) -> (blocks, size)
    return blocks.sum(-1, keepdim=True)


class ScaledIntegers(torch.autograd.Function):
    """x Ŵᵀ + bias. Saves x and s, never Ŵ; gives gradients to x, s and the bias."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, bias: Tensor | None, layer: PEQALinear
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.layer = layer
        weight = dequantize(layer.integers(scale.dtype), scale, layer.config)
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, qb.finite(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        x_needs, scale_needs, bias_needs, _ = ctx.needs_input_grad
        config = ctx.layer.config
        integers = ctx.layer.integers(scale.dtype)
        grad_x = None
        grad_scale = None
        grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])  # (…, out) -> (tokens, out)
        if x_needs:
            weight = dequantize(integers, scale, config)
            grad_x = (grad @ qb.finite(weight, grad.dtype)).to(x.dtype)
        if scale_needs:
            inputs = x.reshape(-1, x.shape[-1])  # (…, in) -> (tokens, in)
            G = rows.T @ inputs.to(rows.dtype)  # (out, in)
            grad_scale = scale_gradient(G.to(scale.dtype), integers, config)
        if bias_needs:
            grad_bias = rows.sum(0)  # (out,)
        return grad_x, grad_scale, grad_bias, None


class PEQALinear(nn.Module):
    """A quantised linear whose scales train.

    `stored` is the linear that it began with: the codes, z₀, s₀ and the bias.
    """

    is_compressed = True

    def __init__(self, stored: QuantLinear, unpacked: bool = True) -> None:
        super().__init__()
        self.stored = stored
        # a copy: s₀ stays in `stored`
        scale = stored.scale.to(torch.float32, copy=True)
        self.scale = nn.Parameter(scale)  # (blocks, 1)
        self.register_buffer("unpacked", None, persistent=False)
        if unpacked:
            self.unpack()
            # codes that are loaded later are unpacked, too
            self.register_load_state_dict_post_hook(unpack_loaded)

    def unpack(self) -> None:
        """Hold W̄ − z in memory, a byte each, or two where 8 bits reach beyond ±127."""
        self.unpacked = None
        wide = self.config.bits == 8 and not self.config.symmetric
        self.unpacked = self.integers().to(torch.int16 if wide else torch.int8)

    @property
    def config(self) -> QuantConfig:
        """The grid of the codes."""
        return self.stored.config

    def integers(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """W̄ − z, as floats that hold integers."""
        if self.unpacked is not None:
            return self.unpacked.to(dtype)
        codes = self.stored.codes()
        blocks = qb.to_blocks(codes, self.config) - self.stored.zeros()
        return blocks.reshape(codes.shape).to(dtype)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Ŵ with the scales as they are now."""
        return dequantize(self.integers(self.scale.dtype), self.scale, self.config)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x Ŵᵀ + bias in the dtype of x."""
        return ScaledIntegers.apply(x, self.scale, self.stored.bias, self)

    def to_quant_linear(self) -> QuantLinear:
        """The same integers and z₀ with the scales of now, as they are stored.

        Raises:
            ValueError: a scale is NaN, or beyond what the grid's `scale_dtype` holds.
        """
        dtype = self.config.scale_dtype
        scale = self.scale.detach().to(dtype)
        bad = int((~scale.isfinite()).sum())
        if bad:
            raise ValueError(
                f"scale holds {bad} values that are not finite in {dtype}: take a"
                " smaller learning rate, or a grid with scale_dtype=torch.float32"
            )
        return QuantLinear.of(
            self.stored.codes(),
            scale,
            self.stored.zeros(),
            self.config,
            self.stored.bias,
        )


def unpack_loaded(layer: PEQALinear, keys: object) -> None:
    """After `load_state_dict`: the integers in memory are those that were loaded."""
    layer.unpack()


# The walk over a model ----------------------------------------------------------------


@torch.no_grad()
def apply(
    model: nn.Module, config: PEQAConfig, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear is rounded to nearest and its scales train; all else is frozen.

    In place. All are rounded before the first is put in.

    Args:
        skip: last names of linears that are left out.
    Raises:
        ValueError: adapters are on, the model is compressed already, a weight cannot
            be quantised, or the group size does not divide its columns; the layer is
            named, and the model is then as it was.
    """
    made = {}
    for name, linear in walk.linears(model, skip).items():
        try:
            made[name] = QuantLinear(linear, config.grid)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return put(model, made, config.unpacked)


@torch.no_grad()
def train_scales(model: nn.Module, unpacked: bool = True) -> nn.Module:
    """The scales of a model that is quantised already train; all else is frozen.

    Whatever chose its codes: GPTQ, say, or a folder that was opened. In place.

    Raises:
        ValueError: no linear of the model is a `QuantLinear`.
    """
    found = {}
    for name, module in model.named_modules():
        owner = name.removesuffix(".stored")
        if isinstance(module, QuantLinear) and owner == name:
            found[name] = module
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no QuantLinear whose scales could begin"
            " to train: use `apply` on floats"
        )
    return put(model, found, unpacked)


def put(
    model: nn.Module, quantised: Mapping[str, QuantLinear], unpacked: bool
) -> nn.Module:
    """A PEQALinear in each named place, the only parts that train."""
    made = {}
    for name, linear in quantised.items():
        made[name] = PEQALinear(linear, unpacked)
    model.requires_grad_(False)
    for layer in made.values():
        layer.stored.requires_grad_(False)
    return walk.put_modules(model, made)


def layers_of(model: nn.Module) -> dict[str, PEQALinear]:
    """The linears whose scales train, by name.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PEQALinear):
            found[name] = module
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no PEQALinear: `apply` makes them"
        )
    return found


def store(model: nn.Module) -> nn.Module:
    """Every PEQALinear becomes a `QuantLinear` with its scales of now, in place.

    It is then a quantised model like any other, and can be saved as one.

    Raises:
        ValueError: as `PEQALinear.to_quant_linear` (the layer is named); the model is
            then as it was.
    """
    made = {}
    for name, layer in layers_of(model).items():
        try:
            made[name] = layer.to_quant_linear()
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return walk.put_modules(model, made)


def fit(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    learning_rate: float = 3e-4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Trains the scales to predict a text, one step of Adam for each batch.

    Args:
        batches: token ids.
        progress: called with the steps that are done, and how many there are.
    Returns:
        The loss of each batch before its step, in nats per token.
    Raises:
        ValueError: there are no batches, or a loss is not finite; the scales are then
            as they were.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches=[]: there must be at least one to train on")
    before = scales(model)
    parameters = [layer.scale for layer in layers_of(model).values()]
    adam = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for ids in batches:
        with torch.enable_grad():
            out = model(ids)
            loss = next_token_loss(getattr(out, "logits", out), ids)
            if not loss.isfinite():
                load_scales(model, before)
                raise ValueError(
                    f"the loss is {loss.item()} after {len(losses)} steps: use a"
                    f" smaller learning_rate than {learning_rate}"
                )
            gradients = torch.autograd.grad(loss, parameters)
        for scale, gradient in zip(parameters, gradients, strict=True):
            scale.grad = gradient
        adam.step()
        losses.append(loss.item())
        progress(len(losses), len(batches))
    adam.zero_grad()
    return losses


def remove(model: nn.Module) -> nn.Module:
    """Every PEQALinear becomes the `QuantLinear` that it began with, bit for bit."""
    stored = {name: layer.stored for name, layer in layers_of(model).items()}
    return walk.put_modules(model, stored)


# A task, which is its scales ----------------------------------------------------------


def scales(model: nn.Module) -> dict[str, Tensor]:
    """All that a task is: a copy of the scales (blocks,) of each linear, by name."""
    found = {}
    for name, layer in layers_of(model).items():
        found[name] = layer.scale.detach().flatten().clone()
    return found


@torch.no_grad()
def load_scales(model: nn.Module, task: Mapping[str, Tensor]) -> nn.Module:
    """Swap the task: the linears take these scales, in place.

    Raises:
        ValueError: a linear is missing or unknown, a tensor has another number of
            blocks, or holds NaN or ∞; it is named, and nothing has been changed.
    """
    layers = layers_of(model)
    missing = sorted(layers.keys() - task.keys())
    unknown = sorted(task.keys() - layers.keys())
    if missing or unknown:
        raise ValueError(
            f"task does not fit the model: missing {some(missing)}, unknown"
            f" {some(unknown)}"
        )
    for name, layer in layers.items():
        blocks = layer.scale.numel()
        if task[name].shape != (blocks,):
            raise ValueError(
                f"task[{name!r}] has shape {tuple(task[name].shape)}, not ({blocks},):"
                " it is for other blocks"
            )
        qb.check_finite(f"task[{name!r}]", task[name])
    for name, layer in layers.items():
        layer.scale.copy_(task[name][:, None])
    return model


def some(names: Iterable[str]) -> str:
    """The first two names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (", ".join(names[:2]) or "none") + more


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all integers and zero points.

    Scales mean something only beside the integers that they were trained with.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(layers_of(model).items()):
        grid = layer.config
        digest.update(
            f"{name} {layer.stored.shape} {grid.bits} {grid.symmetric}".encode()
        )
        digest.update(layer.stored.packed.cpu().numpy().tobytes())
        if layer.stored.zero is not None:
            digest.update(layer.stored.zero.cpu().numpy().tobytes())
    return digest.hexdigest()


def save_task(model: nn.Module, file: str | Path) -> Path:
    """Write the scales, in the dtype in which each grid stores them, as safetensors.

    Raises:
        ValueError: as `PEQALinear.to_quant_linear`; nothing is written then.
    """
    from safetensors.torch import save_file

    found = {}
    for name, layer in layers_of(model).items():
        try:
            found[name] = layer.to_quant_linear().scale.flatten()
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    file = Path(file)
    save_file(found, file, metadata={"integers": fingerprint(model)})
    return file


def load_task(model: nn.Module, file: str | Path) -> nn.Module:
    """Swap the task for the one of a file that `save_task` wrote.

    Raises:
        ValueError: the file was made with other integers, or as `load_scales`; the
            message names the file, and nothing has been changed.
    """
    from safetensors import safe_open

    task = {}
    with safe_open(file, framework="pt") as opened:
        made_with = (opened.metadata() or {}).get("integers")
        for name in opened.keys():  # noqa: SIM118  it is no dict
            task[name] = opened.get_tensor(name)
    if made_with != fingerprint(model):
        raise ValueError(
            f"{file} was made with other integers than the model's: these scales would"
            " mean nothing here"
        )
    try:
        return load_scales(model, task)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None


# What it costs ------------------------------------------------------------------------


def trained_values(
    config: LlamaConfig,
    method: str,
    grid: QuantConfig | None = None,
    rank: int = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
) -> int:
    """How many numbers a method trains in a Llama of this shape.

    Args:
        method: "full", "lora", "qlora" (linears in `grid`, and LoRA) or "peqa".
        grid: of the codes; the paper's if it is not given.
        rank: of LoRA's adapters, on the linears with the last names `targets`.
    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}")
    if method == "full":
        return parameters(config)
    if method == "peqa":
        return config.num_hidden_layers * scales_of_block(config, grid or papers_grid())
    in_one_block = 0
    for name, (rows, columns) in linear_shapes(config).items():
        if name.rpartition(".")[2] in targets:
            in_one_block += rank * (rows + columns)
    return config.num_hidden_layers * in_one_block


def scales_of_block(config: LlamaConfig, grid: QuantConfig) -> int:
    """The scales of the seven linears of one block."""
    scales = 0
    for rows, columns in linear_shapes(config).values():
        sizes = {"tensor": rows * columns, "row": columns, "group": grid.group_size}
        scales += rows * columns // sizes[grid.per]
    return scales


def memory_plan(
    config: LlamaConfig,
    method: str,
    grid: QuantConfig | None = None,
    rank: int = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
) -> dict[str, int]:
    """Bytes to train a Llama of this shape, no activations, and of the task's file.

    Floats have 16 bits. A trained value has a gradient of 2 bytes, and 12 bytes in the
    optimizer: Adam's two moments and a master copy, 4 each. In the file it has 2.

    Args, Raises: as `trained_values`.
    """
    grid = grid or papers_grid()
    trained = trained_values(config, method, grid, rank, targets)
    weights = 2 * parameters(config)
    if method in ("qlora", "peqa"):
        L = config.num_hidden_layers
        linears = L * sum(
            rows * columns for rows, columns in linear_shapes(config).values()
        )
        block_bits = 8 * grid.scale_dtype.itemsize
        if not grid.symmetric:
            block_bits += grid.bits
        bits = linears * grid.bits + L * scales_of_block(config, grid) * block_bits
        weights += bits // 8 - 2 * linears
    if method in ("lora", "qlora"):
        weights += 2 * trained
    return {
        "weights": weights,
        "gradients": 2 * trained,
        "optimizer": 12 * trained,
        "task": 2 * trained,
    }
