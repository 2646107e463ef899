"""Surviving a dead rank: complete checkpoints, and a supervisor that starts again.

    a rank dies    the others hang in their next collective, or fail there
    the launcher   notices, kills the rest and starts all ranks again (`supervise`,
                   torchrun --max-restarts)
    each rank      reads the newest checkpoint and goes on from its step (`newest`,
                   `load`)

A run with k steps between checkpoints loses k/2 steps on average for each failure.
Nothing else is lost if a step depends only on its number, the weights and the
optimizer: data must be drawn by step, not by "where the loader happens to be". A
checkpoint is written under another name and renamed when it is complete. A rank that
dies while it writes leaves a file that nobody reads and that the next `save` removes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from llmlab.parallelism.runtime import RankFailed, launch


def save(
    folder: Path | str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
) -> Path:
    """Write the state after `step` steps; the newest `keep` checkpoints stay.

    One rank calls it.

    Raises:
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(
            f"keep={keep} must be at least 1: the newest checkpoint is what a restart"
            " needs"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08}.pt"
    unfinished = folder / f".step-{step:08}.{os.getpid()}"
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, unfinished)
    with open(unfinished, "rb") as file:
        # or the new name may reach the disk before the bytes do
        os.fsync(file.fileno())
    os.replace(unfinished, target)  # at once, on one file system
    never_completed = folder.glob(".step-*")
    too_old = sorted(folder.glob("step-*.pt"))[:-keep]
    for file in [*never_completed, *too_old]:
        file.unlink()
    return target


def newest(folder: Path | str) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(Path(folder).glob("step-*.pt"), default=None)


def load(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the newest checkpoint. Every rank calls it.

    Returns:
        the number of steps that are done; 0 if there is no checkpoint.
    """
    file = newest(folder)
    if file is None:
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def supervise(
    fn: Callable, n: int, *args, restarts: int = 3, timeout: float = 60.0
) -> tuple[list, list[RankFailed]]:
    """`launch`, again after each failure, as `torchrun --max-restarts` does.

    Returns:
        the ranks' results, and the failures on the way.
    Raises:
        RankFailed: a rank failed once more than `restarts` allows; its note says how
            often.
    """
    failures: list[RankFailed] = []
    while True:
        try:
            return launch(fn, n, *args, timeout=timeout), failures
        except RankFailed as error:
            failures.append(error)
            if len(failures) > restarts:
                error.add_note(f"(attempt {len(failures)}, after {restarts} restarts)")
                raise


def lost_share(
    every: float,
    writing: float,
    mean_time_between_failures: float,
    restart: float = 0.0,
) -> float:
    """The share of time that checkpoints and failures cost.

        writing/every + (every/2 + restart)/MTBF        all in seconds

    It is smallest at every = sqrt(2 · writing · MTBF) (Young 1974,
    https://doi.org/10.1145/361147.361115).
    """
    _positive(every=every, mean_time_between_failures=mean_time_between_failures)
    return writing / every + (every / 2 + restart) / mean_time_between_failures


def best_interval(writing: float, mean_time_between_failures: float) -> float:
    """Young's interval between checkpoints, in seconds."""
    _positive(writing=writing, mean_time_between_failures=mean_time_between_failures)
    return (2 * writing * mean_time_between_failures) ** 0.5


def _positive(**seconds: float) -> None:
    for name, value in seconds.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be above 0 seconds")
