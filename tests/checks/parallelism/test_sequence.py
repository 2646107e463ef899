"""Wrong answers to the exercises of 05-parallelism/06-sequence, each with the diagnosis
that it must get.
"""

import torch

from llmlab.parallelism.sequence import attend
from llmlab.parallelism.sequence import merge as right_merge
from tests.checks.rejecting import Wrong, rejects

# Exercise 1


def added(o_a, l_a, o_b, l_b):
    return o_a + o_b, torch.logaddexp(l_a, l_b)


def averaged(o_a, l_a, o_b, l_b):
    return (o_a + o_b) / 2, torch.logaddexp(l_a, l_b)


def swapped(o_a, l_a, o_b, l_b):
    return right_merge(o_b, l_a, o_a, l_b)


def nan_when_blind(o_a, l_a, o_b, l_b):
    lse = torch.logaddexp(l_a, l_b)
    return (l_a - lse).exp()[..., None] * o_a + (l_b - lse).exp()[..., None] * o_b, lse


def overflows(o_a, l_a, o_b, l_b):
    a, b = l_a.exp(), l_b.exp()
    s = (a + b).clamp_min(1e-30)
    return (a[..., None] * o_a + b[..., None] * o_b) / s[..., None], torch.logaddexp(
        l_a, l_b
    )


def larger_only(o_a, l_a, o_b, l_b):
    return torch.where((l_a > l_b)[..., None], o_a, o_b), torch.maximum(l_a, l_b)


def maximum_lse(o_a, l_a, o_b, l_b):
    return right_merge(o_a, l_a, o_b, l_b)[0], torch.maximum(l_a, l_b)


def added_lse(o_a, l_a, o_b, l_b):
    return right_merge(o_a, l_a, o_b, l_b)[0], l_a + l_b


def no_log(o_a, l_a, o_b, l_b):
    o, lse = right_merge(o_a, l_a, o_b, l_b)
    return o, lse.exp().clamp_max(1e30)


def old_lse(o_a, l_a, o_b, l_b):
    return right_merge(o_a, l_a, o_b, l_b)[0], l_a


def output_only(o_a, l_a, o_b, l_b):
    return right_merge(o_a, l_a, o_b, l_b)[0]


# Exercise 2


def pieces(T, p):
    return torch.arange(T).tensor_split(2 * p)


def contiguous(T, p, rank):
    return torch.arange(T).tensor_split(p)[rank]


def striped(T, p, rank):
    return torch.arange(T)[rank::p]


def p_further(T, p, rank):
    return torch.cat([pieces(T, p)[rank], pieces(T, p)[rank + p]])


def one_too_far(T, p, rank):
    return torch.cat([pieces(T, p)[rank], pieces(T, p)[(2 * p - rank) % (2 * p)]])


def late_first(T, p, rank):
    return torch.cat([pieces(T, p)[2 * p - 1 - rank], pieces(T, p)[rank]])


def one_piece(T, p, rank):
    return pieces(T, p)[rank]


def backwards(T, p, rank):
    return torch.cat([pieces(T, p)[rank], pieces(T, p)[2 * p - 1 - rank].flip(0)])


def floats(T, p, rank):
    return torch.cat([pieces(T, p)[rank], pieces(T, p)[2 * p - 1 - rank]]).float()


# Exercise 3


def memory(s, b, h, a, t, outside, scores):
    return s * b * h * (outside + 24 / t + scores)


def all_divided(s, b, h, a, t, cut, selective):
    return memory(s, b, h, a, t, 10 / t, 0 if selective else 5 * a * s / h / t)


def nothing_divided(s, b, h, a, t, cut, selective):
    return s * b * h * (34 + (0 if selective else 5 * a * s / h))


def whole_scores(s, b, h, a, t, cut, selective):
    return memory(
        s, b, h, a, t, 10 / t if cut else 10, 0 if selective else 5 * a * s / h
    )


def ten_stays(s, b, h, a, t, cut, selective):
    return memory(s, b, h, a, t, 10, 0 if selective else 5 * a * s / h / t)


def scores_stay(s, b, h, a, t, cut, selective):
    return memory(s, b, h, a, t, 10 / t if cut else 10, 5 * a * s / h / t)


def forgets_qkv(s, b, h, a, t, cut, selective):
    right = memory(
        s, b, h, a, t, 10 / t if cut else 10, 0 if selective else 5 * a * s / h / t
    )
    return right - 6 * s * b * h / t * selective


def elements(s, b, h, a, t, cut, selective):
    return (
        memory(
            s, b, h, a, t, 10 / t if cut else 10, 0 if selective else 5 * a * s / h / t
        )
        / 2
    )


def full_recomputation(s, b, h, a, t, cut, selective):
    return (
        2 * s * b * h
        if selective
        else memory(s, b, h, a, t, 10 / t if cut else 10, 5 * a * s / h / t)
    )


# Exercise 4


def ring(
    comm,
    q,
    k,
    v,
    cut,
    *,
    steps=None,
    source=lambda r, s, p: (r - s) % p,
    own=True,
    hand_on=True,
    combine=right_merge,
):
    p, r = comm.size, comm.rank
    kv = mine = torch.stack([k, v])
    o, lse = attend(q, *kv, cut[r], cut[r])
    if not own:
        o, lse = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    for step in range(1, p if steps is None else steps(p)):
        kv = comm.sendrecv(kv if hand_on else mine, (r + 1) % p, (r - 1) % p)
        positions = cut[source(r, step, p)]
        o, lse = combine(o, lse, *attend(q, *kv, cut[r], positions[: kv.shape[3]]))
    return o


