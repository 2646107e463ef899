"""What a text asks, its check looks at: answers that do all but one thing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmlab.course.grading.checking import Verdict
from llmlab.parallelism.sequence import attend
from llmlab.parallelism.sequence import merge as merge_pieces
from tests.checks import rejecting
from tests.checks.rejecting import solved


def verdict(slug: str, name: str, answer: Any) -> Verdict:
    """What the check says of an answer."""
    from llmlab.course import exercises
    from llmlab.course.syllabus import find

    return rejecting.verdict(exercises.load_check(find(slug)), name, answer)


def torchs_softmax(x):
    return torch.softmax(x, -1)


def whole_matrix(x, W, A, B, alpha, keep):
    return x @ W.T + (x * keep) @ (alpha / len(A) * B @ A).T


def whole_triplets(x, W, P, lam, Q, alpha, r0):
    return x @ W.T + x @ (alpha / r0 * P @ (lam * Q)).T


def three_dimensions_only(x, W, A, B, alpha, keep):
    low = torch.einsum("btk,rk->btr", x * keep, A)
    return x @ W.T + alpha / len(A) * torch.einsum("btr,dr->btd", low, B)


def row_by_row(x, W, A, B, scaling, ids):
    rows = []
    for row, i in zip(x, ids.tolist(), strict=True):
        out = row @ W.T
        if i >= 0:
            out = out + scaling[i] * row @ A[i].T @ B[i].T
        rows.append(out)
    return torch.stack(rows)


def task_by_row(x, W, scale, ids):
    rows = zip(x, ids.tolist(), strict=True)
    return torch.stack([row @ W.T * (scale[i] if i >= 0 else 1) for row, i in rows])


def fused(q, k, v, prefix_k, prefix_v):
    B, _, T, _ = q.shape
    k = torch.cat([prefix_k.expand(B, -1, -1, -1), k], 2)
    v = torch.cat([prefix_v.expand(B, -1, -1, -1), v], 2)
    p = prefix_k.shape[1]
    visible = torch.ones(T, p + T, dtype=torch.bool).tril(p)
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)


def never_none(lam, scores, b):
    every = torch.cat(scores)
    if b >= len(every):
        return [x.clone() for x in lam]
    least = every.sort(descending=True).values[b - 1]
    return [x * (s >= least)[:, None] for x, s in zip(lam, scores, strict=True)]


def the_same_tensors(lam, scores, b):
    if b >= len(torch.cat(scores)):
        return lam
    return solved("04-peft/06-adalora")["allocate"](lam, scores, b)


def rounded_too_early(experts, E, factor):
    T, k = experts.shape
    C = math.ceil(T * k / E) * factor
    taken = [0] * E
    kept = torch.zeros(T, k, dtype=torch.bool)
    for t in range(T):
        for i in range(k):
            e = int(experts[t, i])
            kept[t, i] = taken[e] < C
            taken[e] += 1
    return kept


def first_in_first_out(comm, stage, ops, xs, ys, loss_fn):
    """A pipeline's rank that does not look at the microbatches' numbers."""
    kept = []
    sends = []
    losses = []
    for kind, _ in ops:
        if kind == "F":
            n = len(losses)
            first = comm.rank == 0
            x = xs[n] if first else comm.recv(comm.rank - 1).requires_grad_()
            y = stage(x)
            if comm.rank == comm.size - 1:
                y = loss_fn(y, ys[n]) / len(xs)
            else:
                sends.append(comm.isend(y, comm.rank + 1))
            losses.append(y.detach())
            kept.append((x, y))
            continue
        x, y = kept.pop(0)
        last = comm.rank == comm.size - 1
        y.backward(None if last else comm.recv(comm.rank + 1))
        if comm.rank > 0:
            sends.append(comm.isend(x.grad, comm.rank - 1))
    for send in sends:
        send.wait()
    return float(sum(losses)) if comm.rank == comm.size - 1 else None


def lse_left_behind(comm, q, k, v, cut):
    p = comm.size
    kv = torch.stack([k, v])
    o, lse = attend(q, *kv, cut[comm.rank], cut[comm.rank])
    for step in range(1, p):
        kv = comm.sendrecv(kv, (comm.rank + 1) % p, (comm.rank - 1) % p)
        piece = attend(q, *kv, cut[comm.rank], cut[(comm.rank - step) % p])
        o, _ = merge_pieces(o, lse, *piece)
    return o


def values_stay(comm, q, k, v, cut):
    p = comm.size
    o, lse = attend(q, k, v, cut[comm.rank], cut[comm.rank])
    for step in range(1, p):
        k = comm.sendrecv(k, (comm.rank + 1) % p, (comm.rank - 1) % p)
        piece = attend(q, k, v, cut[comm.rank], cut[(comm.rank - step) % p])
        o, lse = merge_pieces(o, lse, *piece)
    return o


def clamp_without_mask(comm, logits, targets):
    rows = logits.shape[1]
    m = comm.all_reduce(logits.amax(1), "max")
    s = comm.all_reduce((logits - m[:, None]).exp().sum(1))
    local = (targets - comm.rank * rows).clamp(0, rows - 1)
    return s.log() + m - comm.all_reduce(logits.gather(1, local[:, None])[:, 0])


def scaled_first(X, W):
    s_x = X.abs().amax(1, keepdim=True) / 127
    s_w = W.abs().amax(1, keepdim=True) / 127
    return ((X / s_x).round() * s_x) @ ((W / s_w).round() * s_w).T


def always_float32(x):
    e = (x - x.amax(-1, keepdim=True)).exp().float()
    return e / e.sum(-1, keepdim=True)


ANSWERS = [
    ("01-start/01-welcome", "softmax", always_float32, "float32, where float64"),
    (
        "06-compression/01-quantization-basics",
        "int8_linear",
        scaled_first,
        "multiply the codes",
    ),
    ("01-start/01-welcome", "softmax", torchs_softmax, "use `exp` and sums"),
    ("04-peft/05-lora", "lora_forward", whole_matrix, "B A is built"),
    ("04-peft/05-lora", "lora_forward", three_dimensions_only, "einsum()"),
    ("04-peft/06-adalora", "svd_forward", whole_triplets, "P Λ Q is built"),
    ("04-peft/05-lora", "serve", row_by_row, "a loop over rows"),
    ("04-peft/08-ia3", "serve", task_by_row, "a loop over rows"),
    ("04-peft/02-prompt-and-prefix-tuning", "prefix_attention", fused, "torch's own"),
    ("04-peft/06-adalora", "allocate", never_none, "with b = 0 no triplet is kept"),
    ("04-peft/06-adalora", "allocate", the_same_tensors, "return new ones"),
    ("05-parallelism/09-moe", "places", rounded_too_early, "before the rounding"),
    (
        "05-parallelism/04-pipeline",
        "run_schedule",
        first_in_first_out,
        "each op names its microbatch",
    ),
    (
        "05-parallelism/06-sequence",
        "ring_attention",
        lse_left_behind,
        "the log-sum-exp is not carried along",
    ),
    (
        "05-parallelism/06-sequence",
        "ring_attention",
        values_stay,
        "the keys travel and the values stay",
    ),
    (
        "05-parallelism/05-tensor",
        "vocab_parallel_loss",
        clamp_without_mask,
        "add a logit all the same",
    ),
]


@pytest.mark.parametrize(("slug", "name", "answer", "says"), ANSWERS)
def test_all_but_one_thing(slug, name, answer, says):
    found = verdict(slug, name, answer)
    assert found.outcome in ("wrong", "error")
    assert says in found.message


def adapter_by_adapter(x, W, A, B, scaling, ids):
    out = x @ W.T
    for i in range(len(A)):
        mine = (ids == i)[:, None, None]
        out = out + mine * scaling[i] * (x @ A[i].T @ B[i].T)
    return out


def in_int32(X, W):
    s_x = X.abs().amax(1, keepdim=True) / 127
    s_w = W.abs().amax(1, keepdim=True) / 127
    codes_x = (X / s_x).round().to(torch.int8).int()
    codes_w = (W / s_w).round().to(torch.int8).int()
    return (codes_x[:, None] * codes_w).sum(-1) * s_x * s_w[:, 0]


def by_einsum(X, W):
    s_x = X.abs().amax(1) / 127
    s_w = W.abs().amax(1) / 127
    codes_x = (X / s_x[:, None]).round()
    codes_w = (W / s_w[:, None]).round()
    return torch.einsum("tj,ij,t,i->ti", codes_x, codes_w, s_x, s_w)


def with_logsumexp(x):
    return (x - x.logsumexp(-1, keepdim=True)).exp()


@pytest.mark.parametrize(
    ("slug", "name", "answer"),
    [
        ("04-peft/05-lora", "serve", adapter_by_adapter),
        ("01-start/01-welcome", "softmax", with_logsumexp),
        ("06-compression/01-quantization-basics", "int8_linear", in_int32),
        ("06-compression/01-quantization-basics", "int8_linear", by_einsum),
    ],
)
def test_other_right_ways_are_accepted(slug, name, answer):
    assert verdict(slug, name, answer).outcome == "right"
