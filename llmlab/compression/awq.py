"""AWQ: channels with large inputs are scaled up before the weights are rounded.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Few channels of a linear's input are
large, and an error of the weights that read them is multiplied by that input: they are
*salient*. A weight that is multiplied by s before it is rounded, and its input divided
by s, loses less, as long as the step Δ that its group shares stays what it was:

    Q(w s) · x / s  =  Δ' · round(w s / Δ') · x / s        error  ~  Δ'/Δ · 1/s

So each channel j gets a scale from the mean size of its input, and one exponent for all
of them, the one that changes the outputs least (equations 4 and 5 of the paper):

    s_j  =  (mean_t |x_tj|)^α        α*  =  argmin ‖ Q(W diag(s)) diag(s)⁻¹ X − W X ‖²

Division by s is folded into what made x (`folding`): the model computes nothing more.

    W        weight, (out, in)        X    inputs, (in, tokens)
    s        scale of each channel    α    0: no scales … 1: as large as the inputs
    Q        round to nearest with a scale Δ for each group
    x̄        mean |x| of each channel, `x_mean`
    w̄        mean |w| of each channel, in units of its group's largest, `w_mean`

The authors' code also divides s by √(max s · min s). A factor that all channels share
changes no code; it keeps numbers in range. As there, every seam of a block is searched
with the block's own float weights, on the inputs that the float model gives it.
Simplified: seams are those of `folding`, the names of Llama, Mistral and Qwen.
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
from torch.func import functional_call

from llmlab.compression import calibration, folding, walk
from llmlab.compression import quantization_basics as qb
from llmlab.compression.calibration import InputStatistics
from llmlab.compression.folding import Seam
from llmlab.compression.quantization_basics import QuantConfig, nearest

# What scripts/awq_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parent / "data" / "awq.csv"

SMALLEST = 1e-4  # of x̄^α, as in the authors' code: a dead channel has x̄ = 0
UNCLIPPED = ("q_proj", "k_proj")  # their product is what counts, not each of them


@dataclass(frozen=True)
class AWQConfig:
    """What is rounded to, and which scales are tried."""

    grid: QuantConfig = field(default_factory=QuantConfig)
    alphas: tuple[float, ...] = tuple(i / 20 for i in range(20))
    # llmcompressor's scales, s = x̄^α / (w̄^(1−α) + 1e-4); and no scales are tried, too
    duo: bool = False
    # The authors' second search: how far the largest weights of each group are cut
    clip: bool = False
    # This many of the batches judge the trials; all of them give x̄. None: all judge
    trial_batches: int | None = None

    def __post_init__(self) -> None:
        if self.grid.per == "tensor":
            raise ValueError(
                "grid.per='tensor' must be 'row' or 'group': rows are rounded apart"
            )
        if not self.alphas:
            raise ValueError("alphas=() must hold at least one exponent")
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"alphas holds {alpha}: each must be from 0 to 1")
        if self.trial_batches is not None and self.trial_batches < 1:
            raise ValueError(
                f"trial_batches={self.trial_batches} must be at least 1, or None"
            )


# The algorithm on one matrix ----------------------------------------------------------


def salient(size: Float[Tensor, "in"], share: float = 0.01) -> Int[Tensor, "kept"]:
    """The channels of the largest `size`: this share of all, and at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1")
    count = max(1, round(share * len(size)))
    return size.topk(count).indices


def protect(
    W: Float[Tensor, "out in"], kept: Int[Tensor, "kept"], grid: QuantConfig
) -> Float[Tensor, "out in"]:
    """Q(W), but for the columns `kept`, which stay as they are (in 16 bits)."""
    W_hat = nearest(W, grid)
    W_hat[:, kept] = W[:, kept].to(W_hat.dtype)
    return W_hat


def bits_with_protected(
    grid: QuantConfig, share: float, row: int | None = None
) -> float:
    """Bits per weight where this share of the columns takes 16.

    Args:
        row: weights per row, needed where grid.per="row".
    """
    return (1 - share) * qb.bits_per_weight(grid, row) + share * 16


