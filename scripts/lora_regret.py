"""LoRA against full fine-tuning, and LoRA's variants: llmlab/peft/data/*.json.

    python scripts/lora_regret.py             regret.json: continue the sweep; Ctrl-C
                                              loses at most one run
    python scripts/lora_regret.py --variants  variants.json: the same for the variants
    python scripts/lora_regret.py --muon      muon.json: full fine-tuning by Muon
    python scripts/lora_regret.py --check 3   run some again, the first steps of each,
                                              and compare

The claims are those of "LoRA Without Regret".

Schulman and Thinking Machines Lab 2025, https://thinkingmachines.ai/blog/lora/. Their
settings where they matter: a constant rate, α = 32 for every rank, no weight decay,
AdamW. The course model learns the King James Bible, 512 tokens a step.

One rule for every method: the rate is searched on a grid of factors of two, from three
neighbours, and as long as the best of them lies at an edge, after `SHORT` steps or
after all, the next one beyond is tried too. Every rate is run with three seeds. A loss
is held-out; the rate is chosen by "dev", and "test", on other text, is what is told.
The seed draws both the batches and A. Variants: three seeds more at the rate that is
best with seed 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from llmlab.models import course_model
from llmlab.models.llama import Llama
from llmlab.peft import lora, walk
from llmlab.training import pretraining

ROOT = Path(__file__).parents[1]
DATA = ROOT / "llmlab" / "peft" / "data"
MARKS = (10, 20, 40, 80, 160)  # the steps after which losses are taken
SHORT = 20
ALPHA = 32
GRID = tuple(1e-3 * 2.0**k for k in range(-4, 10))
MOST = 8  # rates
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Method:
    """What is trained. `r` None: the linears in full."""

    name: str
    r: int | None
    targets: str | tuple[str, ...] = "all-linear"
    middle: float = 1.6e-2  # of the first three rates
    alpha: float = ALPHA
    options: dict = field(default_factory=dict)  # of LoRAConfig
    muon: bool = False  # else AdamW


METHODS = (
    Method("full", None, middle=2e-3),
    Method("r=1", 1),
    Method("r=4", 4),
    Method("r=16", 16),
    Method("r=64", 64),
    # the same number of trained parameters on both sides: 43,008
    Method("attention, r=12", 12, ATTENTION),
    Method("MLP, r=7", 7, MLP),
)


def variant(name: str, **options) -> Method:
    """LoRA of rank 8 on all linears, with something changed."""
    return Method(name, 8, middle=8e-3, alpha=16, options=options)


VARIANTS = (
    variant("LoRA"),
    variant("rsLoRA", rslora=True),
    variant("PiSSA", init="pissa"),
    variant("OLoRA", init="olora"),
    variant("DoRA", dora=True),
)


MUON = (Method("full, Muon", None, middle=2e-3, muon=True),)


@dataclass(frozen=True)
class Study:
    """Which methods are run, with which seeds, and where it is written."""

    command: str
    file: Path
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    marks: tuple[int, ...] = MARKS
    everywhere: int = 3  # so many seeds run every rate, the others seed 0's best

    def read(self) -> list[dict]:
        """The runs that are in the file."""
        if not self.file.exists():
            return []
        return json.loads(self.file.read_text(encoding="utf-8"))["runs"]


REGRET = Study(
    "python scripts/lora_regret.py",
    DATA / "regret.json",
    METHODS,
    (0, 1, 2),
)
SEVERAL = Study(
    "python scripts/lora_regret.py --variants",
    DATA / "variants.json",
    VARIANTS,
    (0, 1, 2, 3, 4, 5),
    marks=(20, 80),
)


BY_MUON = Study(
    "python scripts/lora_regret.py --muon",
    DATA / "muon.json",
    MUON,
    (0, 1, 2),
)


def adapted(method: Method, seed: int) -> Llama:
    """The course model, ready to be trained by `method`."""
    torch.manual_seed(seed)
    model = course_model.load().requires_grad_(False)
    if method.r is None:
        for linear in walk.find(model, method.targets).values():
            linear.requires_grad_(True)
    else:
        config = lora.LoRAConfig(
            r=method.r,
            alpha=method.alpha,
            target_modules=method.targets,
            **method.options,
        )
        lora.apply(model, config)
    return model


def texts() -> dict[str, Int[Tensor, "N"]]:
    """The Bible's tokens: to train on, to choose by, to report."""
    tokenizer = course_model.load_tokenizer()

    def encode(text: str) -> Int[Tensor, "N"]:
        return torch.tensor(tokenizer.encode(text).ids)

    held_out = encode(course_model.corpus("bible", "valid"))
    half = len(held_out) // 2
    return {
        "train": encode(course_model.corpus("bible")[:1_600_000]),
        "dev": held_out[:half],
        "test": held_out[half:],
    }


