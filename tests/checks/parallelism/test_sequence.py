"""Wrong answers to the exercises of 05-parallelism/06-sequence, each with the diagnosis
that it must get.
"""

import pytest
import torch

from llmlab.checks.parallelism.sequence import check
from llmlab.parallelism.sequence import attend
from llmlab.parallelism.sequence import merge as right_merge
from tests.checks.rejecting import Wrong, rejects, verdict

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


def weights(l_a, l_b, lse):
    """e^(ℓ − lse) of both sides, 0 for −∞."""
    a, b = ((x - lse).exp().nan_to_num(0)[..., None] for x in (l_a, l_b))
    return a, b


def not_normalised(o_a, l_a, o_b, l_b):
    a, b = weights(l_a, l_b, torch.maximum(l_a, l_b))
    return a * o_a + b * o_b, torch.logaddexp(l_a, l_b)


def proportional_to_l(o_a, l_a, o_b, l_b):
    a, b = ((x / (l_a + l_b))[..., None] for x in (l_a, l_b))
    return a * o_a + b * o_b, torch.logaddexp(l_a, l_b)


def powers_of_2(o_a, l_a, o_b, l_b):
    lse = torch.logaddexp2(l_a, l_b)
    a, b = (2 ** (x - lse)[..., None] for x in (l_a, l_b))
    return (a * o_a + b * o_b).nan_to_num(0), lse


def overflow_made_zero(o_a, l_a, o_b, l_b):
    a, b = l_a.exp()[..., None], l_b.exp()[..., None]
    return ((a * o_a + b * o_b) / (a + b)).nan_to_num(0), torch.logaddexp(l_a, l_b)


def clamped_l(o_a, l_a, o_b, l_b):
    return right_merge(o_a, l_a.clamp(min=-1e4), o_b, l_b.clamp(min=-1e4))


def by_a_sigmoid(o_a, l_a, o_b, l_b):
    w = torch.sigmoid(l_a - l_b)
    w = torch.where(w.isnan(), 0.0, w)[..., None]
    return w * o_a + (1 - w) * o_b, torch.logaddexp(l_a, l_b)


def by_a_softmax(o_a, l_a, o_b, l_b):
    both = torch.stack([l_a, l_b])
    w = both.softmax(0).nan_to_num(0)
    return torch.einsum("nbht,nbhtd->bhtd", w, torch.stack([o_a, o_b])), both.logsumexp(
        0
    )


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


def pair(pieces, rank):
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def p_pieces(T, p, rank):
    return pair(torch.arange(T).tensor_split(p), rank)


def one_too_near(T, p, rank):
    return torch.cat([pieces(T, p)[rank], pieces(T, p)[2 * p - 2 - rank]])


def chunks(T, p, rank):
    return pair(torch.arange(T).chunk(2 * p), rank)


