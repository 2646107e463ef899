"""All methods of part 06 on the whole real model: data/compression_compared.csv.

    python scripts/compression_compared_sweep.py            continue, a line a recipe
                                                            (half a minute to two)
    python scripts/compression_compared_sweep.py --check 1  run that many lines again
    python scripts/compression_compared_sweep.py --speed    speed and memory of the
                                                            forms that decode, on this
                                                            machine: keep it quiet

Quality: the loss on the first 4,097 tokens of the held-out addresses, 256 at a time,
and the share of 500 pairs of sentences of which the grammatical one is more likely.
Calibration: 2,048 tokens of other addresses. Size: what is really written; floats in 16
bits. Tokenizer files are left out: they are the same for all.

Speed goes to data/compression_speed.csv. Each form is a process of its own, so that
its memory is that of this form alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import gguf
import torch
from sweeping import RealModel, append, measured, sweep, versions
from torch import nn

from llmlab.compression import compression_compared as compared
from llmlab.compression import formats, kernels, recipes
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.compression.recipes import Recipe
from llmlab.models import checkpoint, gguf_import, machine, real_model

JUDGED = 4096
PAIRS = 100  # of each phenomenon
TOKENS = 2048  # to calibrate on

# name on the page: the recipe, or gguf's name of a type, and the bits of the embedding
RECIPES: dict[str, tuple[Recipe | str | None, int]] = {
    "floats": (None, 16),
    "rtn 4 g64": (Recipe("rtn"), 16),
    "rtn 8 row": (Recipe("rtn", 8, None), 16),
    "gptq 4 g64": (Recipe("gptq-act-order"), 16),
    "sparsegpt 2:4": (Recipe("sparsegpt", pattern="2:4"), 16),
    "smoothquant": (Recipe("smoothquant"), 16),
    "awq 4 g64": (Recipe("awq", symmetric=False), 16),
    "rtn 3 g64": (Recipe("rtn", 3), 16),
    "gptq 3 g64": (Recipe("gptq-act-order", 3), 16),
    "gptq 4 g64, e8": (Recipe("gptq-act-order"), 8),
    "lorc 4 g64": (Recipe("lorc"), 16),
    "nvfp4": (Recipe("nvfp4"), 16),
    "wanda 50%": (Recipe("wanda"), 16),
    "zeroquant 4/8": (Recipe("zeroquant"), 16),
    "rtn 8 row, e8": (Recipe("rtn", 8, None), 8),
    "llm.int8": (Recipe("llm-int8"), 16),
    "magnitude 50%": (Recipe("magnitude"), 16),
    "gguf Q4_0": ("Q4_0", 8),
    "gguf Q8_0": ("Q8_0", 8),
    "mxfp4": (Recipe("mxfp4"), 16),
    "sparsegpt 50%": (Recipe("sparsegpt"), 16),
    "rtn 2 g64": (Recipe("rtn", 2), 16),
    "gptq 4 g64, e4": (Recipe("gptq-act-order"), 4),
    "rtn 4 row": (Recipe("rtn", group=None), 16),
}
if "llm-pruner" in recipes.METHODS:
    RECIPES["llm-pruner 25%"] = (Recipe("llm-pruner", sparsity=0.25), 16)
RUNS = [(name,) for name in RECIPES]
FIELDS = [
    "recipe",
    "form",  # of what was written
    "linear_bits",  # stored bits for each weight of the linears
    "bits",  # for each parameter, embedding and norms with them
    "bytes",  # on disk
    "accuracy",
    "accuracy_error",
    "accuracy_change",  # from that of the float model, pair by pair
    "accuracy_change_error",
    "bpb",  # bits per byte of text
    "bpb_error",
    "seconds",  # that compressing took
    "loss",
    "grown",
    "grown_error",
    "torch",
    "python",
]


class Sweep(RealModel):
    """The model, what judges it, and the float model's verdicts."""

    def __init__(self) -> None:
        super().__init__(judged=JUDGED)
        self.pairs = compared.pairs(PAIRS)
        self.float_right = compared.preferred(self.model, self.encode, self.pairs)
        text = self.tokenizer.decode(self.judged[1:].tolist())
        self.num_bytes = len(text.encode())

    def encode(self, text: str) -> list[int]:
        """Text → token ids."""
        return self.tokenizer.encode(text).ids

    def run(self, name: str) -> list:
        """One line of the file."""
        recipe, embedding = RECIPES[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            started = time.perf_counter()
            model, form = self.made(recipe, embedding, folder)
            taken = time.perf_counter() - started
            size = sum(f.stat().st_size for f in folder.iterdir())
        linear_bits = compared.bits_of_linears(model, torch.float16)
        bits = compared.bits_per_parameter(model, torch.float16)
        if form == "gguf":
            # its names and settings are in the file, too: 0.1%
            bits = 8 * size / compared.parameters(model.config)
            linear_bits = 8 * gguf.GGML_QUANT_SIZES[kind_of(recipe)][1] / 32
        dense = recipes.as_floats(model)
        losses = self.losses(dense)
        right = compared.preferred(dense, self.encode, self.pairs)
        changed = right.double() - self.float_right.double()
        mean, error = losses.double().mean(), losses.std() / len(losses) ** 0.5
        per_byte = len(losses) / self.num_bytes / 0.6931471805599453
        loss, grown, grown_error, *_ = measured(losses, self.float_losses, losses)
        return [
            name,
            form,
            f"{linear_bits:.4f}",
            f"{bits:.4f}",
            size,
            *[f"{value:.4f}" for value in compared.accuracy(right)],
            f"{changed.mean():.4f}",
            f"{changed.std() / len(changed) ** 0.5:.4f}",
            f"{mean * per_byte:.4f}",
            f"{error * per_byte:.4f}",
            f"{taken:.0f}",
            loss,
            grown,
            grown_error,
            *versions(),
        ]

    def made(
        self, recipe: Recipe | str | None, embedding: int, folder: Path
    ) -> tuple[nn.Module, str]:
        """The compressed model as the folder holds it, and the folder's form."""
        model = deepcopy(self.model)
        if isinstance(recipe, str):
            return self.from_gguf(model, recipe, folder)
        if recipe is None:
            checkpoint.save(model.half(), folder)
            return checkpoint.load(folder), "safetensors"
        batches = None
        if recipes.METHODS[recipe.method].reads_text:
            batches = self.batches("addresses", TOKENS, 0)
        recipes.compress(model, recipe, batches)
        if recipe.pattern is not None:
            pruning.pack(model, recipe.pattern)
        stores = recipes.METHODS[recipe.method].stores
        if embedding == 16 and stores == "packed":
            formats.save(model, folder, dtype=torch.float16)
            return formats.load(folder), "compressed-tensors"
        if stores == "floats" and recipe.pattern is None:
            checkpoint.save(model.half(), folder)
            return checkpoint.load(folder), "safetensors"
        if embedding != 16:
            per = "row" if embedding == 8 else "group"
            compared.embedding_in_codes(model, QuantConfig(embedding, per=per))
        compared.write(model, folder / "model.safetensors")
        return model, "own file"

    def from_gguf(self, model, kind: str, folder: Path) -> tuple[nn.Module, str]:
        """A file of llama.cpp, read again."""
        folder.mkdir()
        formats.save_gguf(model, folder / "model.gguf", kind)
        with tempfile.TemporaryDirectory() as scratch:
            # what is read again has a tokenizer, which is not counted
            whole = Path(scratch) / "model.gguf"
            formats.save_gguf(model, whole, kind, tokenizer_from=real_model.path())
            floats = gguf_import.convert(whole, Path(scratch) / "floats")
            return checkpoint.load(floats), "gguf"


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    """gguf's type of that name."""
    return gguf.GGMLQuantizationType[name]


# Speed --------------------------------------------------------------------------------


PROMPT = "The State of the Union is"
SPEED_FIELDS = [
    "form",
    "cpu",
    "threads",
    "bandwidth",  # bytes per second, of a sum over 256 MB
    "traffic",  # bytes that a token reads, half of the decoded tokens in the cache
    "rate",  # tokens per second, the best of three trials
    "held",  # bytes of the model's tensors
    "resident",  # bytes by which the process grew
    "torch",
]


def without_kernel() -> nn.Module:
    """4 bits that are decoded to floats whenever they are used."""
    return recipes.compress(real_model.load(), Recipe("rtn"))


def integers(method: str) -> nn.Module:
    """8-bit codes for weights and inputs, multiplied by PyTorch's integer product."""
    model = real_model.load()
    batch = torch.arange(512).reshape(2, 256)
    return recipes.compress(model, Recipe(method), [batch])


# how each form is made, and how many tokens it decodes: some are slow
FORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "float32": (real_model.load, 24),
    "bfloat16": (lambda: real_model.load(dtype=torch.bfloat16), 24),
    "int8, kernel": (lambda: compared.eight_bits(real_model.load()), 24),
    "int4 g64, kernel": (lambda: kernels.fast(without_kernel()), 24),
    "int4 g64, decoded": (without_kernel, 2),
    "w8a8, PyTorch": (lambda: integers("smoothquant"), 12),
    "llm.int8, PyTorch": (lambda: integers("llm-int8"), 12),
}