def run(
    method: Method,
    rate: float,
    seed: int,
    text: dict[str, Int[Tensor, "N"]],
    marks: tuple[int, ...] = MARKS,
) -> dict:
    """One training; the held-out losses after each of `marks` steps."""
    recipe = pretraining.Recipe(
        marks[-1],
        batch=4,
        context=128,
        peak_lr=rate,
        warmup=0,
        weight_decay=0.0,
        seed=seed,
    )
    model = adapted(method, seed)
    optimizer = pretraining.make_optimizer(model, recipe)
    if method.muon:
        optimizer = muon(model, rate)
    losses: dict[str, list[float]] = {"dev": [], "test": []}
    for step in range(recipe.steps):  # the rate is never changed
        batch = pretraining.sample_batch(text["train"], recipe, step)
        pretraining.training_step(model, optimizer, batch, recipe.clip)
        if step + 1 in marks:
            for part, found in losses.items():
                loss = pretraining.evaluate(model, text[part], 128, windows=32)
                found.append(round(loss, 4))
    return {"method": method.name, "rate": rate, "seed": seed, **losses}


def muon(model: Llama, rate: float) -> torch.optim.Muon:
    """PyTorch's, on all linears, with its rate scaled to an update of AdamW's size."""
    linears = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Muon(
        linears, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )


def next_rate(
    method: Method, dev: dict[float, list[float]], marks: tuple[int, ...]
) -> float | None:
    """The rate to try next, given seed 0's dev losses at each mark so far.

    None: the best rates after `SHORT` steps and after all have neighbours on either
    side, or `MOST` have been tried.
    """
    middle = min(range(len(GRID)), key=lambda i: abs(GRID[i] - method.middle))
    for rate in GRID[middle - 1 : middle + 2]:
        if rate not in dev:
            return rate
    if len(dev) >= MOST:
        return None
    for mark in (marks[-1], SHORT):
        place = GRID.index(best_rate(dev, marks.index(mark)))
        for i in (place - 1, place + 1):
            if 0 <= i < len(GRID) and GRID[i] not in dev:
                return GRID[i]
    return None


def best_rate(dev: dict[float, list[float]], k: int = -1) -> float:
    """The rate with the least loss at the k-th mark."""
    return min(dev, key=lambda rate: dev[rate][k])


def losses_of(runs: list[dict], method: str, seed: int) -> dict[float, list[float]]:
    """Dev losses of each rate that was run with this seed."""
    found = {}
    for old in runs:
        if old["method"] == method and old["seed"] == seed:
            found[old["rate"]] = old["dev"]
    return found


def plan(study: Study, runs: list[dict]) -> Iterator[tuple[Method, float, int]]:
    """The runs still to do; `runs` grows meanwhile."""
    for method in study.methods:
        dev = losses_of(runs, method.name, 0)
        while (rate := next_rate(method, dev, study.marks)) is not None:
            yield method, rate, 0
            dev = losses_of(runs, method.name, 0)
    for seed in study.seeds[1:]:
        for method in study.methods:
            dev = losses_of(runs, method.name, 0)
            rates = [best_rate(dev)]
            if seed < study.everywhere:
                rates = sorted(dev)
            done = losses_of(runs, method.name, seed)
            for rate in rates:
                if rate not in done:
                    yield method, rate, seed


def write(study: Study, runs: list[dict]) -> None:
    """All runs, a line each, under what made them."""
    head = {
        "command": study.command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "steps": study.marks,
        "trained": {m.name: walk.trainable(adapted(m, 0))[0] for m in study.methods},
    }
    lines = ",\n  ".join(json.dumps(row) for row in runs)
    text = json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n  {lines}\n ]\n}}\n'
    part = study.file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(study.file)


def check(study: Study, count: int) -> None:
    """Run some again for their first marks: losses must come out within 0.02."""
    text = texts()
    runs = study.read()
    methods = {method.name: method for method in study.methods}
    for old in runs[:: max(1, len(runs) // count)][:count]:
        method = methods[old["method"]]
        new = run(method, old["rate"], old["seed"], text, study.marks[:1])
        before, after = old["test"][0], new["test"][0]
        print(method.name, old["rate"], before, after)
        if abs(before - after) > 0.02:
            raise SystemExit(f"{method.name}: {before} then, {after} now")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--check", type=int, default=0, metavar="N")
    options = parser.parse_args()
    study = REGRET
    if options.variants:
        study = SEVERAL
    if options.muon:
        study = BY_MUON
    torch.set_num_threads(1)
    if options.check:
        check(study, options.check)
        return
    text = texts()
    runs = study.read()
    for method, rate, seed in plan(study, runs):
        row = run(method, rate, seed, text, study.marks)
        runs.append(row)
        write(study, runs)
        print(method.name, f"{rate:g}", seed, row["test"], flush=True)


if __name__ == "__main__":
    main()
