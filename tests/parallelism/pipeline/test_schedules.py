"""Schedules as lists: complete, in order, of the published warm-up, memory and bubble,
and those of PyTorch.
"""

from __future__ import annotations

import pytest

from llmlab.parallelism.pipeline.schedules import (
    as_text,
    bubble_fraction,
    check,
    chunks,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    peak_microbatches,
    stage_of,
    zb_h1,
    zb_h2,
    zb_v,
)

ALL = (naive, gpipe, one_f_one_b, interleaved, zb_h1, zb_h2, zb_v)
SIZES = [(p, m) for p in (1, 2, 3, 4, 6) for m in (1, 2, 3, 4, 5, 8, 12)]


def order(ops, kinds, chunk=0):
    return [i for kind, i, c in ops if kind in kinds and c == chunk]


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_every_rank_does_everything_once_and_first_in_first_out(make, p, m):
    if make is interleaved:
        m = p * m  # it wants a multiple
    schedule = make(p, m)
    check(schedule, m)
    assert len(schedule) == p
    for ops in schedule:
        for chunk in range(chunks(schedule)):
            for kinds in ("F", "BI"):
                assert order(ops, kinds, chunk) == list(range(m)), (kinds, ops)
            late = order(ops, "W", chunk)
            assert late in ([], list(range(m)))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_warms_up_then_alternates_then_drains(p, m):
    for r, ops in enumerate(one_f_one_b(p, m)):
        kinds = "".join(kind for kind, _, _ in ops)
        warmup = min(p - r - 1, m)
        assert kinds == "F" * warmup + "FB" * (m - warmup) + "B" * warmup


def test_1f1b_with_fewer_microbatches_than_ranks():
    assert one_f_one_b(4, 2) == [
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
        [("F", 0, 0), ("B", 0, 0), ("F", 1, 0), ("B", 1, 0)],
    ]


def test_interleaved_deals_rounds_of_p():
    """Figure 4 of Narayanan et al. 2021, 2 devices' worth: p forwards of chunk 0, the
    same p of chunk 1, then the next p.
    """
    first, last = interleaved(2, 4)
    assert [(i, c) for kind, i, c in first if kind == "F"] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (2, 0),
        (3, 0),
        (2, 1),
        (3, 1),
    ]
    assert [(i, c) for kind, i, c in last if kind == "B"] == [
        (0, 1),
        (1, 1),
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
        (2, 0),
        (3, 0),
    ]
    for r, ops in enumerate(interleaved(4, 8, 3)):
        kinds = "".join(kind for kind, _, _ in ops)
        assert kinds.index("B") == min(2 * 4 + 2 * (4 - r - 1), 24) + 1


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= 2 * p - 1])
def test_what_a_rank_holds(p, m):
    ranks = range(p)
    assert peak_microbatches(naive(p, m)) == [1] * p
    assert peak_microbatches(gpipe(p, m)) == [m] * p
    assert peak_microbatches(one_f_one_b(p, m)) == [p - r for r in ranks]
    assert peak_microbatches(zb_h1(p, m)) == [p - r for r in ranks]
    assert peak_microbatches(zb_h2(p, m)) == [2 * (p - r) - 1 for r in ranks]
    assert peak_microbatches(zb_v(p, m)) == [p] * p
    if m % p == 0 and m > p:
        for v in (2, 3):
            assert peak_microbatches(interleaved(p, m, v)) == pytest.approx(
                [p + (p - 2 * r - 1) / v for r in ranks]
            )


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_never_holds_more_than_there_are_microbatches(p, m):
    assert peak_microbatches(one_f_one_b(p, m)) == [min(p - r, m) for r in range(p)]


@pytest.mark.parametrize("p", [2, 4, 6])
def test_memory_of_zero_bubble_schedules_as_published(p):
    """Qi et al., section 2.3, ranks counted from 1: (p − i + 1) M_B + (i − 1) M_W, and
    (2p − 2i + 1) M_B + (2i − 2) M_W.
    """
    M_B, M_W, m = 5.0, 2.0, 4 * p
    assert peak_microbatches(zb_h1(p, m), M_B, M_W) == [
        (p - i + 1) * M_B + (i - 1) * M_W for i in range(1, p + 1)
    ]
    assert peak_microbatches(zb_h2(p, m), M_B, M_W) == [
        (2 * p - 2 * i + 1) * M_B + (2 * i - 2) * M_W for i in range(1, p + 1)
    ]


def test_w_comes_r_microbatches_late_in_h1():
    for r, ops in enumerate(zb_h1(4, 12)):
        between = [
            sum(kind == "I" for kind, _, _ in ops[: ops.index(("W", i, 0))])
            for i in range(12)
        ]
        assert between[: 12 - r] == [i + 1 + r for i in range(12 - r)]


