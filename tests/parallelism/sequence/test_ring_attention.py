"""Ring attention is full attention: forward and gradients, any cut, any number of
ranks, and so trains the whole model.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmlab.models.attention import sdpa
from llmlab.parallelism import Link, World, launch
from llmlab.parallelism.sequence.activation_memory import Peak, Saved
from llmlab.parallelism.sequence.cost import AttentionShape, sent
from llmlab.parallelism.sequence.ring import RingAttention, attend, merge
from llmlab.parallelism.sequence.shards import (
    LAYOUTS,
    join,
    shards,
    split_loss,
    sum_gradients,
    take,
)
from tests.covering import each_value
from tests.parallelism.conftest import VARIANTS, tiny
from tests.parallelism.tensor.test_tensor import assert_same, train, whole_loss

B, H, K, D = 2, 6, 3, 8  # unequal, grouped


def inputs(T, dtype=torch.float32):
    torch.manual_seed(T)
    return [torch.randn(B, n, T, D, dtype=dtype) for n in (H, K, K, H)]


def full(q, k, v, do, causal=True):
    """PyTorch's attention on one process: output and the three gradients."""
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out.backward(do)
    return out.detach(), q.grad, k.grad, v.grad


def ring(comm, tensors, cut, causal=True, tile=128):
    q, k, v, do = (take(t, cut, comm.rank, 2) for t in tensors)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = RingAttention(comm, cut, causal, tile)(q, k, v)
    out.backward(do)
    return [join(t, cut, comm, 2) for t in (out.detach(), q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("T", [24, 29])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_forward_and_gradients_are_those_of_full_attention(p, kind, T):
    tensors, cut = inputs(T), shards(T, p, kind)
    expected = full(*tensors)
    for result in World(p).run(ring, tensors, cut):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [1, 3, 7])
def test_tiles_change_nothing(tile):
    tensors, cut = inputs(23), shards(23, 3, "zigzag")
    for ours, theirs in zip(
        World(3).run(ring, tensors, cut, True, tile)[1], full(*tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("p", [2, 3])
def test_without_a_causal_mask(p):
    tensors, cut = inputs(14), shards(14, p, "contiguous")
    for ours, theirs in zip(
        World(p).run(ring, tensors, cut, False)[0],
        full(*tensors, causal=False),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_shards_of_any_length_in_any_order():
    """The cut is data: 1, 7 and 3 tokens, shuffled."""
    tensors, order = (
        inputs(11),
        torch.randperm(11, generator=torch.Generator().manual_seed(0)),
    )
    cut = list(order.split([1, 7, 3]))
    for ours, theirs in zip(
        World(3).run(ring, tensors, cut, True, 2)[2], full(*tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_in_real_processes():
    tensors, cut = inputs(29), shards(29, 4, "zigzag")
    for result in launch(ring, 4, tensors, cut):
        for ours, theirs in zip(result, full(*tensors), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pieces_merge_in_fp32():
    """bf16 in, bf16 out: as close to the exact result as one fused bf16 kernel, not
    worse with more pieces.
    """
    exact = inputs(48)
    half = [t.bfloat16() for t in exact]
    truth = full(*(t.float() for t in half))[0]
    once = World(1).run(ring, half, shards(48, 1, "contiguous"))[0][0]
    pieces = World(6).run(ring, half, shards(48, 6, "zigzag"), True, 2)[0][0]
    assert pieces.dtype == torch.bfloat16

    def error(o):
        return (o.float() - truth).abs().max().item()

    assert error(pieces) <= error(once) * 1.01 < 0.02


def test_fp64_stays_fp64_and_a_rank_may_have_no_tokens():
    """Merged in the wider of fp32 and the input's dtype, the ring is exact to the
    rounding of fp64, gradients too.
    """
    tensors, order = (
        inputs(13, torch.float64),
        torch.randperm(13, generator=torch.Generator().manual_seed(1)),
    )
    cut = list(order.split([6, 0, 7]))
    for ours, theirs in zip(
        World(3).run(ring, tensors, cut, True, 4)[1], full(*tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_a_query_that_sees_nothing_adds_nothing():
    q, k, v, _ = inputs(4)
    positions = torch.arange(4)
    some, none = (
        attend(q, k, v, positions, positions),
        attend(q, k, v, positions, positions + 10),
    )
    assert none[0].count_nonzero() == 0 and (none[1] == -math.inf).all()
    for merged in (merge(*some, *none), merge(*none, *some)):
        torch.testing.assert_close(merged[0], some[0])
        torch.testing.assert_close(merged[1], some[1])
    o, lse = merge(*none, *none)
    assert o.isfinite().all() and (lse == -math.inf).all()


def test_scores_in_the_hundreds():
    q, k, v, do = inputs(12)
    tensors = [q * 15, k * 15, v, do]
    out = World(3).run(ring, tensors, shards(12, 3, "zigzag"))[0][0]
    # what fp32 knows of a score of 600
    torch.testing.assert_close(out, full(*tensors)[0], atol=2e-4, rtol=0)


# The whole model


def training(comm, model, tokens, layout):
    cut = shards(tokens.shape[1] - 1, comm.size, layout)
    x, y = take(tokens[:, :-1], cut, comm.rank), take(tokens[:, 1:], cut, comm.rank)
    attention, optimizer, losses = (
        RingAttention(comm, cut, tile=4),
        torch.optim.SGD(model.parameters(), 0.3, 0.9),
        [],
    )
    for _ in range(4):
        optimizer.zero_grad()
        loss = split_loss(
            model(x, position_ids=cut[comm.rank][None], attention=attention), y, comm
        )
        loss.backward()
        sum_gradients(model, comm)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(
    ("p", "layout", "variant"),
    each_value(
        [1, 2, 3, 4, 6],
        ["zigzag", "striped", "zigzag", "zigzag", "contiguous"],
        list(VARIANTS),
    ),
)
def test_training_is_that_of_the_whole_model(p, layout, variant):
    tokens = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    model = tiny(**VARIANTS[variant])
    ours = World(p).run(training, model, tokens, layout)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


def test_training_in_real_processes():
    tokens = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    model = tiny(num_key_value_heads=2)
    ours = launch(training, 3, model, tokens, "zigzag")
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


def test_without_the_positions_it_is_another_model():
    """RoPE must turn by the place in the whole sequence: the shards' own 0, 1, 2 … give
    other logits.
    """
    tokens = torch.randint(37, (2, 24), generator=torch.Generator().manual_seed(1))
    cut = shards(24, 2, "zigzag")

    def fn(comm, model, right):
        positions = cut[comm.rank][None] if right else None
        ring = RingAttention(comm, cut)
        with torch.no_grad():
            logits = model(
                take(tokens, cut, comm.rank),
                position_ids=positions,
                # shown no positions, it cannot compare them
                attention=ring if right else lambda *qkv: ring(*qkv),
            )
        return join(logits, cut, comm)

    with torch.no_grad():
        expected = tiny()(tokens)

    def error(right):
        return (World(2).run(fn, tiny(), right)[0] - expected).abs().max()

    assert error(True) < 1e-5 and error(False) > 1e-3


# What it costs


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_are_those_of_the_formula(p, backward):
    T = 12 * p

    def fn(comm):
        q, k, v, do = (take(t, cut, comm.rank, 2) for t in tensors)
        out = RingAttention(comm, cut)(*(t.requires_grad_() for t in (q, k, v)))
        if backward:
            before = comm.ledger.bytes(rank=comm.rank)
            out.backward(do)
            return comm.ledger.bytes(rank=comm.rank) - before
        return comm.ledger.bytes(rank=comm.rank)

    tensors, cut = inputs(T), shards(T, p, "zigzag")
    expected = sent(
        "ring", p, AttentionShape(B, T, H, K, D), backward=backward, itemsize=4
    )
    assert World(p).run(fn) == [expected] * p
    hops = p - 1 if not backward else 2 * p - 1  # dK and dV travel one hop more
    assert expected == hops * 2 * B * K * (T // p) * D * 4


def test_what_is_kept_is_a_shard():
    """q, k, v, out and ℓ of this rank: nothing of the others, and no scores."""
    T = 64

    def fn(comm):
        mine = [
            take(t, cut, comm.rank, 2).clone().requires_grad_() for t in tensors[:3]
        ]
        with Saved() as saved:
            RingAttention(comm, cut)(*mine)
        return saved.bytes

    tensors = inputs(T)
    for p in (1, 2, 4):
        cut = shards(T, p, "zigzag")
        assert World(p).run(fn) == [B * (T // p) * (2 * H * D + 2 * K * D + H) * 4] * p


def test_the_peak_falls_with_the_number_of_ranks():
    """From two ranks on, where keys are in flight; and even one rank never has the
    scores whole.
    """
    T = 128

    def fn(comm):
        q, k, v, do = (take(t, cut, comm.rank, 2) for t in tensors)
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        with Peak() as peak:
            RingAttention(comm, cut, tile=8)(q, k, v).backward(do)
        return peak.peak

    tensors, peaks = inputs(T), {}
    for p in (1, 2, 4, 8):
        cut = shards(T, p, "zigzag")
        peaks[p] = max(World(p).run(fn))
    assert peaks[1] < B * H * T * T * 4 / 3
    assert 1.4 < peaks[2] / peaks[4] < 2.1 and 1.4 < peaks[4] / peaks[8] < 2.1


def test_the_clock_shows_the_overlap_and_the_balance():
    """A hop hides behind the piece that is computed meanwhile; zigzag ends before
    contiguous.
    """
    T, p, pace = 64, 4, 1e-6
    tensors = inputs(T)
    # a hop takes as long as 100 pairs
    link = Link(latency=0.0, bandwidth=2 * B * K * (T // p) * D * 4 / (100 * pace))

    def end(layout, pace=pace):
        world = World(p, link=link)
        cut = shards(T, p, layout)
        world.run(
            lambda comm: RingAttention(comm, cut, pace=pace)(
                *(take(t, cut, comm.rank, 2) for t in tensors[:3])
            ).sum()
        )
        return world.ledger.time

    pairs = T * (T + 1) / 2
    assert end("zigzag") == pytest.approx(pairs / p * pace, rel=1e-6), (
        "nothing but work: every hop is hidden"
    )
    assert end("contiguous") / end("zigzag") == pytest.approx(1.75, abs=0.05)
    assert end("zigzag", pace=0.0) == pytest.approx((p - 1) * 100 * 1e-6), (
        "without work there are p − 1 hops"
    )


def test_tiles_that_nobody_sees_are_skipped():
    cut = shards(32, 4, "contiguous")
    done = World(4).run(
        lambda comm: [
            len(list(RingAttention(comm, cut, tile=8).tiles(s))) for s in range(4)
        ]
    )
    assert done == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_nonsense_is_refused():
    def run(**changes):
        q = torch.zeros(1, changes.get("H", 4), changes.get("T", 4), 2)
        k = torch.zeros(1, 3 if "H" in changes else 2, 4, 2)
        mask = torch.ones(4, 4) if "mask" in changes else None
        World(2).run(
            lambda comm: RingAttention(
                comm, shards(8, 2, "zigzag"), **changes.get("ring", {})
            )(q, k, k, mask)
        )

    with pytest.raises(ValueError, match="4 query heads must be a multiple of the 3"):
        run(H=4)
    with pytest.raises(ValueError, match="q has 5 tokens; the cut gives this rank 4"):
        run(T=5)
    with pytest.raises(ValueError, match="mask must be None"):
        run(mask=True)
    with pytest.raises(ValueError, match="tile=0"):
        run(ring={"tile": 0})
    with pytest.raises(ValueError, match="cut has 3 shards; the ring has 2 ranks"):
        World(2).run(
            lambda comm: RingAttention(comm, shards(8, 3, "contiguous")) and None
        )


def test_sdpa_is_the_same_full_attention():
    q, k, v, do = inputs(9)
    torch.testing.assert_close(sdpa(q, k, v, None), full(q, k, v, do)[0])
