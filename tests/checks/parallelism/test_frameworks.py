"""Wrong answers to the exercises of 05-parallelism/10-frameworks, each with the
diagnosis that it must get.
"""

from tests.checks.rejecting import Wrong, rejects


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

test_wrong_answers = rejects(
    "05-parallelism/10-frameworks", ENVIRONMENT + ACCUMULATION + FACTOR + SAVE
)
