"""Checks of 09-chips/05-clusters-and-networks."""

from __future__ import annotations

import torch

from llmlab.chips.clusters_and_networks import clusters_and_networks
from llmlab.course.grading.checking import Checks, diagnose, expect

check = Checks("09-chips/05-clusters-and-networks")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def clusters_and_networks_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="clusters_and_networks_step(x)")
    diagnose(
        got,
        right=clusters_and_networks.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="clusters_and_networks_step(x)",
    )
