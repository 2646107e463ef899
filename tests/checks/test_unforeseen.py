"""Answers written from the exercises alone, which a check once let pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

from llmlab.course import exercises
from llmlab.course.syllabus import find
from tests.checks.rejecting import verdict

FOUND: list[tuple[str, Callable, str]] = []


def found(slug: str, says: str) -> Callable[[Callable], Callable]:
    """Notes a wrong answer to the exercise of its name, and what must be said."""

    def note(answer: Callable) -> Callable:
        FOUND.append((slug, answer, says))
        return answer

    return note


@found("01-start/01-welcome", "adds a byte where none is part-filled")
def weight_bytes(params, bits=16):
    whole = int(params * bits // 8)
    return whole if bits in (8, 16, 32) else whole + 1


@found("01-start/01-welcome", "any number in its place may be reached")
def softmax(x):
    safe = torch.where(x.isinf(), torch.full_like(x, -1e4), x)
    e = (safe - safe.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@found("01-start/02-the-course-models", "which nothing follows")
def kneser_ney_bigram(tokens, vocab_size, discount):
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, -1)
    kinds = counts > 0
    lower = kinds.sum(0) / kinds.sum()
    total = torch.bincount(tokens, minlength=vocab_size)[:, None]
    kept = (counts - discount).clamp(min=0) / total
    table = kept + discount * kinds.sum(1, keepdim=True) / total * lower
    return torch.where(counts.sum(1, keepdim=True) > 0, table, lower)


@found("04-peft/01-background-and-bitfit", "yours stays without it")
def fold(W, b, c, beta):
    out = []
    for weight, bias, change in zip(W, b, c, strict=True):
        new = torch.zeros(len(weight)) if bias is None else bias + weight @ beta
        out.append(new if change is None else new + change)
    return out


@found("04-peft/04-adapters", "Q and K are transposed")
def fuse(x, z, Q, K, V):
    s = torch.softmax((z @ K @ (x @ Q).unsqueeze(-1)).squeeze(-1), -1)
    return (s.unsqueeze(-1) * z).sum(-2) @ V.T


@found("04-peft/06-adalora", "ask where t is before you divide")
def budget(t, b0, bT, T, ti, tf):
    done = min(max((t - ti) / (T - ti - tf), 0.0), 1.0)
    return int(bT + (b0 - bT) * (1 - done) ** 3)


@found("04-peft/07-qlora", "3 bits have 8 levels, yours are 16")
def normal_float(bits, offset):
    up = torch.special.ndtri(torch.linspace(offset, 0.5, 9)[:-1])
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([down, torch.zeros(1), up]).sort().values
    return levels / levels.max()


@found("04-peft/09-mam-and-unipelt", "padding still adds σ(b)")
def gated_prefix(x, w, b, mask, P_K, P_V):
    gate = torch.sigmoid(x * mask.unsqueeze(-1) @ w + b).sum(1) / mask.sum(1)
    gate = gate.view(-1, 1, 1, 1)
    return gate * P_K, gate * P_V


@found("05-parallelism/03-zero-and-fsdp", "compare by id, not by data_ptr")
def my_piece(comm, parameters):
    once: dict[int, torch.Tensor] = {}
    for w in parameters:
        once.setdefault(w.data_ptr(), w)
    line = torch.cat([w.reshape(-1) for w in once.values()])
    length = -(-line.numel() // comm.size)
    padded = torch.zeros(length * comm.size, dtype=line.dtype)
    padded[: line.numel()] = line
    return padded[length * comm.rank : length * (comm.rank + 1)]


@found("05-parallelism/05-tensor", "has dtype float32, where")
def all_reduce(comm, x):
    line = torch.cat([x.reshape(-1), torch.zeros(-x.numel() % comm.size)])
    whole = comm.all_gather(comm.reduce_scatter(line))
    return whole[: x.numel()].view(x.shape)


@found("05-parallelism/05-tensor", "has dtype float32, where float64")
def matmul_2d(along, down, X, W):
    result = torch.zeros(X.size(0), W.size(1))
    for t in range(along.size):
        result += along.broadcast(X, t) @ down.broadcast(W, t)
    return result


@found("05-parallelism/08-auto-parallel", "5 numbers above 0")
def stages(times, p, m):
    until = [0.0, *accumulate(times)]
    best = {(0, 0): (0.0, [])}
    for k in range(1, p + 1):
        for end in range(len(until)):
            for begin in range(end + 1):
                if (k - 1, begin) in best:
                    slowest, sizes = best[k - 1, begin]
                    slowest = max(slowest, until[end] - until[begin])
                    new = (slowest, [*sizes, end - begin])
                    best[k, end] = min(best.get((k, end), new), new)
    return best[p, len(times)][1]


@found("05-parallelism/10-frameworks", "a batch that 6 · 4 does not divide")
def accumulation(batch, micro, devices, tp=1, pp=1):
    if devices % (tp * pp):
        raise ValueError("devices")
    ranks = devices // (tp * pp)
    if batch % micro or batch % ranks:
        raise ValueError("batch")
    return batch // (micro * ranks)


def by_each_alone(batch, micro, devices, tp=1, pp=1):
    if devices % tp or devices % pp:
        raise ValueError("devices")
    steps, rest = divmod(batch, micro * max(devices // (tp * pp), 1))
    if rest:
        raise ValueError("batch")
    return steps


by_each_alone.__name__ = "accumulation"
found("05-parallelism/10-frameworks", "devices that 4 · 6 does not divide")(
    by_each_alone
)


@found("05-parallelism/10-frameworks", "without tokens counts as well")
def loss_factor(tokens):
    columns = [sum(column) for column in zip(*tokens, strict=True)]
    return len(tokens) * sum(n > 0 for n in columns) / sum(columns)


@found("05-parallelism/10-frameworks", "for a moment there is none")
def save(folder, step, write, keep=2):
    final = folder / f"step-{step:08}.pt"
    part = folder / f".step-{step:08}.part"
    write(part)
    final.unlink(missing_ok=True)
    part.rename(final)
    for old in sorted(folder.glob("step-*.pt"), reverse=True)[keep:]:
        old.unlink()
    return final


def kept_whole(comm, pieces, x, grad_out):
    h = [x]
    for piece in pieces:
        h.append((h[-1] @ comm.all_gather(piece).T).relu())
    g, whole = grad_out, []
    for i in reversed(range(len(pieces))):
        delta = g * (h[i + 1] > 0)
        whole.insert(0, delta.T @ h[i])
        g = delta @ comm.all_gather(pieces[i])
    return g, [comm.reduce_scatter(dW) for dW in whole]


kept_whole.__name__ = "chain_gradients"
found("05-parallelism/03-zero-and-fsdp", "kept whole to the end")(kept_whole)


def others_deleted(folder, step, write, keep=2):
    final = folder / f"step-{step:08}.pt"
    part = folder / (final.name + ".tmp")
    write(part)
    part.replace(final)
    for old in sorted(folder.glob("*.pt"))[:-keep]:
        old.unlink()
    return final


others_deleted.__name__ = "save"
found("05-parallelism/10-frameworks", "which is no checkpoint, was deleted")(
    others_deleted
)


@found("06-compression/01-quantization-basics", "where all numbers are 3")
def affine_quantize(x, bits):
    top = 2**bits - 1
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    s = 1.0 if x.max() == x.min() else (high - low) / top
    z = round(-low / s)
    return (torch.round(x / s) + z).clamp(0, top).long(), s, z


@pytest.mark.parametrize(
    ("slug", "answer", "says"), FOUND, ids=[a.__name__ for _, a, _ in FOUND]
)
def test_it_is_rejected(slug, answer, says):
    check = exercises.load_check(find(slug))
    result = verdict(check, answer.__name__, answer)
    assert result.outcome == "wrong", str(result)
    assert says in result.message, str(result)
