"""What marks the exercises of 05-parallelism/10-frameworks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llmlab.checks.parallelism.ranks import either, explained
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect

check = Checks("05-parallelism/10-frameworks")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "Machines have per_node processes each, and ranks count on from machine to"
            " machine."
        ),
        (
            "RANK = node · per_node + local; LOCAL_RANK = local; WORLD_SIZE = nodes ·"
            " per_node."
        ),
        "Turn the three numbers into strings: str(…).",
    ),
)
def environment(answer):
    """What a launcher tells a process."""
    found = []
    for node, local, nodes, per_node in _processes():
        what = (
            f"environment(node={node}, local={local}, nodes={nodes},"
            f" per_node={per_node})"
        )
        got = expect(answer(node, local, nodes, per_node), kind=dict, what=what)
        if set(got) != set(NAMES):
            raise Mistake(
                f"{what}: RANK, LOCAL_RANK and WORLD_SIZE are asked, not"
                f" {', '.join(map(str, got))}"
            )
        if not all(isinstance(v, str) for v in got.values()):
            raise Mistake(f"{what}: an environment holds strings, not numbers")
        found.append(((node, local, nodes, per_node), got))
    if all(got == _told(*args) for args, got in found):
        return
    for name, mistakes in ENVIRONMENT.items():
        values = [(args, got[name]) for args, got in found]
        if any(value != _told(*args)[name] for args, value in values):
            explained(values, mistakes)
    for args, got in found:
        for name, value in _told(*args).items():
            if got[name] != value:
                node, local, nodes, per_node = args
                raise Mistake(
                    f"environment(node={node}, local={local}, nodes={nodes},"
                    f" per_node={per_node}): {name} is {got[name]!r}"
                )


NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """(node, local, nodes, per_node) of all processes of two clusters."""
    for nodes, per_node in ((3, 4), (2, 5)):
        for node in range(nodes):
            for local in range(per_node):
                yield node, local, nodes, per_node


def _told(node: int, local: int, nodes: int, per_node: int) -> dict[str, str]:
    values = (node * per_node + local, local, nodes * per_node)
    return {name: str(value) for name, value in zip(NAMES, values, strict=True)}


ENVIRONMENT: dict[str, dict[str, Callable]] = {
    "RANK": {
        (
            "ranks count through a machine first: rank 1 is the second process of"
            " machine 0"
        ): lambda node, local, nodes, per_node: str(local * nodes + node),
        (
            "a machine has per_node processes, not as many as there are machines: the"
            " RANK is wrong"
        ): lambda node, local, nodes, per_node: str(node * nodes + local),
        "RANK counts over all machines: every machine would have a rank 0": (
            lambda node, local, nodes, per_node: str(local)
        ),
        "RANK counts processes, not machines": (
            lambda node, local, nodes, per_node: str(node)
        ),
        "RANK: the machines before this one have per_node processes each, not one": (
            lambda node, local, nodes, per_node: str(node + local)
        ),
        "RANK counts from 0": (
            lambda node, local, nodes, per_node: str(node * per_node + local + 1)
        ),
        "RANK is a whole number: '5', not '5.0'": (
            lambda node, local, nodes, per_node: str(float(node * per_node + local))
        ),
    },
    "LOCAL_RANK": {
        "LOCAL_RANK counts within the machine: it chooses the device": (
            lambda node, local, nodes, per_node: str(node * per_node + local)
        ),
        "LOCAL_RANK is the process's number, not the machine's": (
            lambda node, local, nodes, per_node: str(node)
        ),
        "LOCAL_RANK counts from 0": (
            lambda node, local, nodes, per_node: str(local + 1)
        ),
    },
    "WORLD_SIZE": {
        "WORLD_SIZE counts all processes of all machines; these are the machines": (
            lambda node, local, nodes, per_node: str(nodes)
        ),
        "WORLD_SIZE counts all processes of all machines; these are one machine's": (
            lambda node, local, nodes, per_node: str(per_node)
        ),
        "WORLD_SIZE is the number of processes, not the last rank": (
            lambda node, local, nodes, per_node: str(nodes * per_node - 1)
        ),
        "WORLD_SIZE is a product: every machine has per_node processes": (
            lambda node, local, nodes, per_node: str(nodes + per_node)
        ),
    },
}


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "How many data-parallel ranks are there? tp · pp devices together hold one"
            " replica."
        ),
        (
            "Each accumulation step processes micro · devices / (tp · pp) sequences in"
            " all."
        ),
        (
            "Check both divisions with % and raise a ValueError; the answer is batch //"
            " (micro · ranks)."
        ),
    ),
)
def accumulation(answer):
    """Gradient accumulation steps that make the batch add up."""
    for case in (
        (768, 4, 16, 1, 1),
        (2048, 2, 384, 4, 12),
        (96, 2, 24, 2, 3),
        (8, 1, 8, 1, 1),
    ):
        _accumulated(answer, *case)
    for case, why in (
        ((100, 4, 16), "a batch that does not divide"),
        ((64, 1, 10, 4, 1), "devices that do not divide"),
        ((80, 1, 10, 4, 1), "devices that do not divide"),  # though 80 · 4 / 10 is 32
        ((4, 1, 8), "a batch below one microbatch each"),
        ((36, 6, 4), "a batch that 6 · 4 does not divide, though 6 and 4 do"),
        ((5, 1, 36, 4, 6), "devices that 4 · 6 does not divide, though 4 and 6 do"),
        ((8, 1, 4, 8, 1), "devices too few for one replica"),
    ):
        try:
            got = answer(*case)
        except ValueError:
            continue
        except (AssertionError, ArithmeticError) as error:
            raise Mistake(
                f"accumulation{case}: {why} must raise a ValueError; it raises"
                f" {type(error).__name__}"
            ) from error
        raise Mistake(f"accumulation{case} is {got}: {why} must raise a ValueError")


def _accumulated(
    answer, batch: int, micro: int, devices: int, tp: int, pp: int
) -> None:
    """One case in which there is a whole number."""
    what = f"accumulation({batch}, {micro}, {devices}, {tp}, {pp})"
    ranks = devices // (tp * pp)
    try:
        got = answer(batch, micro, devices, tp, pp)
    except ValueError as error:
        raise Mistake(
            f"{what} raises a ValueError, and there is a whole number: tp · pp devices"
            f" together make one of {ranks} data-parallel ranks, each takes micro"
            " sequences at a time"
        ) from error
    expect(got, kind=int, what=what)
    mistakes = {
        "tp · pp devices together make one data-parallel rank": (
            batch // (micro * devices)
        ),
        "pp devices share the same data too": batch // (micro * devices // tp),
        "tp devices share the same data too": batch // (micro * devices // pp),
        "tp · pp devices share the same data, not tp + pp": (
            batch // (micro * devices // (tp + pp))
        ),
        "a rank takes micro sequences at a time: divide by micro too": batch // ranks,
        "this is the batch of one microbatch over all ranks": micro * ranks,
        "this is the number of data-parallel ranks": ranks,
        "every rank has a part of the batch: divide by their number too": (
            batch // micro
        ),
    }
    right = batch // (micro * ranks)
    diagnose(
        got,
        right=right,
        mistakes={k: v for k, v in mistakes.items() if v != right},
        what=what,
    )


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Write down what the engine makes of your factor f: (1 / ranks) Σ_r (1 /"
            " microbatches) Σ_i f · (sum of losses)."
        ),
        "It must be (1 / N) · (sum of all losses), N all tokens of all ranks.",
        "f = ranks · microbatches / N.",
    ),
)
def loss_factor(answer):
    """The factor that makes an engine's averages a mean over tokens."""
    for ranks, microbatches in ((2, 3), (4, 3), (3, 5), (1, 4)):
        tokens = torch.randint(3, 40, (ranks, microbatches)).tolist()
        if ranks == 3:
            tokens[1][2] = 0  # a microbatch of padding alone; the engine counts it
        if ranks == 4:
            for row in tokens:
                row[1] = 0  # on every rank
        what = f"loss_factor of {ranks} ranks with {microbatches} microbatches"
        got = float(
            expect(answer([list(row) for row in tokens]), kind=(int, float), what=what)
        )
        n = sum(map(sum, tokens))
        mistakes = {
            "the engine divides by ranks and by microbatches: multiply by both": 1 / n,
            "the engine divides by the number of microbatches too": ranks / n,
            "the engine averages over ranks too": microbatches / n,
            "N are the tokens of all ranks, not of the first": (
                ranks * microbatches / sum(tokens[0])
            ),
            "N are all tokens, not those of one microbatch": (
                ranks * microbatches / tokens[0][0]
            ),
            "turn the fraction over: the more tokens, the smaller the factor": (
                n / (ranks * microbatches)
            ),
        }
        own = [t for row in tokens for t in row]
        some = [t for t in own if t]
        filled = sum(map(any, zip(*tokens, strict=True)))
        mistakes |= {
            "the engine divides already: multiply by ranks and microbatches": (
                1 / n / (ranks * microbatches)
            ),
            "a factor of 1 leaves sums over tokens: divide by all N of them": 1.0,
            "one factor serves all microbatches: N are all tokens, not one's": (
                1 / tokens[0][0]
            ),
            "N are the tokens of all ranks; these are the first rank's": (
                either(got, microbatches / sum(tokens[0]), 1 / sum(tokens[0]))
            ),
            "N is the sum of all tokens, not the largest microbatch": 1 / max(own),
            "a mean of shares is no share: divide by the sum of all tokens": (
                sum(1 / t for t in some) / len(some)
            ),
            "a microbatch without tokens counts as well: the engine divides by all": (
                either(got, len(some) / n, ranks * filled / n)
            ),
            "`//` cuts off what is behind the point: the factor is below 1": 0.0,
        }
        right = ranks * microbatches / n
        known = {k: v for k, v in mistakes.items() if abs(v / right - 1) > 1e-9}
        diagnose(got, right=right, mistakes=known, tol=1e-9, what=what)


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    in_place=True,
    hints=(
        (
            "Write under a name that nobody takes for a checkpoint, and give it the"
            " right name when it is complete."
        ),
        (
            "`write(unfinished)`, then `unfinished.replace(target)`, both in the same"
            " folder. Only then delete the old ones."
        ),
        "sorted(folder.glob('step-*.pt'))[:-keep] are those to delete.",
    ),
)
def save(answer):
    """A checkpoint that is complete or not there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in OTHERS:
            (folder / other).write_text("not a checkpoint")
        for step in (9, 10, 100):
            written: list[Path] = []
            path = expect(
                answer(folder, step, _writer(step, written)),
                kind=Path,
                what=f"save(folder, {step}, write)",
            )
            _check_saved(folder, step, path)
            _check_renamed(folder, path, written)
        _check_crash(answer, folder, 101)
        _check_crash(answer, folder, 100)  # the newest once more
        _check_never_gone(answer, folder, 100)
    for keep, steps in ((3, (1, 2, 3, 5, 8, 13)), (1, (7, 30))):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for step in steps:
                answer(folder, step, _writer(step, []), keep=keep)
            left = sorted(p.name for p in folder.glob("step-*.pt"))
            if left != [f"step-{s:08}.pt" for s in steps[-keep:]]:
                raise Mistake(
                    f"with keep={keep}, after steps {', '.join(map(str, steps))},"
                    f" {left} are left: the newest {NUMBERS[keep]} asked"
                )


OTHERS = ("a-model.pt", "notes.txt")  # what else lies in the folder
NUMBERS = {1: "one is", 3: "three are"}


def _writer(step: int, written: list[Path]) -> Callable[[Path], None]:
    """Writes a checkpoint, and notes where, and which file it is."""

    def write(path: Path) -> None:
        path.write_text(f"complete {step}")
        written[:] = [path, path.stat().st_ino]

    return write


def _check_renamed(folder: Path, path: Path, written: list) -> None:
    """The checkpoint must be the file that was written, in the same folder."""
    if not written:
        raise Mistake("save did not call write(path)")
    where, number = written
    if folder.resolve() not in where.resolve().parents:
        raise Mistake(
            "the unfinished file is in another folder, which may be on another disk:"
            " from there it is copied, and a copy can be half done. Write it in"
            " `folder`"
        )
    if path.stat().st_ino != number:
        raise Mistake(
            "the checkpoint is a copy of what was written, and for a moment half of"
            " one: rename the file, which is one step"
        )


def _check_saved(folder: Path, step: int, path: Path) -> None:
    target = folder / f"step-{step:08}.pt"
    if not target.exists():
        there = [p.name for p in folder.iterdir()]
        raise Mistake(
            f"after save(folder, {step}, write) there is no {target.name}, but {there}"
        )
    if path != target:
        raise Mistake(
            f"save returned {path.name}: return the path of the checkpoint,"
            f" {target.name}"
        )
    if target.read_text() != f"complete {step}":
        raise Mistake(f"{target.name} does not hold what write wrote for step {step}")
    names = {p.name for p in folder.iterdir()}
    for other in OTHERS:
        if other not in names:
            raise Mistake(
                f"{other}, which is no checkpoint, was deleted: old ones are named"
                " step-….pt"
            )
    rest = sorted(n for n in names - {*OTHERS} if not n.startswith("step-"))
    if rest:
        raise Mistake(f"{rest} is left over: rename it, or remove it")


def _check_never_gone(answer, folder: Path, step: int) -> None:
    """A checkpoint that is written once more must be there until it is replaced."""
    target = folder / f"step-{step:08}.pt"
    there = []

    def watched(rename: Callable) -> Callable:
        def renames(*args: Any, **kwargs: Any) -> Any:
            there.append(target.exists())
            return rename(*args, **kwargs)

        return renames

    with (
        patch.object(os, "rename", watched(os.rename)),
        patch.object(os, "replace", watched(os.replace)),
    ):
        answer(folder, step, _writer(step, []))
    if not all(there):
        raise Mistake(
            f"{target.name}, written once more, is deleted before the new one has its"
            " name: for a moment there is none. `path.replace(target)` takes the place"
            " of what is there in one step"
        )


def _check_crash(answer, folder: Path, step: int) -> None:
    """What a reader sees while a checkpoint is written, and after the writer died."""
    before = sorted(p.name for p in folder.glob("step-*.pt"))
    seen: list[list[str]] = []

    def dies(path: Path) -> None:
        path.write_text("half of")
        seen.append(sorted(p.name for p in folder.glob("step-*.pt")))
        raise OSError("no space left on device")

    try:
        answer(folder, step, dies)
    except OSError:
        pass
    else:
        raise Mistake(
            "write failed and save did not: let the error through, or nobody notices"
            " that there is no checkpoint"
        )
    if not seen:
        raise Mistake("save did not call write(path)")
    during, after = seen[0], sorted(p.name for p in folder.glob("step-*.pt"))
    if set(during) - set(before):
        raise Mistake(
            "while it is written, half a checkpoint has the name"
            f" {(set(during) - set(before)).pop()}: a restart would read it"
        )
    if set(before) - set(during):
        raise Mistake(
            f"{(set(before) - set(during)).pop()} is deleted before the new checkpoint"
            " is complete"
        )
    if after != before:
        raise Mistake(f"after a failed write the folder has {after}; it had {before}")
    broken = [p.name for p in folder.glob("step-*.pt") if "half" in p.read_text()]
    if broken:
        raise Mistake(
            f"while step {step} is written once more, half of it has the name"
            f" {broken[0]}: a restart would read it"
        )