def own_keys_only(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, steps=lambda p: 1)


def last_step_missing(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, steps=lambda p: p - 1)


def own_keys_missing(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, own=False)


def wrong_direction(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, source=lambda r, s, p: (r + s) % p)


def own_positions(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, source=lambda r, s, p: r)


def sends_its_own_again(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, hand_on=False, source=lambda r, s, p: (r - 1) % p)


def adds_pieces(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, combine=lambda o, lse, o_b, l_b: (o + o_b, lse))


def overwrites(comm, q, k, v, cut):
    def replace(o, lse, o_b, l_b):
        return (o_b, l_b) if o_b.count_nonzero() else (o, lse)

    return ring(comm, q, k, v, cut, combine=replace)


def local_mask(comm, q, k, v, cut):
    return ring(comm, q, k, v, [torch.arange(len(c)) for c in cut])


def one_stretch_each(comm, q, k, v, cut):
    return ring(
        comm,
        q,
        k,
        v,
        list(torch.arange(sum(map(len, cut))).split([len(c) for c in cut])),
    )


def no_mask(comm, q, k, v, cut):
    r = comm.rank
    keys, values = (comm.all_gather(t, dim=2) for t in (k, v))
    everywhere = torch.cat(cut)
    return attend(q, keys, values, cut[r], everywhere, causal=False)[0]


def gathers(comm, q, k, v, cut):
    keys, values = (comm.all_gather(t, dim=2) for t in (k, v))
    return attend(q, keys, values, cut[comm.rank], torch.cat(cut))[0]


def one_hop_too_many(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    o = ring(comm, q, k, v, cut)
    comm.sendrecv(torch.stack([k, v]), (r + 1) % p, (r - 1) % p)
    return o


def blocking(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    comm.send(torch.stack([k, v]), (r + 1) % p)
    kv = comm.recv((r - 1) % p)
    return attend(q, *kv, cut[r], cut[r])[0]


def nan_merge(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, own=False, combine=nan_when_blind)


test_wrong_answers = rejects(
    "05-parallelism/06-sequence",
    [
        Wrong("merge", added, "were added"),
        Wrong("merge", averaged, "count half each"),
        Wrong("merge", swapped, "weights are swapped"),
        Wrong("merge", nan_when_blind, "−∞ − (−∞) is NaN"),
        Wrong("merge", overflows, "overflows when ℓ is in the hundreds"),
        Wrong("merge", larger_only, "larger piece was kept"),
        Wrong("merge", maximum_lse, "not that of the sum"),
        Wrong("merge", added_lse, "log of a product"),
        Wrong("merge", no_log, "its logarithm is asked"),
        Wrong("merge", old_lse, "the next merge"),
        Wrong("merge", output_only, "must return two tensors"),
        Wrong("zigzag", contiguous, "contiguous cut"),
        Wrong("zigzag", striped, "striped cut"),
        Wrong("zigzag", p_further, "p pieces further on"),
        Wrong("zigzag", one_too_far, "one too far"),
        Wrong("zigzag", late_first, "wrong order"),
        Wrong("zigzag", one_piece, "one of the two pieces is missing"),
        Wrong("zigzag", backwards, "runs backwards"),
        Wrong("zigzag", floats, "positions are integers"),
        Wrong("layer_memory", all_divided, "10 of it are outside"),
        Wrong("layer_memory", nothing_divided, "nothing is divided by t"),
        Wrong("layer_memory", whole_scores, "a rank has a/t heads"),
        Wrong("layer_memory", ten_stays, "divides the 10, too"),
        Wrong("layer_memory", scores_stay, "the scores are still there"),
        Wrong("layer_memory", forgets_qkv, "Q, K and V"),
        Wrong("layer_memory", elements, "it has two"),
        Wrong("layer_memory", full_recomputation, "full recomputation"),
        Wrong("ring_attention", own_keys_only, "own keys were looked at"),
        Wrong("ring_attention", last_step_missing, "last step is missing"),
        Wrong("ring_attention", own_keys_missing, "own keys are missing"),
        Wrong("ring_attention", wrong_direction, "the keys of rank r − s are here"),
        Wrong("ring_attention", own_positions, "own positions for the keys"),
        Wrong("ring_attention", sends_its_own_again, "hand on what came"),
        Wrong("ring_attention", adds_pieces, "were added"),
        Wrong("ring_attention", overwrites, "overwrote the others"),
        Wrong("ring_attention", local_mask, "counts from 0 on every rank"),
        Wrong("ring_attention", one_stretch_each, "one stretch after another"),
        Wrong("ring_attention", no_mask, "no causal mask"),
        Wrong("ring_attention", gathers, "holds all keys at once"),
        Wrong("ring_attention", one_hop_too_many, "p − 1 hops are enough"),
        Wrong("ring_attention", blocking, "waits in send"),
        Wrong("ring_attention", nan_merge, "holds NaN"),
    ],
)
