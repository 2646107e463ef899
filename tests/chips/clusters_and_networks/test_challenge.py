"""The challenge's step by formulas, its bounds, and how far apart placements are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmlab.chips.clusters_and_networks import challenge
from tests.checks.rejecting import solved

CASES, Cluster, Job = challenge.CASES, challenge.Cluster, challenge.Job
step = challenge.step

SLUG = "09-chips/05-clusters-and-networks"


@pytest.mark.parametrize("case", CASES)
def test_only_a_placement_for_these_cables_is_under_the_bound(case):
    cluster, job = case.cluster, case.job
    found = step(cluster, job, solved(SLUG)["placement"](cluster, job)).seconds
    usual = challenge.in_order(job)
    assert found * 1.05 <= case.bound
    assert challenge.least_seconds(cluster, job) <= found
    assert step(replace(cluster, down=()), job, usual).seconds < case.bound
    assert step(cluster, job, usual).seconds > 1.1 * case.bound
    naive = challenge.in_order(job, "tp-pp-dp")
    assert step(cluster, job, naive).seconds > 1.5 * case.bound


def test_the_step_is_that_of_the_formulas():
    """All cables up, two leaves in the middle with two rings on their four cables."""
    job, cluster = Job(4, 3, 4), Cluster(4, 3)
    done = step(cluster, job, challenge.in_order(job))
    tp, _, dp = (phase.seconds for phase in done.phases)
    size = 4 * challenge.PARAMETERS / 12
    assert dp == pytest.approx(2 * 3 * size / 4 * 8 / (4 * 12.5e9), rel=1e-3)
    sums = 6 * 4 * 16  # ticks, all-reduces of 16 layers
    ring = 2 * 3 * (4096 * 5120 * 2 / 4 / 300e9 + 2e-6)
    assert tp == pytest.approx(sums * ring, rel=1e-3)
    flops = 6 * 6 * challenge.PARAMETERS / 12 * 4096
    assert done.compute == pytest.approx(flops / 156e12)
    assert done.worst.kind == "dp"


def test_the_model_has_the_parameters_of_its_card():
    """13.1 billion without embeddings, as it is printed."""
    assert 13.0e9 < challenge.PARAMETERS < 13.3e9


def test_groups_hold_each_rank_once():
    job = Job(2, 3, 4)
    for kind, size in (("tp", 2), ("pp", 3), ("dp", 4)):
        groups = job.groups(kind)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(24))
    assert job.groups("dp")[0] == [0, 6, 12, 18]
    assert job.groups("tp")[0] == [0, 1]
    assert job.groups("pp")[0] == [0, 2, 4]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="pp=5 must divide the 48 layers"):
        Job(4, 5, 4)
    with pytest.raises(ValueError, match="there is no link leaf 9 → spine 0"):
        Cluster(4, 3, down=(("leaf 9", "spine 0"),))
    with pytest.raises(ValueError, match="order='dp' must be"):
        challenge.in_order(Job(4, 3, 4), "dp")
    with pytest.raises(ValueError, match="kind='ep' must be"):
        Job(4, 3, 4).groups("ep")
    with pytest.raises(ValueError, match="tp=2 must be gpus=4"):
        challenge.least_seconds(Cluster(4, 3), Job(2, 3, 8))
