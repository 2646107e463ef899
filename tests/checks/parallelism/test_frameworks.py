"""Wrong answers to the exercises of 05-parallelism/10-frameworks, each with the
diagnosis that it must get.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from llmlab.checks.parallelism.frameworks import check
from tests.checks.rejecting import Wrong, rejects, verdict


def told(
    rank, local_rank=lambda n, i, N, g: i, world=lambda n, i, N, g: N * g, kind=str
):
    def environment(node, local, nodes, per_node):
        args = (node, local, nodes, per_node)
        return {
            "RANK": kind(rank(*args)),
            "LOCAL_RANK": kind(local_rank(*args)),
            "WORLD_SIZE": kind(world(*args)),
        }

    return environment


def right_rank(node, local, nodes, per_node):
    return node * per_node + local


def rank_only(node, local, nodes, per_node):
    return {"RANK": str(right_rank(node, local, nodes, per_node))}


ENVIRONMENT = [
    Wrong("environment", told(right_rank, kind=int), "strings"),
    Wrong("environment", told(lambda n, i, N, g: i * N + n), "through a machine first"),
    Wrong("environment", told(lambda n, i, N, g: n * N + i), "per_node processes"),
    Wrong("environment", told(right_rank, local_rank=right_rank), "within the machine"),
    Wrong(
        "environment",
        told(right_rank, world=lambda n, i, N, g: N),
        "counts all processes",
    ),
    Wrong(
        "environment",
        told(right_rank, world=lambda n, i, N, g: g),
        "counts all processes",
    ),
    Wrong("environment", rank_only, "LOCAL_RANK and WORLD_SIZE are asked"),
]


def steps(formula, strict=True):
    def accumulation(batch, micro, devices, tp=1, pp=1):
        if strict and (devices % (tp * pp) or batch % (micro * (devices // (tp * pp)))):
            raise ValueError("does not divide")
        return formula(batch, micro, devices, tp, pp)

    return accumulation


def good(batch, micro, devices, tp, pp):
    return batch // (micro * (devices // (tp * pp)))


ACCUMULATION = [
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: b // (m * d)),
        "make one data-parallel rank",
    ),
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: b // (m * d // t)),
        "pp devices share",
    ),
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: b // (m * d // p)),
        "tp devices share",
    ),
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: b // (d // (t * p))),
        "divide by micro",
    ),
    Wrong("accumulation", steps(good, strict=False), "must raise a ValueError"),
    Wrong("accumulation", steps(lambda *a: float(good(*a))), "int"),
]


def factor(formula):
    def loss_factor(tokens):
        return formula(len(tokens), len(tokens[0]), sum(map(sum, tokens)), tokens)

    return loss_factor


FACTOR = [
    Wrong("loss_factor", factor(lambda r, m, n, t: 1 / n), "multiply by both"),
    Wrong("loss_factor", factor(lambda r, m, n, t: r / n), "microbatches too"),
    Wrong("loss_factor", factor(lambda r, m, n, t: m / n), "over ranks too"),
    Wrong(
        "loss_factor", factor(lambda r, m, n, t: r * m / sum(t[0])), "not of the first"
    ),
    Wrong(
        "loss_factor",
        factor(lambda r, m, n, t: r * m / t[0][0]),
        "not those of one microbatch",
    ),
    Wrong(
        "loss_factor", factor(lambda r, m, n, t: n / (r * m)), "turn the fraction over"
    ),
]


def saving(
    unfinished=".unfinished",
    first_delete=False,
    digits=8,
    swallow=False,
    delete=True,
    direct=False,
):
    def save(folder, step, write, keep=2):
        target = folder / f"step-{step:0{digits}}.pt"
        if first_delete:
            for old in sorted(folder.glob("step-*.pt"))[: -keep + 1]:
                old.unlink()
        try:
            write(target if direct else folder / unfinished)
        except OSError:
            if not swallow:
                raise
            return target
        if not direct:
            (folder / unfinished).replace(target)
        if delete:
            for old in sorted(folder.glob("step-*.pt"))[:-keep]:
                old.unlink()
        return target

    return save


def copies(folder, step, write, keep=2):
    target = folder / f"step-{step:08}.pt"
    write(folder / ".unfinished")
    target.write_bytes((folder / ".unfinished").read_bytes())
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return target


def oldest(folder, step, write, keep=2):
    target = saving(delete=False)(folder, step, write)
    for new in sorted(folder.glob("step-*.pt"))[keep:]:
        new.unlink()
    return target


SAVE = [
    Wrong("save", saving(direct=True), "a restart would read it"),
    Wrong("save", saving(unfinished="step-unfinished.pt"), "a restart would read it"),
    Wrong("save", saving(first_delete=True), "before the new checkpoint is complete"),
    Wrong("save", saving(digits=1), "there is no step-00000009.pt"),
    Wrong("save", saving(swallow=True), "let the error through"),
    Wrong("save", saving(delete=False), "the newest three"),
    Wrong("save", copies, "is left over"),
    Wrong("save", oldest, "there is no step-00000100.pt"),
]


def one_based(node, local, nodes, per_node):
    return right_rank(node, local, nodes, per_node) + 1


def wrong_process(node, local, nodes, per_node):
    return local


def machines(node, local, nodes, per_node):
    return node


def number_plus_number(node, local, nodes, per_node):
    return node + local


def all_devices(batch, micro, devices, tp=1, pp=1):
    if batch % (micro * devices):
        raise ValueError("does not divide")
    return batch // (micro * devices)


def by_the_product(batch, micro, devices, tp=1, pp=1):
    if batch * tp * pp % (micro * devices):
        raise ValueError("does not divide")
    return batch * tp * pp // (micro * devices)


def asserts(batch, micro, devices, tp=1, pp=1):
    assert devices % (tp * pp) == 0
    ranks = devices // (tp * pp)
    assert batch % (micro * ranks) == 0
    return batch // (micro * ranks)


def by_remainders(batch, micro, devices, tp=1, pp=1):
    """Right: divided in two steps, each with its own error."""
    ranks, left = divmod(devices, tp * pp)
    if left:
        raise ValueError(f"{devices} devices")
    steps, left = divmod(batch, micro * ranks)
    if left:
        raise ValueError(f"batch {batch}")
    return steps


def some_microbatches(tokens):
    own = [t for row in tokens for t in row]
    return sum(t > 0 for t in own) / sum(own)


def saves_as(
    folder, step, write, keep=2, *, delete=None, move=None, other=None, anew=False
):
    target = folder / f"step-{step:08}.pt"
    if anew:
        target.unlink(missing_ok=True)
    unfinished = (other or folder) / ".unfinished"
    write(unfinished)
    (move or Path.replace)(unfinished, target)
    (delete or oldest_deleted)(folder, step, keep)
    return target


def oldest_deleted(folder, step, keep):
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()


def any_file_deleted(folder, step, keep):
    for old in sorted(folder.iterdir())[:-keep]:
        old.unlink()


def keep_steps_before(folder, step, keep):
    (folder / f"step-{step - keep:08}.pt").unlink(missing_ok=True)


def copied(unfinished, target):
    shutil.copy(unfinished, target)
    unfinished.unlink()


def deletes_any_file(*args, **kwargs):
    return saves_as(*args, **kwargs, delete=any_file_deleted)


def counts_steps(*args, **kwargs):
    return saves_as(*args, **kwargs, delete=keep_steps_before)


def copies_then_deletes(*args, **kwargs):
    return saves_as(*args, **kwargs, move=copied)


def deletes_its_own_name(*args, **kwargs):
    return saves_as(*args, **kwargs, anew=True)


def in_another_folder(*args, **kwargs):
    with tempfile.TemporaryDirectory() as name:
        return saves_as(*args, **kwargs, other=Path(name))


def in_a_folder_inside(folder, step, write, keep=2):
    """Right: the unfinished file in a folder of its own, by os.replace."""
    target = folder / f"step-{step:08d}.pt"
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        write(Path(inside) / "part")
        os.replace(Path(inside) / "part", target)
    names = sorted(p.name for p in folder.glob("step-*.pt"))
    for name in names[: len(names) - keep] if len(names) > keep else []:
        (folder / name).unlink()
    return target


MORE = [
    Wrong("environment", told(one_based), "RANK counts from 0"),
    Wrong("environment", told(wrong_process), "a rank 0"),
    Wrong("environment", told(machines), "not machines"),
    Wrong("environment", told(number_plus_number), "not one"),
    Wrong("environment", told(right_rank, machines), "not the machine's"),
    Wrong(
        "environment",
        told(right_rank, world=lambda n, i, N, g: N * g - 1),
        "not the last rank",
    ),
    Wrong(
        "environment", told(right_rank, world=lambda n, i, N, g: N + g), "is a product"
    ),
    Wrong("accumulation", all_devices, "there is a whole number"),
    Wrong("accumulation", by_the_product, "devices that do not divide"),
    Wrong("accumulation", asserts, "it raises AssertionError"),
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: b // (m * d // (t + p)), strict=False),
        "not tp + pp",
    ),
    Wrong(
        "accumulation",
        steps(lambda b, m, d, t, p: d // (t * p)),
        "number of data-parallel ranks",
    ),
    Wrong("accumulation", steps(lambda b, m, d, t, p: b // m), "by their number too"),
    Wrong("loss_factor", some_microbatches, "without tokens counts"),
    Wrong("loss_factor", factor(lambda r, m, n, t: 1 / (r * m * n)), "already"),
    Wrong("loss_factor", factor(lambda r, m, n, t: 1.0), "leaves sums"),
    Wrong("loss_factor", factor(lambda r, m, n, t: 1 / t[0][0]), "not one's"),
    Wrong("loss_factor", factor(lambda r, m, n, t: m / sum(t[0])), "first rank's"),
    Wrong("loss_factor", factor(lambda r, m, n, t: r * m // n), "cuts off"),
    Wrong("save", deletes_any_file, "is no checkpoint"),
    Wrong("save", counts_steps, "the newest three"),
    Wrong("save", copies_then_deletes, "is a copy"),
    Wrong("save", deletes_its_own_name, "before the new checkpoint is complete"),
    Wrong("save", in_another_folder, "another disk"),
]

test_wrong_answers = rejects(
    "05-parallelism/10-frameworks", ENVIRONMENT + ACCUMULATION + FACTOR + SAVE + MORE
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [("accumulation", by_remainders), ("save", in_a_folder_inside)],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
