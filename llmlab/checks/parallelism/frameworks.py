"""What marks the exercises of 05-parallelism/10-frameworks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

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
    seen = set()
    for node in range(3):
        for local in range(4):
            what = f"environment(node={node}, local={local}, nodes=3, per_node=4)"
            got = expect(answer(node, local, 3, 4), kind=dict, what=what)
            right = {"RANK": 4 * node + local, "LOCAL_RANK": local, "WORLD_SIZE": 12}
            if set(got) != set(right):
                raise Mistake(
                    f"{what}: RANK, LOCAL_RANK and WORLD_SIZE are asked, not"
                    f" {', '.join(map(str, got))}"
                )
            if not all(isinstance(v, str) for v in got.values()):
                raise Mistake(f"{what}: an environment holds strings, not numbers")
            _compare_environment({k: got[k] for k in right}, right, node, local, what)
            seen.add(got["RANK"])
    if len(seen) != 12:
        raise Mistake(f"12 processes need 12 ranks; yours are {sorted(seen)}")


def _compare_environment(
    got: dict[str, str], right: dict[str, int], node: int, local: int, what: str
) -> None:
    if got == {k: str(v) for k, v in right.items()}:
        return
    wrong = got["RANK"] != str(right["RANK"])
    if wrong and got["RANK"] == str(local * 3 + node):
        raise Mistake(
            f"{what}: ranks count through a machine first: rank 1 is the second process"
            " of machine 0"
        )
    if wrong and got["RANK"] == str(node * 3 + local):
        raise Mistake(
            f"{what}: a machine has per_node processes, not as many as there are"
            " machines"
        )
    if got["LOCAL_RANK"] == got["RANK"] != str(local):
        raise Mistake(
            f"{what}: LOCAL_RANK counts within the machine: it chooses the device"
        )
    if got["WORLD_SIZE"] in ("3", "4"):
        raise Mistake(f"{what}: WORLD_SIZE counts all processes of all machines")
    raise Mistake(f"{what} is {got}")


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
    for batch, micro, devices, tp, pp in (
        (256, 4, 16, 1, 1),
        (2048, 2, 384, 4, 12),
        (96, 2, 24, 2, 3),
        (8, 1, 8, 1, 1),
    ):
        what = f"accumulation({batch}, {micro}, {devices}, {tp}, {pp})"
        got = expect(answer(batch, micro, devices, tp, pp), kind=int, what=what)
        ranks = devices // (tp * pp)
        mistakes = {
            "tp · pp devices together make one data-parallel rank": (
                batch // (micro * devices)
            ),
            "pp devices share the same data too": (
                batch // (micro * devices // tp) if devices // tp else None
            ),
            "tp devices share the same data too": (
                batch // (micro * devices // pp) if devices // pp else None
            ),
            "a rank takes micro sequences at a time: divide by micro too": (
                batch // ranks
            ),
            "this is the batch of one rank in sequences, not in microbatches": (
                batch // ranks
            ),
            "this is the batch of one microbatch over all ranks": micro * ranks,
        }
        right = batch // (micro * ranks)
        diagnose(
            got,
            right=right,
            mistakes={k: v for k, v in mistakes.items() if v not in (None, right)},
            what=what,
        )
    for case, why in (
        ((100, 4, 16), "a batch that does not divide"),
        ((64, 1, 10, 4, 1), "devices that do not divide"),
        ((4, 1, 8), "a batch below one microbatch each"),
    ):
        try:
            got = answer(*case)
        except ValueError:
            continue
        raise Mistake(f"accumulation{case} is {got}: {why} must raise a ValueError")


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
    for ranks, microbatches in ((2, 3), (4, 2), (3, 5), (1, 4)):
        tokens = torch.randint(3, 40, (ranks, microbatches)).tolist()
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
        for step in (9, 10, 100):
            path = expect(
                answer(folder, step, _writer(step)),
                kind=Path,
                what=f"save(folder, {step}, write)",
            )
            _check_saved(folder, step, path)
        _check_crash(answer, folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(1, 6):
            answer(folder, step, _writer(step), keep=3)
        left = sorted(p.name for p in folder.glob("step-*.pt"))
        if left != [f"step-{s:08}.pt" for s in (3, 4, 5)]:
            raise Mistake(
                f"with keep=3, after steps 1 to 5, {left} are left: the newest three"
                " are asked"
            )


def _writer(step: int):
    return lambda path: path.write_text(f"complete {step}")


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
    rest = [p.name for p in folder.iterdir() if not p.name.startswith("step-")]
    if rest:
        raise Mistake(f"{rest} is left over: rename it, or remove it")


def _check_crash(answer, folder: Path) -> None:
    """What a reader sees while a checkpoint is written, and after the writer died."""
    before = sorted(p.name for p in folder.glob("step-*.pt"))
    seen: list[list[str]] = []

    def dies(path: Path) -> None:
        path.write_text("half of")
        seen.append(sorted(p.name for p in folder.glob("step-*.pt")))
        raise OSError("no space left on device")

    try:
        answer(folder, 101, dies)
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
