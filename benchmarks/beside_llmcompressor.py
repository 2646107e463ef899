"""GPTQ, Wanda and SparseGPT beside llmcompressor, layer by layer on the same data.

llmcompressor does not fit into the course's environment. So this runs in its own:

    pip install llmcompressor==0.14.0.1 jaxtyping
    python -m benchmarks.beside_llmcompressor        (from this folder)

Two layers of SmolLM2's shapes, random weights, inputs that vary together. Each method
is called in turn, ours and theirs, one after the other, and the median of the ratios is
printed. AWQ is left out: llmcompressor has it as a pass over a whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq import gptq_quantize
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

from benchmarks.case import alternate
from llmlab.compression import gptq
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.calibration import InputStatistics
from llmlab.compression.quantization_basics import QuantConfig

SHAPES = {"up_proj": (1536, 576), "down_proj": (576, 1536)}
GROUP = 64


def problem(rows: int, columns: int) -> tuple[torch.Tensor, InputStatistics]:
    """W, and what 2,048 tokens show of X."""
    torch.manual_seed(0)
    X = torch.randn(2048, columns) @ torch.randn(columns, columns) / columns**0.5
    seen = InputStatistics.empty(columns)
    seen.add(X)
    return torch.randn(rows, columns) / columns**0.5, seen


def linear_of(W: torch.Tensor) -> torch.nn.Linear:
    """A linear with this weight; sparsify_weight reads it from there."""
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data.copy_(W)
    return linear


def their_gptq(W: torch.Tensor, seen: InputStatistics) -> Callable:
    """4 bits in groups, scales fixed beforehand, as llmcompressor has it by default."""
    arguments = QuantizationArgs(
        num_bits=4, strategy="group", group_size=GROUP, symmetric=True
    )
    scale = W.unflatten(1, (-1, GROUP)).abs().amax(-1)[None] / 7.5
    zero = torch.zeros_like(scale, dtype=torch.int8)

    def call():
        return gptq_quantize.quantize_weight(
            W[None].clone(), seen.gram[None].clone(), scale, zero, None, arguments
        )

    return call


def cases(
    W: torch.Tensor, seen: InputStatistics
) -> dict[str, tuple[Callable, Callable]]:
    """(ours, theirs) by name."""
    grid = QuantConfig(4, group_size=GROUP)
    config = gptq.GPTQConfig(grid, static_groups=True)
    linear = linear_of(W)
    found = {"GPTQ": (lambda: gptq.gptq(W, seen.gram, config), their_gptq(W, seen))}
    patterns = {
        "50%": ({"sparsity": 0.5}, (0.5, 0, 0)),
        "2:4": ({"pattern": "2:4"}, (0.5, 2, 4)),
    }
    for name, (asked, theirs) in patterns.items():
        wanda = pruning.PruneConfig("wanda", **asked)
        sparsegpt = pruning.PruneConfig("sparsegpt", **asked)
        found[f"Wanda {name}"] = (
            lambda wanda=wanda: pruning.prune(W, seen, wanda),
            lambda theirs=theirs: wanda_sparsify.sparsify_weight(
                linear, {linear: seen.square_sum.clone()}, *theirs
            ),
        )
        found[f"SparseGPT {name}"] = (
            lambda sparsegpt=sparsegpt: pruning.prune(W, seen, sparsegpt),
            lambda theirs=theirs: sgpt_sparsify.sparsify_weight(
                linear, {linear: seen.gram.clone()}, *theirs, 128, 0.01, False
            ),
        )
    return found


@torch.no_grad()
def main() -> None:
    print("| layer | method | ours | llmcompressor | ours / theirs |")
    print("|---|---|---|---|---|")
    for layer, shape in SHAPES.items():
        for name, (ours, theirs) in cases(*problem(*shape)).items():
            mine, library = alternate(ours, theirs, rounds=5)
            ratio = statistics.median(a / b for a, b in zip(mine, library, strict=True))
            times = [f"{statistics.median(t) * 1e3:,.0f} ms" for t in (mine, library)]
            print(f"| {layer} | {name} | {times[0]} | {times[1]} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
