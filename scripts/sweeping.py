"""What the sweeps over methods of compression share: texts, judging, and their file.

A sweep is a list of runs, each a line of a CSV file. It goes on where it was stopped,
and with `--check N` the first N runs are made again and compared.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.compression import calibration
from llmlab.models import course_model, language_model, real_model

LENGTH = 256  # tokens that are read at once
# What every line says of its losses, in nats, and what it ends with.
MEASURED = [
    "loss",  # mean over the judged tokens
    "grown",  # over the float model
    "grown_error",  # its standard error
    "gained",  # under the reference of the sweep
    "gained_error",
]
VERSIONS = ["torch", "python"]


class RealModel:
    """SmolLM2-135M-Instruct, the texts, and how it is judged."""

    def __init__(self, judged: int = 2048) -> None:
        self.model = real_model.load()
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 10 * judged)[: judged + 1]
        self.float_losses = self.losses(self.model)

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: nn.Module) -> Tensor:
        """Of each judged token."""
        return language_model.token_losses(model, self.judged, context=LENGTH)

    def batches(self, text: str, tokens: int, seed: int) -> list[Tensor]:
        """Runs of 256 tokens from random places of a text, to calibrate on."""
        known = self.tokens(text, "train", 400_000)
        return calibration.sample(known, LENGTH, tokens // LENGTH, seed)

    def line(self, key: Sequence, losses: Tensor, reference: Tensor) -> list:
        """`key`, MEASURED and VERSIONS."""
        return [*key, *measured(losses, self.float_losses, reference), *versions()]


def measured(losses: Tensor, floats: Tensor, reference: Tensor) -> list[str]:
    """The values of MEASURED."""
    grown = losses - floats
    gained = reference - losses
    values = [losses.mean()]
    for change in (grown, gained):
        values += [change.mean(), change.std() / len(change) ** 0.5]
    return [f"{float(value):.4f}" for value in values]


def versions() -> list[str]:
    """The values of VERSIONS."""
    return [torch.__version__, platform.python_version()]


def read(file: Path) -> list[dict[str, str]]:
    """The lines that are there."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def append(file: Path, line: dict) -> None:
    """One line more, under a header if it is the first."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)
    print(*line.values(), flush=True)


def asked(description: str) -> int:
    """`--check N` of the command line; 0 is to go on."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", type=int, default=0, metavar="LINES")
    return parser.parse_args().check


def sweep(
    description: str,
    file: Path,
    fields: list[str],
    runs: Sequence[tuple],
    runner: Callable[[], Callable[..., list]],
    shown: str = "loss",
) -> None:
    """Make the runs that the file lacks, or some again.

    Args:
        fields: of a line; the first are those of a run.
        runner: makes what makes a run's line, once it is needed.
        shown: the field that `--check` prints, as it was and as it is now.
    """
    check = asked(description)
    width = len(runs[0])
    done = {tuple(line[f] for f in fields[:width]): line for line in read(file)}
    run_of = runner()
    for run in runs[:check] if check else runs:
        key = tuple(map(str, run))
        if not check and key in done:
            continue
        line = dict(zip(fields, run_of(*run), strict=True))
        if check:
            print(*run, f"{done[key][shown]} then, {line[shown]} now", flush=True)
        else:
            append(file, line)
