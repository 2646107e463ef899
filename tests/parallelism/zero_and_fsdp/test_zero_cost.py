"""The cost model against the paper's printed numbers. (The ledger and held bytes are
held to it in test_fsdp.py.)
"""

from __future__ import annotations

import pytest

from llmlab.parallelism.zero_and_fsdp.cost import (
    TABLE_1,
    TABLE_2,
    agreement,
    largest_model,
    sent_bytes,
    state_bytes,
    total_bytes,
)
from llmlab.parallelism.zero_and_fsdp.offload import HostSpeed, offload_seconds


def test_figure_1():
    """7.5 B parameters, 64 GPUs."""
    assert [round(total_bytes(stage, 7.5e9, 64) / 1e9, 1) for stage in range(4)] == [
        120.0,
        31.4,
        16.6,
        1.9,
    ]


def test_table_1():
    """54 entries: 46 are ours rounded, in 8 the paper cut the digits off (4187 for
    4187.5).
    """
    words = [
        agreement(total_bytes(stage, parameters, ranks) / 1e9, printed)
        for parameters, rows in TABLE_1.items()
        for ranks, row in rows.items()
        for stage, printed in zip((1, 2, 3), row, strict=True)
    ]
    assert {word: words.count(word) for word in words} == {"same": 46, "cut": 8}


def test_agreement():
    assert [agreement(x, "41.3") for x in (41.25, 41.349, 41.36, 41.2)] == [
        "same",
        "same",
        "cut",
        "differs",
    ]
    assert [agreement(x, "4187") for x in (4187.4, 4187.9, 4188.0)] == [
        "same",
        "cut",
        "differs",
    ]


def test_table_2():
    for stage, parameters in TABLE_2["predicted"].items():
        assert largest_model(stage, 32e9, 64) == pytest.approx(parameters, rel=0.01)
        assert total_bytes(stage, largest_model(stage, 32e9, 64), 64) == pytest.approx(
            32e9
        )


def test_volumes():
    """Section 7: 2Ψ for stages 0–2, 3Ψ for stage 3, in elements and without the ring's
    (N−1)/N.
    """
    n, psi = 10**9, 1e6
    assert [round(sent_bytes(s, psi, n) / 2 / psi, 6) for s in range(4)] == [2, 2, 2, 3]
    assert [
        round(sent_bytes(s, psi, n, microbatches=4) / 2 / psi, 6) for s in range(4)
    ] == [2, 2, 5, 12]
    assert (
        sent_bytes(3, psi, 4, kept=psi / 4)
        == sent_bytes(3, psi, 4) - 2 * psi / 4 * 3 / 4
    )
    assert all(sent_bytes(s, psi, 1) == 0 for s in range(4))


def test_kinds_and_other_precisions():
    assert state_bytes(2, 100, 4) == {"weights": 200, "gradients": 50, "optimizer": 300}
    assert state_bytes(3, 100, 4, weight=4, gradient=4, optimizer=8) == {
        "weights": 100,
        "gradients": 100,
        "optimizer": 200,
    }


def test_offload_is_what_it_says():
    seconds = offload_seconds(1e9, HostSpeed(pcie=1e9, memory=2e9))
    assert seconds == {
        "gradients down": 2.0,
        "Adam on the host": 14.0,
        "weights up": 2.0,
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: state_bytes(4, 1, 1), "stage=4"),
        (lambda: total_bytes(1, 1, 0), "ranks=0"),
        (lambda: sent_bytes(1, 1, 2, microbatches=0), "microbatches=0"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