def rest_dropped(T, p, rank):
    return pair(torch.arange(T // (2 * p) * 2 * p).tensor_split(2 * p), rank)


def mirrored_tokens(T, p, rank):
    first = pieces(T, p)[rank]
    return torch.cat([first, (T - 1 - first).flip(0)])


def halves(T, p, rank):
    front, back = torch.arange(T // 2), torch.arange(T // 2, T)
    return torch.cat([front.tensor_split(p)[rank], back.tensor_split(p)[p - 1 - rank]])


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


def selective_reversed(s, b, h, a, t, cut, selective):
    return memory(
        s, b, h, a, t, 10 / t if cut else 10, 5 * a * s / h / t if selective else 0
    )


def exchanged(s, b, h, a, t, cut, selective):
    scores = 0 if selective else 5 * a * s / h / t
    return s * b * h * (24 / (t if cut else 1) + 10 / t + scores)


def of_all_ranks(s, b, h, a, t, cut, selective):
    return elements(s, b, h, a, t, cut, selective) * 2 * t


def inside_divided_twice(s, b, h, a, t, cut, selective):
    scores = 0 if selective else 5 * a * s / h / t
    return memory(s, b, h, a, t, 10, scores) / (t if cut else 1)


def a_part_stays(s, b, h, a, t, cut, selective):
    scores = (1 if selective else 5) * a * s / h / t
    return memory(s, b, h, a, t, 10 / t if cut else 10, scores)


def batch_squared(s, b, h, a, t, cut, selective):
    scores = 0 if selective else 5 * a * s * b / h / t
    return memory(s, b, h, a, t, 10 / t if cut else 10, scores)


def in_whole_bytes(s, b, h, a, t, cut, selective):
    sbh = s * b * h
    scores = 0 if selective else 5 * a * s * s * b // t
    return 10 * sbh // (t if cut else 1) + 24 * sbh // t + scores


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


def later_ranks_skipped(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    kv = torch.stack([k, v])
    o, lse = attend(q, *kv, cut[r], cut[r])
    for step in range(1, p):
        kv = comm.sendrecv(kv, (r + 1) % p, (r - 1) % p)
        source = (r - step) % p
        if source < r:
            o, lse = right_merge(o, lse, *attend(q, *kv, cut[r], cut[source]))
    return o


def queries_travel(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    o, lse = attend(q, k, v, cut[r], cut[r])
    for step in range(1, p):
        q = comm.sendrecv(q, (r + 1) % p, (r - 1) % p)
        piece = attend(q, k, v, cut[(r - step) % p], cut[r])
        o, lse = right_merge(o, lse, *piece)
    return o


def collected(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    parts = [torch.stack([k, v])]
    for _ in range(1, p):
        parts.append(comm.sendrecv(parts[-1], (r + 1) % p, (r - 1) % p))
    o, lse = attend(q, k, v, cut[r], cut[r])
    for step in range(1, p):
        piece = attend(q, *parts[step], cut[r], cut[(r - step) % p])
        o, lse = right_merge(o, lse, *piece)
    return o


def joined(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    kv = torch.stack([k, v])
    keys, positions = kv, cut[r]
    for step in range(1, p):
        kv = comm.sendrecv(kv, (r + 1) % p, (r - 1) % p)
        keys = torch.cat([keys, kv], 3)
        positions = torch.cat([positions, cut[(r - step) % p]])
    return attend(q, *keys, cut[r], positions)[0]


def keys_and_values_apart(comm, q, k, v, cut):
    """Right: two messages a step, the other way round, straight from their owner."""
    p, r = comm.size, comm.rank
    o, lse = attend(q, k, v, cut[r], cut[r])
    for step in range(1, p):
        source = (r + step) % p
        k_new, v_new = (comm.sendrecv(x, (r - step) % p, source) for x in (k, v))
        o, lse = right_merge(*attend(q, k_new, v_new, cut[r], cut[source]), o, lse)
    return o


def nan_merge(comm, q, k, v, cut):
    return ring(comm, q, k, v, cut, own=False, combine=nan_when_blind)


def ten_taken_away(s, b, h, a, t, cut, selective):
    scores = 0 if selective else 5 * a * s / h / t
    return memory(s, b, h, a, t, 0 if cut else 10, scores)


def keys_for_values(comm, q, k, v, cut):
    return ring(comm, q, v, k, cut)


def other_way_round(T, p, rank):
    return pair(pieces(T, p), p - 1 - rank)


def scores_divided_twice(s, b, h, a, t, cut, selective):
    scores = 0 if selective else 5 * a * s / h / t / (t if cut else 1)
    return memory(s, b, h, a, t, 10 / t if cut else 10, scores)


def begins_with_zero(comm, q, k, v, cut):
    p, r = comm.size, comm.rank
    kv = torch.stack([k, v])
    o, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
    for step in range(p):
        o, lse = right_merge(o, lse, *attend(q, *kv, cut[r], cut[(r - step) % p]))
        if step < p - 1:
            kv = comm.sendrecv(kv, (r + 1) % p, (r - 1) % p)
    return o


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
        Wrong("merge", not_normalised, "do not add up to one"),
        Wrong("merge", proportional_to_l, "those of ℓ"),
        Wrong("merge", powers_of_2, "powers of 2"),
        Wrong("merge", overflow_made_zero, "e^ℓ overflows"),
        Wrong("merge", clamped_l, "it must stay −∞"),
        Wrong("zigzag", p_pieces, "into p pieces"),
        Wrong("zigzag", one_too_near, "one too near"),
        Wrong("zigzag", chunks, "pieces of `chunk`"),
        Wrong("zigzag", rest_dropped, "left over"),
        Wrong("zigzag", mirrored_tokens, "mirror among the pieces"),
        Wrong("zigzag", halves, "each half was cut by itself"),
        Wrong("layer_memory", selective_reversed, "gone without"),
        Wrong("layer_memory", exchanged, "10 and 24 are exchanged"),
        Wrong("layer_memory", of_all_ranks, "all t ranks together"),
        Wrong("layer_memory", inside_divided_twice, "divided by t already"),
        Wrong("layer_memory", a_part_stays, "a part of the scores"),
        Wrong("layer_memory", batch_squared, "count b twice"),
        Wrong("ring_attention", later_ranks_skipped, "were skipped"),
        Wrong("ring_attention", queries_travel, "queries were sent round"),
        Wrong("ring_attention", collected, "holds all keys at once"),
        Wrong("ring_attention", joined, "holds all keys at once"),
        Wrong("layer_memory", ten_taken_away, "does not take it away"),
        Wrong("ring_attention", keys_for_values, "exchanged"),
        Wrong("zigzag", other_way_round, "the other way round"),
        Wrong("layer_memory", scores_divided_twice, "divided by t already"),
        Wrong("ring_attention", begins_with_zero, "an empty beginning"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("merge", by_a_sigmoid),
        ("merge", by_a_softmax),
        ("layer_memory", in_whole_bytes),
        ("ring_attention", keys_and_values_apart),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
