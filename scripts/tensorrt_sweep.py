"""Calibrators on the whole real model: llmlab/compilers/data/tensorrt.csv.

    python scripts/tensorrt_sweep.py            continue, a line a run (20 seconds);
                                                Ctrl-C loses at most one run
    python scripts/tensorrt_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct as TensorRT would quantise them: one scale for
each input, found once by calibration; one scale for each row of a weight, its largest
|w| / 127. Calibration: 1,024 tokens of the training addresses, 256 at a time, from
places that the seed draws. Judged: the first 1,025 tokens of the held-out addresses,
and 100 pairs of sentences of which one is grammatical.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import torch
from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor

from llmlab.compilers.tensorrt import (
    FORMATS,
    RUNS_FILE,
    Histogram,
    by_percentile,
    counted,
    scale_of,
)
from llmlab.compression import compression_compared as compared
from llmlab.compression import walk
from llmlab.models import language_model

BINS = 2048
JUDGED = 1024
TOKENS = 1024  # to calibrate on
PAIRS = 20  # of each of five phenomena
METHODS = ("max", "entropy", "mse", "99.999%", "99.99%", "99.9%")

# format of inputs, method, what stays in floats, seed of the calibration's places
RUNS = [
    ("float", "weights only", "", 0),
    *(("int8", method, "", seed) for seed in range(3) for method in METHODS),
    ("e4m3", "max", "", 0),
    ("e4m3", "mse", "", 0),
    ("e5m2", "max", "", 0),
    ("int8", "max", "down_proj", 0),
    ("int8", "entropy", "down_proj", 0),
    ("int8", "each token", "", 0),
]
FIELDS = [
    "format",
    "method",
    "kept",
    "seed",
    "bpb",  # bits per byte of text
    "right",  # pairs whose grammatical sentence is the more likely
    "clipped",  # share of all inputs, while calibrating, that lie beyond their range
    *MEASURED,  # "gained": under the run "weights only"
    *VERSIONS,
]


class Sweep(RealModel):
    """The model with 8-bit weights, and what judges it."""

    def __init__(self) -> None:
        super().__init__(judged=JUDGED)
        self.pairs = compared.pairs(PAIRS)
        text = self.tokenizer.decode(self.judged[1:].tolist())
        self.num_bytes = len(text.encode())
        self.quantised = deepcopy(self.model)
        self.linears = walk.linears(self.quantised)
        for linear in self.linears.values():
            weight = linear.weight.data
            scale = weight.abs().amax(1, keepdim=True) / 127
            linear.weight.data = FORMATS["int8"].fake(weight, scale)
        self.weights_only = self.losses(self.quantised)
        self.histograms = cache(self.collect)

    def encode(self, text: str) -> list[int]:
        """Text → token ids."""
        return self.tokenizer.encode(text).ids

    def collect(self, seed: int) -> dict[str, Histogram]:
        """A histogram for the input of each linear, in two passes over the text."""
        batches = self.batches("addresses", TOKENS, seed)
        largest = dict.fromkeys(self.linears, 0.0)
        counts = dict.fromkeys(self.linears, 0)

        def widen(name: str, x: Tensor) -> None:
            largest[name] = max(largest[name], float(x.abs().amax()))

        def count(name: str, x: Tensor) -> None:
            counts[name] = counts[name] + counted(x, largest[name], BINS)

        for look in (widen, count):
            with self.watched(look), torch.no_grad():
                for batch in batches:
                    self.quantised(batch)
        return {
            name: Histogram(counts[name], largest[name] / BINS, largest[name])
            for name in self.linears
        }

    @contextmanager
    def watched(self, look) -> Iterator[None]:
        """look(name, input) before each linear; it may return another input."""
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, given, name=name: look(name, given[0])
            )
            for name, linear in self.linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, form: str, method: str, kept: str, seed: int) -> list:
        """One line of the file."""
        key = (form, method, kept, seed)
        if form == "float":
            return self.judge(key, "0", None)
        if method == "each token":

            def by_token(name: str, x: Tensor) -> Tensor:
                scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
                return FORMATS[form].fake(x, scale)

            return self.judge(key, "0", by_token)
        scales, beyond, seen = {}, 0, 0
        for name, h in self.histograms(seed).items():
            if kept and name.endswith(kept):
                continue
            scale = scale_for(h, method, form)
            first = int(scale * FORMATS[form].largest / h.width + 1e-6)
            beyond += int(h.counts[first:].sum())
            seen += int(h.counts.sum())
            scales[name] = scale

        def fixed(name: str, x: Tensor) -> Tensor:
            return FORMATS[form].fake(x, scales[name]) if name in scales else x

        return self.judge(key, f"{beyond / seen:.3g}", fixed)

    def judge(self, key: tuple, clipped: str, look) -> list:
        """The rest of the line, while `look` changes the inputs."""
        with self.watched(look or (lambda name, x: x)):
            losses = self.losses(self.quantised)
            right = compared.preferred(self.quantised, self.encode, self.pairs)
        bits = language_model.bits_per_byte(losses, self.num_bytes)
        more = [f"{bits:.4f}", int(right.sum()), clipped]
        return self.line((*key, *more), losses, self.weights_only)


def scale_for(h: Histogram, method: str, form: str) -> float:
    """By one of METHODS."""
    if method.endswith("%"):
        return by_percentile(h, float(method[:-1])) / FORMATS[form].largest
    return scale_of(h, method, form)


if __name__ == "__main__":
    sweep(__doc__, RUNS_FILE, FIELDS, RUNS, lambda: Sweep().run, shown="bpb")
