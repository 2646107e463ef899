"""GPTQ, AWQ, Wanda and SparseGPT beside llmcompressor, on the same data.

llmcompressor does not fit into the course's environment. So this runs in its own:

    pip install llmcompressor==0.14.0.1 jaxtyping
    python -m benchmarks.beside_llmcompressor        (from this folder)

Two layers of SmolLM2's shapes, random weights, inputs that vary together. Each method
is called in turn, ours and theirs, one after the other, and the median of the ratios is
printed. llmcompressor has AWQ as a pass over a whole model: both pass over a Llama of
one block of those shapes, and of theirs only the search of the scales is timed, not the
calibration before it. Ours is timed whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from unittest.mock import patch

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import gptq_quantize
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.case import alternate
from llmlab.compression import awq, gptq
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


# AWQ ----------------------------------------------------------------------------------

ROWS, LENGTH = 8, 256
BLOCK = LlamaConfig(
    vocab_size=512,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=1,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=False,
)


def our_awq(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Seconds of all: reading the text, 20 trials for each seam, and packing."""
    config = awq.AWQConfig(QuantConfig(4, symmetric=False, group_size=GROUP), duo=True)
    fresh = deepcopy(model)
    start = time.perf_counter()
    awq.apply(fresh, list(tokens.split(1)), config)
    return time.perf_counter() - start


def their_awq(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Seconds that the modifier searches and scales: 20 trials for each seam."""
    weights = QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=GROUP
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    seconds = 0.0

    class Timed(AWQModifier):
        def _apply_smoothing(self, model):
            nonlocal seconds
            start = time.perf_counter()
            super()._apply_smoothing(model)
            seconds += time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"{i}": i for i in range(512)}, "0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        fresh = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        data = {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
        }
        grid = QuantizationModifier(
            config_groups={"group_0": scheme}, ignore=["lm_head"]
        )
        oneshot(
            model=fresh,
            processor=folder,
            dataset=Dataset.from_dict(data),
            recipe=[Timed(duo_scaling=True), grid],
            max_seq_length=LENGTH,
            num_calibration_samples=ROWS,
            shuffle_calibration_samples=False,
            pad_to_max_length=False,
        )
    return seconds


def compare_awq(rounds: int = 3) -> tuple[list[float], list[float]]:
    """Seconds of ours and of theirs, in turn; the first of each is not counted."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(BLOCK).eval()
    tokens = torch.randint(512, (ROWS, LENGTH))
    times: tuple[list[float], list[float]] = ([], [])
    # there is no accelerator whose memory could be pinned
    with patch.object(torch.Tensor, "pin_memory", lambda self, *a, **k: self):
        for _ in range(rounds + 1):
            times[0].append(our_awq(model, tokens))
            times[1].append(their_awq(model, tokens))
    return times[0][1:], times[1][1:]


def line(layer: str, name: str, ours: list[float], theirs: list[float]) -> str:
    """A row of the table: medians, and the median of the ratios."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    times = [f"{statistics.median(t) * 1e3:,.0f} ms" for t in (ours, theirs)]
    return f"| {layer} | {name} | {times[0]} | {times[1]} | {ratio:.2f} |"


@torch.no_grad()
def main() -> None:
    print("| layer | method | ours | llmcompressor | ours / theirs |")
    print("|---|---|---|---|---|")
    for layer, shape in SHAPES.items():
        for name, (ours, theirs) in cases(*problem(*shape)).items():
            print(line(layer, name, *alternate(ours, theirs, rounds=5)))
    print(line("block", "AWQ", *compare_awq()))


if __name__ == "__main__":
    main()
