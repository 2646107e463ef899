"""What llmcompressor makes of a few matrices: golden/magnitude_wanda_sparsegpt.*

    python scripts/golden/magnitude_wanda_sparsegpt_goldens.py

in an environment with llmcompressor 0.14.0.1. It calls the functions that
SparseGPTModifier and WandaPruningModifier call for each linear. The versions stand in
the metadata of the file.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[2] / "tests" / "compression" / "golden"
FILE = GOLDEN / "magnitude_wanda_sparsegpt.safetensors"
BLOCK = 16

# name: sparsity, N, M, as the library counts: N of M are pruned, "0:0" for no pattern
CASES = {
    "half": (0.5, 0, 0),
    "30%": (0.3, 0, 0),
    "2:4": (0.5, 2, 4),
    "4:8": (0.5, 4, 8),
    "2:8": (0.5, 2, 8),
}


def linear_of(W: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data.copy_(W)
    return linear


def wanda(W: torch.Tensor, X: torch.Tensor, case: tuple) -> torch.Tensor:
    linear = linear_of(W)
    sums = wanda_sparsify.make_empty_row_scalars(linear)
    sums, _ = wanda_sparsify.accumulate_row_scalars(X, linear, sums, 0)
    return wanda_sparsify.sparsify_weight(linear, {linear: sums}, *case)


def sparsegpt(W: torch.Tensor, X: torch.Tensor, case: tuple) -> torch.Tensor:
    linear = linear_of(W)
    H = sgpt_sparsify.make_empty_hessian(linear)
    H, _ = sgpt_sparsify.accumulate_hessian(X, linear, H, 0)
    _, W_hat = sgpt_sparsify.sparsify_weight(
        linear, {linear: H}, *case, BLOCK, 0.01, False
    )
    return W_hat


def main() -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 48)
    X = torch.randn(100, 48) @ torch.randn(48, 48) * torch.logspace(-0.5, 0.5, 48)
    X[:, 20] = 0  # a dead column
    wide = torch.randn(3, 100)
    kept = {"W": W, "X": X, "wide": wide, "tied": torch.ones(3, 8)}
    with torch.no_grad():
        for name, case in CASES.items():
            kept[f"wanda {name}"] = wanda(W, X, case)
            kept[f"sparsegpt {name}"] = sparsegpt(W, X, case)
        kept["wanda 0.29 of 100"] = wanda(wide, torch.eye(100), (0.29, 0, 0))
        for name in ("half", "2:4"):
            case = CASES[name]
            kept[f"wanda tied {name}"] = wanda(kept["tied"], torch.eye(8), case)
            kept[f"sparsegpt tied {name}"] = sparsegpt(kept["tied"], torch.eye(8), case)
    versions = {
        name: version(name) for name in ("llmcompressor", "torch", "transformers")
    }
    FILE.parent.mkdir(exist_ok=True)
    kept = {name: tensor.detach().contiguous() for name, tensor in kept.items()}
    save_file(kept, FILE, metadata=versions)
    print(versions, FILE.stat().st_size)


if __name__ == "__main__":
    main()