def test_stages_of_both_layouts():
    assert [[stage_of(r, c, 3) for c in range(2)] for r in range(3)] == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]
    assert [[stage_of(r, c, 3, "v") for c in range(3)] for r in range(3)] == [
        [0, 5, 6],
        [1, 4, 7],
        [2, 3, 8],
    ]
    with pytest.raises(ValueError, match="layout='x'"):
        stage_of(0, 0, 2, "x")


def test_printed():
    assert as_text(one_f_one_b(2, 2)) == "rank 0  F0 F1 B0 B1\nrank 1  F0 B0 F1 B1"
    assert (
        as_text(interleaved(2, 2)).splitlines()[1]
        == "rank 1  F0a F1a F0b B0b F1b B1b B0a B1a"
    )


@pytest.mark.parametrize(
    ("ops", "says"),
    [
        (
            [("F", 0, 0), ("B", 0, 0), ("B", 0, 0)],
            "rank 0 does B of microbatch 0, chunk 0 twice",
        ),
        (
            [("F", 0, 0), ("F", 0, 0), ("B", 0, 0)],
            "does F of microbatch 0, chunk 0 twice",
        ),
        (
            [("F", 0, 0), ("I", 0, 0), ("B", 0, 0)],
            "does B of microbatch 0, chunk 0 twice",
        ),
        ([("B", 0, 0), ("F", 0, 0)], "does B of microbatch 0, chunk 0 before its F"),
        (
            [("F", 0, 0), ("W", 0, 0), ("I", 0, 0)],
            "does W of microbatch 0, chunk 0 before its I",
        ),
        ([("F", 0, 0), ("I", 0, 0)], "never finishes the backward of microbatch 0"),
        (
            [("F", 0, 0), ("B", 0, 0), ("F", 1, 0)],
            "never finishes the backward of microbatch 1",
        ),
        ([("F", 0, 0), ("X", 0, 0)], "is no op"),
        ([("F", 2, 0), ("B", 2, 0)], "is no op for m=2"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(ops, says):
    with pytest.raises(ValueError, match=says):
        check([ops], 2 if ("F", 2, 0) in ops else None)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interleaved(4, 6), "m=6 must be a multiple of the p=4 ranks"),
        (lambda: interleaved(4, 8, 1), "v=1"),
        (lambda: one_f_one_b(0, 4), "p=0"),
        (lambda: gpipe(2, 0), "m=0"),
        (lambda: bubble_fraction(2, 2.5), "m=2.5"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# PyTorch's orders. Its classes make them in methods that need only the sizes.


def torchs_order(name: str, p: int, m: int, v: int) -> list:
    """The schedule of torch.distributed.pipelining as (kind, microbatch, stage) lists,
    without its waits and reductions.
    """
    from torch.distributed.pipelining import schedules as theirs

    fake = object.__new__(getattr(theirs, name))
    fake._n_microbatches, fake._num_stages, fake.num_stages = m, p, p * v
    fake.pp_group_size, fake.n_local_stages, fake.microbatches_per_round = (
        p,
        v,
        m // max(1, m // p),
    )
    single = hasattr(fake, "_get_pipeline_order")
    found = (
        fake._get_pipeline_order()
        if single
        else {r: fake._calculate_single_rank_operations(r) for r in range(p)}
    )
    actions = [
        [
            a
            for a in found[r]
            if a is not None and a.computation_type.value != "REDUCE_GRAD"
        ]
        for r in range(p)
    ]
    lists = [
        [(a.computation_type.value, a.microbatch_index, a.stage_index) for a in row]
        for row in actions
    ]
    if name == "Schedule1F1B":  # torch 2.13 numbers the last rank's forwards 1 … m
        shift = min(i for kind, i, _ in lists[-1] if kind == "F")
        lists[-1] = [
            (kind, i - shift if kind == "F" else i, s) for kind, i, s in lists[-1]
        ]
    return lists


@pytest.mark.parametrize(
    ("name", "make", "v"),
    [
        ("ScheduleGPipe", gpipe, 1),
        ("Schedule1F1B", one_f_one_b, 1),
        ("ScheduleInterleaved1F1B", lambda p, m: interleaved(p, m, 2), 2),
        ("ScheduleInterleaved1F1B", lambda p, m: interleaved(p, m, 3), 3),
        ("ScheduleInterleavedZeroBubble", zb_h1, 1),  # with one stage a rank
        ("ScheduleZBVZeroBubble", zb_v, 2),
    ],
)
@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 6), (3, 6), (4, 4), (4, 8), (4, 12)])
def test_the_order_is_pytorchs(name, make, v, p, m):
    layout = "v" if make is zb_v else "loop"
    ours = [
        [(kind, i, stage_of(r, c, p, layout)) for kind, i, c in ops]
        for r, ops in enumerate(make(p, m))
    ]
    assert ours == torchs_order(name, p, m, v)
