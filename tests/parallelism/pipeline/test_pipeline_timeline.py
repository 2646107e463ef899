"""The simulator: published bubbles to the last digit, a longest path computed another
way, deadlocks named.
"""

from __future__ import annotations

from functools import cache

import pytest

from llmlab.parallelism.pipeline.schedules import (
    bubble_fraction,
    chunks,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    stage_of,
    zb_h1,
    zb_h2,
    zb_v,
)
from llmlab.parallelism.pipeline.timeline import Costs, Timeline, needs, simulate

UNEVEN = Costs(F=1.0, I=1.25, W=0.5)
SIZES = [(p, m) for p in (1, 2, 3, 4, 6) for m in (1, 2, 3, 4, 8, 12)]


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b], ids=lambda f: f.__name__)
def test_bubble_of_gpipe_and_1f1b(make, p, m):
    """(m + p − 1) slots of a forward and a backward, of which a rank works m: also for
    m < p.
    """
    found = simulate(make(p, m), UNEVEN)
    assert found.makespan == pytest.approx((m + p - 1) * UNEVEN.work)
    assert (
        found.bubble
        == pytest.approx(bubble_fraction(p, m))
        == pytest.approx((p - 1) / (m + p - 1))
    )


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_naive_uses_one_rank_at_a_time(p, m):
    found = simulate(naive(p, m), UNEVEN)
    assert found.makespan == pytest.approx(p * m * UNEVEN.work)
    assert found.bubble == pytest.approx(1 - 1 / p)


@pytest.mark.parametrize(
    ("p", "m", "v"), [(2, 4, 2), (4, 4, 2), (4, 8, 2), (4, 8, 4), (3, 9, 5)]
)
def test_interleaving_divides_the_bubble_by_v(p, m, v):
    found = simulate(interleaved(p, m, v), UNEVEN)
    assert found.makespan == pytest.approx((m + (p - 1) / v) * UNEVEN.work)
    assert found.bubble == pytest.approx(bubble_fraction(p, m, v))
    assert found.makespan / (m * UNEVEN.work) - 1 == pytest.approx((p - 1) / (v * m)), (
        "Narayanan et al., section 2.2.2"
    )


@pytest.mark.parametrize(
    "costs", [Costs(), Costs(1.2, 1.0, 0.7), Costs(2, 2, 1)], ids=str
)
@pytest.mark.parametrize(("p", "m"), [(2, 6), (4, 12), (6, 24)])
def test_bubbles_of_zero_bubble_schedules(p, m, costs):
    """Qi et al., Table 2."""
    F, I, W = costs.F, costs.I, costs.W  # noqa: E741

    def lost(t):
        return t.span - m * costs.work

    assert lost(simulate(one_f_one_b(p, m), costs)) == pytest.approx(
        (p - 1) * (F + I + W)
    )
    assert lost(simulate(zb_h1(p, m), costs)) == pytest.approx((p - 1) * (F + I - W))
    assert lost(simulate(zb_h2(p, m), costs)) == pytest.approx(
        (p - 1) * (F + I - 2 * W)
    )


@pytest.mark.parametrize(("p", "m"), [(2, 3), (3, 7), (4, 8), (6, 12)])
def test_zb_v_has_no_bubble(p, m):
    found = simulate(zb_v(p, m), layout="v")
    assert found.span == pytest.approx(3 * m) and found.bubble_rate == pytest.approx(0)
    assert found.makespan == pytest.approx(3 * m + (p - 1) / 2), (
        "the last rank begins p − 1 half forwards late"
    )


# Qi et al., Tables 5 and 6: profiled times in ms, and the bubble rates that the authors
# computed from them.
PUBLISHED = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083)),
    (8, 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837)),
    (8, 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674, 0.0444)),
    (8, 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698)),
    (8, 32, (29.802, 29.428, 19.530, 0.577), (0.1898, 0.1045, 0.0559)),
    (8, 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294)),
    (16, 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672)),
    (16, 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.1088, 0.0516)),
    (16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266)),
    (32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641)),
    (32, 128, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1106, 0.0490)),
    (32, 256, (10.402, 10.248, 7.698, 0.460), (0.1352, 0.0594, 0.0257)),
]


@pytest.mark.parametrize(("p", "m", "times", "rates"), PUBLISHED)
def test_published_bubble_rates(p, m, times, rates):
    costs = Costs(*times)
    ours = [
        simulate(make(p, m), costs).bubble_rate for make in (one_f_one_b, zb_h1, zb_h2)
    ]
    assert ours == pytest.approx(rates, abs=0.5e-4)


@pytest.mark.parametrize("comm", [0.0, 0.3])
@pytest.mark.parametrize(
    "make",
    [naive, gpipe, one_f_one_b, interleaved, zb_h1, zb_h2, zb_v],
    ids=lambda f: f.__name__,
)
def test_every_op_starts_when_its_longest_path_ends(make, comm):
    """The end of an op is 1 + the latest end among what it needs and what its rank did
    before: by recursion, not by events.
    """
    p, m, costs = 3, 6, Costs(1.0, 1.5, 0.75, comm)
    layout, schedule = "v" if make is zb_v else "loop", make(p, m)
    v = chunks(schedule)
    place = {}
    for r, ops in enumerate(schedule):
        for n, (kind, i, c) in enumerate(ops):
            place["I" if kind == "B" else kind, i, stage_of(r, c, p, layout)] = r, n

    @cache
    def end(r, n):
        before = [end(r, n - 1)] if n else [0.0]
        for result in needs(schedule[r][n], r, p, v, layout):
            other, k = place[result]
            before.append(end(other, k) + (comm if other != r else 0))
        return max(before) + getattr(costs, schedule[r][n][0]) / v

    for bar in simulate(schedule, costs, layout).bars:
        n = schedule[bar.rank].index((bar.kind, bar.microbatch, bar.chunk))
        assert bar.end == pytest.approx(end(bar.rank, n))


def test_a_deadlock_is_named():
    crossed = [
        [("F", 0, 0), ("B", 0, 0), ("F", 1, 0), ("B", 1, 0)],
        [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("B", 1, 0)],
    ]
    with pytest.raises(ValueError, match="deadlock") as error:
        simulate(crossed)
    assert (
        "rank 0, at B of microbatch 0, chunk 0, waits for I of microbatch 0, stage 1"
        in str(error.value)
    )
    assert (
        "rank 1, at F of microbatch 1, chunk 0, waits for F of microbatch 1, stage 0"
        in str(error.value)
    )


def test_a_list_out_of_order_is_no_deadlock():
    with pytest.raises(ValueError, match="before its F"):
        simulate([[("B", 0, 0), ("F", 0, 0)]])


def test_measures_of_a_clock_that_does_not_start_at_zero():
    bars = [
        (0, "F", 0, 0, 100.0, 101.0),
        (1, "F", 0, 0, 101.0, 102.0),
        (1, "B", 0, 0, 102.0, 104.0),
        (0, "B", 0, 0, 104.0, 106.0),
    ]
    found = Timeline(bars, 2)
    assert (found.makespan, found.span, found.busy(1)) == (6, 6, 3)
    assert found.bubble == pytest.approx(0.5)


def test_it_draws_itself():
    ax = simulate(interleaved(2, 4)).draw(until=20)
    assert sum(
        len(c.get_paths()) for c in ax.collections
    ) == 2 * 2 * 2 * 4 and ax.get_xlim() == (0, 20)
    assert [t.get_text() for t in ax.texts[:2]] == ["0", "1"]