def resident() -> int:
    """Bytes of this process's own that are in memory (Linux), freed ones left out.

    Pages of mapped files do not count: the system may drop them.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _, pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - of_files) * os.sysconf("SC_PAGE_SIZE")


def one_form(form: str) -> dict:
    """What a form reads, holds and decodes; in a process of its own."""
    warm = real_model.load_tokenizer().encode(PROMPT).ids
    torch.ones(2, 2) @ torch.ones(2, 2)  # the libraries are loaded
    before = resident()
    make, new = FORMS[form]
    model = make().eval()
    # Weights that are read from a safetensors file lie in its mapping, all of which
    # stays as long as one norm does: copies are this process's own.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    ids = torch.tensor([warm])
    rate = compared.decode_rate(model, ids, new, trials=3 if new > 2 else 1)
    after = resident()
    past = len(warm) + new // 2
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    return {
        "traffic": compared.per_token(model, past, dtype),
        "rate": round(rate, 2),
        "held": sum(compared.stored_bytes(model).values()),
        "resident": after - before,
    }


def speed() -> None:
    """Every form in a process of its own, a line each; the file is written anew."""
    compared.SPEED.unlink(missing_ok=True)
    # large tensors go back to the system when they are freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for form in FORMS:
        if "kernel" in form and not kernels.available():
            print(form, "needs a C compiler: left out", flush=True)
            continue
        found = subprocess.run(
            [sys.executable, __file__, "--form", form],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        line = {
            "form": form,
            "cpu": machine.processor(),
            "threads": torch.get_num_threads(),
            "bandwidth": round(compared.bandwidth()),
            **json.loads(found.stdout),
            "torch": torch.__version__,
        }
        append(compared.SPEED, {field: line[field] for field in SPEED_FIELDS})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--form"]:
        print(json.dumps(one_form(sys.argv[2])))
    elif sys.argv[1:] == ["--speed"]:
        speed()
    else:
        sweep(__doc__, compared.FILE, FIELDS, RUNS, lambda: Sweep().run)