def scale_of(x_mean: Float[Tensor, "in"], alpha: float) -> Float[Tensor, "in"]:
    """s = x̄^α, divided by √(max s · min s)."""
    s = x_mean.pow(alpha).clamp(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def mean_weight(
    weights: list[Float[Tensor, "_ in"]], grid: QuantConfig
) -> Float[Tensor, "in"]:
    """w̄: the mean |w| of each column, in units of its group's largest."""
    parts = []
    for W in weights:
        blocks = qb.to_blocks(W.float().abs(), grid)  # (out · groups, size)
        blocks = blocks / (blocks.amax(-1, keepdim=True) + 1e-6)
        parts.append(blocks.reshape(W.shape))
    return torch.cat(parts).mean(0)


def duo_scale_of(
    x_mean: Float[Tensor, "in"], w_mean: Float[Tensor, "in"], alpha: float
) -> Float[Tensor, "in"]:
    """llmcompressor's s = x̄^α / (w̄^(1−α) + 1e-4), divided by √(max s · min s)."""
    s = x_mean.pow(alpha) / (w_mean.pow(1 - alpha) + 1e-4)
    s = s.clamp(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def scaled_nearest(
    W: Float[Tensor, "out in"], s: Float[Tensor, "in"], grid: QuantConfig
) -> Float[Tensor, "out in"]:
    """Q(W diag(s)) diag(s)⁻¹: what W amounts to, for inputs that are not divided."""
    return nearest(W * s, grid) / s


@dataclass
class Found:
    """The best of the scales that were tried, and the error of each."""

    scale: Float[Tensor, "in"]
    alpha: float | None  # None: no scales at all (tried where duo=True)
    errors: list[float]  # share of the outputs' squares, in the order of the trials


def search(
    x_mean: Float[Tensor, "in"],
    error: Callable[[Float[Tensor, "in"]], float],
    config: AWQConfig,
    weights: list[Float[Tensor, "_ in"]] | None = None,
) -> Found:
    """The scale of least `error(s)` among those of all α; of equals, the first.

    Nothing is changed by a trial, so nothing has to be restored before the next one.

    Args:
        weights: of all the linears that read these channels, for `config.duo`.
    Raises:
        ValueError: no input was ever other than 0, or no error is finite.
    """
    if not x_mean.any():
        raise ValueError(
            "its input is always 0: no channel is more salient than others"
        )
    trials: list[tuple[float | None, Tensor]]
    if config.duo:
        w_mean = mean_weight(weights, config.grid)
        trials = [(None, torch.ones_like(x_mean))]
        trials += [(a, duo_scale_of(x_mean, w_mean, a)) for a in config.alphas]
    else:
        trials = [(a, scale_of(x_mean, a)) for a in config.alphas]

    best = None
    least = float("inf")
    errors = []
    for alpha, s in trials:
        lost = error(s)
        errors.append(lost)
        if lost < least:  # never true of NaN
            least = lost
            best = (s, alpha)
    if best is None:
        raise ValueError("no scale leaves outputs that are finite")
    return Found(*best, errors)


def clip_limits(
    W: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    grid: QuantConfig,
    steps: int = 20,
    least: float = 0.5,
) -> Float[Tensor, "out groups 1"]:
    """Where to cut |w| in each group before it is rounded: at its largest, or below.

    The authors' second search. Each group of each row is judged by its own part of the
    output, whose squared error is δ (X_g X_gᵀ) δᵀ. Limits tried: the largest |w| times
    1, 1 − 1/steps, … down to, but without, `least`.
    """
    blocks = in_groups(W, grid)  # (out, groups, size)
    out, groups, size = blocks.shape
    starts = range(0, groups * size, size)
    within = torch.stack([gram[i : i + size, i : i + size] for i in starts])
    largest = blocks.abs().amax(-1, keepdim=True)  # (out, groups, 1)
    best = largest.clone()
    best_error = torch.full_like(largest, torch.inf)
    for i in range(round((1 - least) * steps)):
        limit = largest * (1 - i / steps)
        cut = blocks.clamp(-limit, limit)
        rounded = nearest(cut.reshape(out, -1), grid).reshape(blocks.shape)
        delta = (rounded - blocks).transpose(0, 1)  # (groups, out, size)
        error = ((delta @ within) * delta).sum(-1).T[..., None]  # (out, groups, 1)
        best = torch.where(error < best_error, limit, best)
        best_error = torch.minimum(error, best_error)
    return best


def in_groups(
    W: Float[Tensor, "out in"], grid: QuantConfig
) -> Float[Tensor, "out groups size"]:
    """The columns that share a scale, row by row."""
    return qb.to_blocks(W.float(), grid).unflatten(0, (len(W), -1))


def clipped(
    W: Float[Tensor, "out in"],
    limits: Float[Tensor, "out groups 1"],
    grid: QuantConfig,
) -> Float[Tensor, "out in"]:
    """W with |w| at most the limit of its group."""
    return in_groups(W, grid).clamp(-limits, limits).reshape(W.shape).to(W.dtype)


# One block ----------------------------------------------------------------------------


@dataclass
class Heard:
    """A call of a module: its arguments, and the output that it gave."""

    args: tuple
    kwargs: dict
    output: Tensor


def judge_of(seam: Seam) -> str:
    """Whose output judges the scales: the attention, the MLP, or the only linear."""
    if len(seam.after) == 1:
        return seam.after[0]
    return seam.after[0].rpartition(".")[0]


def first(output) -> Tensor:
    """An attention of `transformers` returns its weights, too."""
    return output[0] if isinstance(output, tuple) else output


def listen(
    block: nn.Module, names: Iterable[str], run: Callable[[], object]
) -> dict[str, list[Heard]]:
    """Every call of the named parts of a block while `run()` computes."""
    calls: dict[str, list[Heard]] = {name: [] for name in names}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            calls[name].append(Heard(args, kwargs, first(output)))

        return hook

    hooks = []
    try:
        for name in calls:
            part = block.get_submodule(name)
            hooks.append(part.register_forward_hook(watch(name), with_kwargs=True))
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def output_error(
    module: nn.Module, weights: dict[str, Tensor], calls: list[Heard]
) -> float:
    """‖outputs with these weights − outputs‖² / ‖outputs‖²; the module stays as it is.

    Args:
        weights: by their names in `module`.
    """
    lost = 0.0
    whole = 0.0
    for call in calls:
        output = first(functional_call(module, weights, call.args, call.kwargs))
        lost += (output - call.output).float().square().sum().item()
        whole += call.output.float().square().sum().item()
    return lost / whole if whole else lost


def search_seam(
    block: nn.Module,
    seam: Seam,
    quantized: list[str],
    x_mean: Float[Tensor, "in"],
    calls: list[Heard],
    config: AWQConfig,
) -> Found:
    """The best scale of one seam.

    Args:
        quantized: those of `seam.after` that will be rounded.
        calls: of the part that judges.
    """
    place = judge_of(seam)
    judge = block.get_submodule(place)
    weights = {name: block.get_submodule(name).weight for name in quantized}

    def error(s: Tensor) -> float:
        tried = {}
        for name, W in weights.items():
            inside = f"{name}.weight".removeprefix(f"{place}.")
            W_hat = scaled_nearest(W.float(), s, config.grid)
            tried[inside] = qb.finite(W_hat, W.dtype)
        return output_error(judge, tried, calls)

    try:
        return search(x_mean, error, config, list(weights.values()))
    except ValueError as problem:
        raise ValueError(f"{seam.after[0]}: {problem}") from None


@dataclass
class SearchedBlock:
    """What a block's linears are given, and the scale of each seam, by its `before`."""

    inputs: dict[str, InputStatistics]
    found: dict[str, Found]


@torch.no_grad()
def search_block(
    block: nn.Module,
    calls: list[calibration.Call],
    config: AWQConfig,
    skip: tuple[str, ...] = ("lm_head",),
) -> SearchedBlock:
    """The best scale of each seam of a decoder layer, which is not changed."""
    linears = qb.linears(block, skip)
    seams = {}
    for seam in folding.seams(block):
        quantized = [name for name in seam.after if name in linears]
        if quantized:
            seams[seam] = quantized
    inputs: dict[str, InputStatistics] = {}

    def read() -> None:
        run = partial(calibration.next_calls, block, calls)
        inputs.update(calibration.collect(linears, run, gram=config.clip))

    heard = listen(block, {judge_of(seam) for seam in seams}, read)
    found = {}
    for seam, quantized in seams.items():
        x_mean = inputs[quantized[0]].absmean
        judged = heard[judge_of(seam)][: config.trial_batches]
        found[seam.before] = search_seam(block, seam, quantized, x_mean, judged, config)
    return SearchedBlock(inputs, found)


@torch.no_grad()
def fold_block(
    block: nn.Module, searched: SearchedBlock, config: AWQConfig
) -> nn.Module:
    """A copy of the block with scales folded in, and weights clipped if asked for.

    Raises:
        ValueError: a weight would not be finite; it is named.
    """
    block = deepcopy(block)
    for seam in folding.seams(block):
        if seam.before in searched.found:
            folding.fold(block, seam, searched.found[seam.before].scale)
    for name, p in block.named_parameters():
        if not p.isfinite().all():
            raise ValueError(
                f"{name} would not be finite in {p.dtype} once it is scaled"
            )
    if not config.clip:
        return block
    scales = channel_scales(block, searched)
    for name, statistics in searched.inputs.items():
        if name.endswith(UNCLIPPED):
            continue
        weight = block.get_submodule(name).weight
        gram = statistics.gram
        if name in scales:
            s = scales[name]
            gram = gram / torch.outer(s, s)  # the inputs are divided by s now
        limits = clip_limits(weight, gram, config.grid)
        weight.copy_(clipped(weight, limits, config.grid))
    return block


def channel_scales(block: nn.Module, searched: SearchedBlock) -> dict[str, Tensor]:
    """The scale of the channels that each linear reads, where it has one."""
    scales = {}
    for seam in folding.seams(block):
        if seam.before in searched.found:
            for name in seam.after:
                scales[name] = searched.found[seam.before].scale
    return scales


# The walk over a model ----------------------------------------------------------------


@torch.no_grad()
def folded_blocks(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: AWQConfig,
    skip: tuple[str, ...] = ("lm_head",),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, nn.Module], dict[str, Found]]:
    """A folded copy of each block, and what was found at each seam, both by name.

    The model is not changed.

    Raises:
        ValueError: as `apply`.
    """
    walk.linears(model, skip)  # refuses what cannot be compressed
    calls = calibration.first_calls(model, batches)
    blocks = {}
    found = {}
    all_blocks = calibration.blocks(model)
    for prefix, block in all_blocks.items():
        try:
            searched = search_block(block, calls, config, skip)
            blocks[prefix] = fold_block(block, searched, config)
        except ValueError as problem:
            raise ValueError(f"{prefix}.{problem}") from None
        for place, best in searched.found.items():
            found[f"{prefix}.{place}"] = best
        calls = calibration.next_calls(block, calls)  # what the float block puts out
        progress(len(blocks), len(all_blocks))
    return blocks, found


@torch.no_grad()
def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: AWQConfig,
    skip: tuple[str, ...] = ("lm_head",),
    floats: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Found]:
    """Scales are folded into the model, and its linears become `QuantLinear`, in place.

    All is computed before the first weight is changed. The state dict of the result
    loads into another model of the same shape after `quantization_basics.apply` with
    `config.grid`.

    Args:
        batches: token ids to calibrate on, (batch, seq) each.
        skip: last names of linears that are left out.
        floats: the linears stay floats, on the same levels: the same outputs at the
            speed of floats.
        progress: called with the blocks that are done, and how many there are.
    Returns:
        What was found at each seam, by the name of the norm or linear that is divided.
    Raises:
        ValueError: bad text, a weight that cannot be quantised (named), a block without
            the names of a Llama's, or adapters on the model; the model is then as it
            was.
    """
    blocks: dict[str, nn.Module] = {}
    found: dict[str, Found] = {}

    def run() -> None:
        copies, best = folded_blocks(model, batches, config, skip, progress)
        blocks.update(copies)
        found.update(best)

    calibration.in_eval_mode(model, run)
    modules = {}
    for prefix, block in blocks.items():
        for name, linear in qb.linears(block, skip).items():
            if floats:
                rounded = nearest(linear.weight, config.grid)
                linear.weight.copy_(qb.finite(rounded, linear.weight.dtype))
            else:
                modules[f"{prefix}.{name}"] = qb.QuantLinear(linear, config.grid)
    for prefix, block in blocks.items():
        model.get_submodule(prefix).load_state_dict(block.state_dict())
    if modules:
        walk.put_modules(model, modules)
    return found
