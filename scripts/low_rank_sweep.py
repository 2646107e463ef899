"""Rounding with and without LoRC, on the whole real model: data/low_rank.csv.

    python scripts/low_rank_sweep.py            continue, a line a run; Ctrl-C loses one
    python scripts/low_rank_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct. What is read to judge: the first 2,049 tokens
of the held-out addresses, 256 at a time. What activation-aware factors read: runs of
256 tokens from random places of the other addresses (or of the King James Bible, "aware
bible"), drawn by the seed. Factors are stored in 8 bits. Those of a lower rank are the
first of those of a higher one.
"""

from __future__ import annotations

from copy import deepcopy

import sweeping
import torch
from torch import Tensor

from llmlab.compression import calibration, walk
from llmlab.compression.low_rank import (
    FILE,
    FP4,
    MXFP4,
    NVFP4,
    LowRankConfig,
    LowRankLinear,
    bits_per_weight,
    lorc,
    svd,
)
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models import course_model, language_model, real_model

GRIDS = {
    "int4 row": QuantConfig(4, per="row"),
    "int4 g64": QuantConfig(4, group_size=64),
    "fp4 g64": FP4,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "none": None,
}
# format, method, ranks, seed, inputs
JOBS = [
    ("int4 row", "lorc", (0, 8, 32), 0, "float"),
    ("int4 row", "aware", (8, 32), 0, "float"),
    ("mxfp4", "lorc", (0, 8, 32), 0, "float"),
    ("mxfp4", "aware", (8, 32), 0, "float"),
    ("int4 g64", "lorc", (0, 8, 32), 0, "float"),
    ("int4 g64", "aware", (8,), 0, "float"),
    ("none", "svd", (0,), 0, "float"),
    ("none", "svd aware", (0,), 0, "float"),
    ("nvfp4", "lorc", (0, 8), 0, "float"),
    ("nvfp4", "aware", (8,), 0, "float"),
    ("fp4 g64", "lorc", (0, 8), 0, "float"),
    ("mxfp4", "aware", (8,), 1, "float"),
    ("mxfp4", "aware bible", (8,), 0, "float"),
]
FIELDS = [
    "format",
    "method",
    "rank",
    "seed",
    "inputs",
    "bits",  # per weight of the linears
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the float model
    "grown_error",  # its standard error
    "gained",  # under the same format without factors
    "gained_error",
    "torch",
    "python",
]
TOKENS = 2048  # to calibrate
LENGTH = 256
SVD_BITS = 4.5  # what compression by SVD alone may take per weight, with 8-bit factors


class Sweep:
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        self.model = real_model.load()
        self.linears = walk.linears(self.model)
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 20_000)[:2049]
        self.float_losses = self.losses(self.model)
        self.plain: dict[str, Tensor] = {}  # of each format without factors
        self.grams: dict[tuple, dict[str, Tensor]] = {}

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: torch.nn.Module) -> Tensor:
        return language_model.token_losses(model, self.judged, context=256)

    def gram(self, name: str, seed: int) -> dict[str, Tensor]:
        """X Xᵀ of every linear, for one draw of a text; only the last is kept."""
        if (name, seed) not in self.grams:
            known = self.tokens(name, "train", 400_000)
            batches = calibration.sample(known, LENGTH, TOKENS // LENGTH, seed)
            seen = calibration.inputs(self.model, self.linears, batches)
            self.grams = {(name, seed): {k: s.gram for k, s in seen.items()}}
        return self.grams[name, seed]

    def found(self, kind: str, method: str, rank: int, seed: int):
        """Every linear compressed with this rank, its largest."""
        aware = "aware" in method
        text = "bible" if "bible" in method else "addresses"
        gram = self.gram(text, seed) if aware else {}
        bits = SVD_BITS if kind == "none" else None
        config = LowRankConfig(GRIDS[kind], rank, 8, aware, bits=bits)
        made = {}
        for name, linear in self.linears.items():
            W = linear.weight.detach().float()
            base = None
            if kind != "none":
                base = lorc.rounded(W, GRIDS[kind])
                W = W - base.weight
            size = config.rank_of(*W.shape)
            factors = None
            if size and aware:
                factors = svd.truncate_whitened(W, gram[name], size, config.damping)
            elif size:
                factors = svd.truncate(W, size)
            made[name] = (base, factors)
        return config, made

    def lines(self, kind, method, ranks, seed, inputs):
        """The lines of one job: the ranks share one decomposition."""
        config, made = self.found(kind, method, max(ranks), seed)
        for rank in ranks:
            one = LowRankConfig(
                config.grid,
                rank,
                8,
                config.aware,
                bits=config.bits,
                fp8_inputs=inputs == "fp8",
            )
            model = deepcopy(self.model)
            total = weights = 0
            for name, (base, factors) in made.items():
                out, columns = self.linears[name].weight.shape
                total += bits_per_weight(one, out, columns) * out * columns
                weights += out * columns
                kept = self.kept(factors, one.rank_of(out, columns))
                result = lorc.LowRank(base, kept)
                if inputs == "fp8":
                    bias = self.linears[name].bias
                    linear = LowRankLinear(result, one, bias)
                    walk.put_modules(model, {name: linear})
                else:
                    walk.put_weights(model, {name: result.weight})
            losses = self.losses(model)
            key = f"{kind} {inputs}"
            if rank == 0 and kind != "none":
                self.plain[key] = losses
            yield self.line(kind, method, rank, seed, inputs, total / weights, losses)

    def kept(self, factors, rank):
        """The first `rank` of the factors, as they are stored."""
        if rank == 0:
            return None
        A, B = factors
        return lorc.stored_factors(A[:, :rank], B[:rank], 8)

    def line(self, kind, method, rank, seed, inputs, bits, losses) -> dict:
        reference = self.plain.get(f"{kind} {inputs}", self.float_losses)
        line = [kind, method, rank, seed, inputs, f"{bits:.4f}"]
        line += sweeping.measured(losses, self.float_losses, reference)
        line += [*sweeping.versions()]
        return dict(zip(FIELDS, line, strict=True))


def main() -> None:
    check = sweeping.asked(__doc__)
    done = {
        tuple(line[name] for name in FIELDS[:5]): line for line in sweeping.read(FILE)
    }
    sweep = Sweep()
    checked = 0
    for kind, method, ranks, seed, inputs in JOBS:
        keys = [(kind, method, str(rank), str(seed), inputs) for rank in ranks]
        if check:
            for key, line in zip(
                keys, sweep.lines(kind, method, ranks, seed, inputs), strict=True
            ):
                then, now = done[key]["loss"], line["loss"]
                print(*key, f"{then} then, {now} now", flush=True)
                checked += 1
                if checked == check:
                    return
            continue
        if all(key in done for key in keys):
            continue
        if 0 not in ranks and kind != "none" and f"{kind} {inputs}" not in sweep.plain:
            list(sweep.lines(kind, "lorc", (0,), 0, inputs))  # to be compared with
        for key, line in zip(
            keys, sweep.lines(kind, method, ranks, seed, inputs), strict=True
        ):
            if key in done:
                continue
            sweeping.append(FILE, line)


if __name__ == "__main__":
    main()
