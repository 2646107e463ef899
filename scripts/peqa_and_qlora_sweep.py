"""PEQA beside LoRA: llmlab/compression/data/peqa_and_qlora.csv.

    python scripts/peqa_and_qlora_sweep.py            continue, a line a run; Ctrl-C
                                                      loses at most one run
    python scripts/peqa_and_qlora_sweep.py --check 2  run that many lines again, compare

The task is the King James Bible, which neither model was trained to write ("course":
never seen; "real": SmolLM2-135M-Instruct). Each method gets the same examples and as
many steps. Its rate is searched with seed 0 on held-out examples ("dev") that are not
those of the table: three neighbours of the grid 1, 3, 10 …, and the next one as long as
the best lies at an edge, four at most. At that rate the other seeds follow, which draw
other examples and another start.

    before   loss of the quantised model, nothing trained
    loss     after training: PEQA with float32 scales, LoRA with its adapters beside
    stored   as integers again: PEQA with 16-bit scales, LoRA merged and rounded again
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import sweeping
import torch
from torch import nn

from llmlab.compression import peqa_and_qlora as peqa
from llmlab.compression import quantization_basics as qb
from llmlab.compression.peqa_and_qlora import FILE
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models import course_model, real_model
from llmlab.peft import lora, qlora, walk
from llmlab.peft.lora import LoRAConfig
from llmlab.peft.qlora import QLoRAConfig
from llmlab.training import tasks

FIELDS = [
    "model",
    "method",
    "bits",
    "lr",
    "seed",
    "trained",
    "dev",
    "before",
    "loss",
    "stored",
    "torch",
    "python",
]
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST = 4
QV = ("q_proj", "v_proj")
ALL = walk.ALL_LINEAR


@dataclass(frozen=True)
class Method:
    """What is trained, on which grid, and the middle of the first three rates."""

    kind: str
    per: str
    middle: float
    rank: int = 0
    targets: str | tuple[str, ...] = ()


METHODS = {
    "PEQA, rows": Method("peqa", "row", 3e-3),
    "PEQA, groups": Method("peqa", "group", 3e-3),
    "LoRA, q and v, r 4": Method("lora", "row", 1e-2, 4, QV),
    "LoRA, all, r 2": Method("lora", "group", 1e-2, 2, ALL),
    "LoRA, all, r 8": Method("lora", "group", 1e-3, 8, ALL),
    "QLoRA, all, r 8": Method("nf4", "group", 1e-2, 8, ALL),
}
COURSE = ("PEQA, rows", "PEQA, groups", "LoRA, q and v, r 4", "LoRA, all, r 2")
# model, method, bits, seeds
PLAN = [
    *(("course", name, 3, (0, 1, 2)) for name in COURSE),
    ("course", "QLoRA, all, r 8", 4, (0, 1, 2)),
    *(("course", name, 2, (0, 1, 2)) for name in COURSE),
    ("real", "PEQA, groups", 3, (0,)),
    ("real", "LoRA, all, r 8", 3, (0,)),
    *(("course", name, 4, (0, 1, 2)) for name in COURSE),
]
# the real model: examples per step, steps, the rates that are tried
REAL_SIZE, REAL_STEPS = 3, 15
REAL_RATES = {"PEQA, groups": (1e-4, 3e-4), "LoRA, all, r 8": (3e-3, 1e-2)}


def grid_of(model: str, method: Method, bits: int) -> QuantConfig:
    """Affine levels of least squared error; groups of 32, or of 64 in the real one."""
    size = 32 if model == "course" else 64
    return QuantConfig(
        bits, symmetric=False, per=method.per, group_size=size, calibration="mse"
    )


class Sweep:
    """The models, and what they are trained and judged on."""

    def __init__(self) -> None:
        self.rounded: dict[tuple, nn.Module] = {}
        self.before: dict[tuple, float] = {}
        self.tokenizers = {"course": course_model.load_tokenizer()}

    def load(self, model: str) -> nn.Module:
        return course_model.load() if model == "course" else real_model.load()

    def tokenizer(self, model: str):
        if model not in self.tokenizers:
            self.tokenizers[model] = real_model.load_tokenizer()
        return self.tokenizers[model]

    def examples(self, model: str, seed: int) -> list:
        size, steps = (8, 30) if model == "course" else (REAL_SIZE, REAL_STEPS)
        tokenizer = self.tokenizer(model)
        return tasks.make("bible", tokenizer, seed=seed, batches=steps, size=size)

    def score(self, model: str, trained: nn.Module, seed: int) -> float:
        """The loss on held-out verses: seed 1 to choose by, seed 0 to report."""
        batches = (2 if seed else 4) if model == "course" else (1 if seed else 2)
        held_out = tasks.make(
            "bible", self.tokenizer(model), "valid", seed, batches, size=16
        )
        return tasks.score(trained, held_out)[0]

    def quantised(self, model: str, method: Method, bits: int) -> nn.Module:
        """The packed model that PEQA and LoRA begin with, computed once."""
        grid = grid_of(model, method, bits)
        key = (model, grid)
        if key not in self.rounded:
            self.rounded[key] = qb.apply(self.load(model), grid)
        return deepcopy(self.rounded[key])

    def begin(self, model: str, method: Method, bits: int, seed: int) -> nn.Module:
        """The model as it is before the first step."""
        random = torch.Generator().manual_seed(seed)
        if method.kind == "nf4":
            config = QLoRAConfig(method.rank, target_modules=method.targets)
            return qlora.apply(self.load(model), config, generator=random)
        if method.kind == "peqa":
            return peqa.train_scales(self.quantised(model, method, bits))
        config = LoRAConfig(method.rank, 2 * method.rank, target_modules=method.targets)
        floats = qb.round_weights(self.load(model), grid_of(model, method, bits))
        return lora.apply(floats, config, generator=random)

    def stored(self, model: str, method: Method, bits: int, trained: nn.Module):
        """The trained model in integers alone."""
        if method.kind == "peqa":
            return peqa.store(trained)
        if method.kind == "nf4":
            config = QLoRAConfig(method.rank, target_modules=method.targets)
            return qlora.quantize(qlora.merge_and_unload(trained), config)
        merged = lora.merge_and_unload(trained)
        return qb.round_weights(merged, grid_of(model, method, bits))

    def run(self, model: str, name: str, bits: int, lr: float, seed: int) -> dict:
        """One line of the file."""
        method = METHODS[name]
        trained = self.begin(model, method, bits, seed)
        key = (model, method.kind, method.per, bits)
        if key not in self.before:  # no seed changes it: Δs and B begin as zeros
            self.before[key] = self.score(model, trained, 0)
        before = self.before[key]
        tasks.fit(trained, self.examples(model, seed), lr)
        dev = self.score(model, trained, 1)
        loss = self.score(model, trained, 0)
        count = walk.trainable(trained)[0]
        after = self.score(model, self.stored(model, method, bits, trained), 0)
        values = [f"{value:.4f}" for value in (dev, before, loss, after)]
        line = [model, name, bits, lr, seed, count, *values]
        line += [*sweeping.versions()]
        return dict(zip(FIELDS, line, strict=True))


def searched(model: str, name: str, bits: int) -> dict[float, float]:
    """Dev loss of each rate tried with seed 0; infinite where a run diverged."""
    found = {}
    for run in sweeping.read(FILE):
        same = (run["model"], run["method"], run["bits"]) == (model, name, str(bits))
        if same and run["seed"] == "0":
            dev = float(run["dev"])
            found[float(run["lr"])] = dev if dev == dev else float("inf")
    return found


def next_rate(model: str, name: str, dev: dict[float, float]) -> float | None:
    """The rate to try next; None when the search is over."""
    middle = GRID.index(METHODS[name].middle)
    first = GRID[middle - 1 : middle + 2]
    if model == "real":
        first = REAL_RATES[name]
    for rate in first:
        if rate not in dev:
            return rate
    if model == "real" or len(dev) >= MOST:
        return None
    best = GRID.index(min(dev, key=dev.get))
    for i in (best - 1, best + 1):
        if 0 <= i < len(GRID) and GRID[i] not in dev:
            return GRID[i]
    return None


def plan() -> Iterator[tuple[str, str, int, float, int]]:
    """The runs still to do; each adds a line to the file, which is read again."""
    for model, name, bits, seeds in PLAN:
        lr = next_rate(model, name, searched(model, name, bits))
        while lr is not None:
            yield model, name, bits, lr, 0
            lr = next_rate(model, name, searched(model, name, bits))
        dev = searched(model, name, bits)
        best = min(dev, key=dev.get)
        done = set()
        for run in sweeping.read(FILE):
            done.add(tuple(run[field] for field in FIELDS[:5]))
        for seed in seeds[1:]:
            if (model, name, str(bits), str(best), str(seed)) not in done:
                yield model, name, bits, best, seed


def main() -> None:
    check = sweeping.asked(__doc__)
    torch.set_num_threads(1)
    sweep = Sweep()
    if check:
        for run in sweeping.read(FILE)[:check]:
            key = (run["model"], run["method"], int(run["bits"]))
            now = sweep.run(*key, float(run["lr"]), int(run["seed"]))
            print(*key, f"{run['loss']} then, {now['loss']} now")
        return
    for run in plan():
        line = sweep.run(*run)
        sweeping.append(FILE, line)


if __name__ == "__main__":
    main()
