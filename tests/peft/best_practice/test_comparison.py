"""What is read out of a sweep: the rate of seed 0, the spread over seeds, and the
methods that nobody beats.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.peft.best_practice import catalogue, comparison


def row(method, lr, seed, loss, task="sort", trained=10, dev=None):
    names = {
        "task": task,
        "method": method,
        "lr": str(lr),
        "seed": str(seed),
        "trained": str(trained),
    }
    return names | {
        "dev": str(loss if dev is None else dev),
        "loss": str(loss),
        "accuracy": "0.5",
    }


def test_the_rate_is_that_of_seed_0_and_the_mean_is_over_its_seeds():
    rows = [
        row("a", 0.1, 0, 2.0),
        row("a", 0.2, 0, 1.0),
        row("a", 0.2, 2, 1.6),
        row("a", 0.1, 1, 0.1),
        row("a", 0.2, 1, 1.3),
    ]
    found = comparison.best(
        [*rows, row("b", 1, 0, 9.0), row("a", 9, 0, 0.0, task="bible")], "sort"
    )
    assert list(found) == ["a", "b"]
    assert found["a"].lr == 0.2 and found["a"].losses == (1.0, 1.3, 1.6)
    assert found["a"].loss == pytest.approx(1.3) and found["a"].spread == pytest.approx(
        0.6
    )
    assert found["b"].spread == 0 and found["b"].accuracy == 0.5


def test_the_rate_is_not_chosen_by_the_loss_that_is_reported():
    rows = [row("a", 0.1, 0, loss=1.0, dev=3.0), row("a", 0.2, 0, loss=2.0, dev=1.0)]
    assert comparison.best(rows, "sort")["a"].lr == 0.2


def test_a_task_without_runs_is_named():
    with pytest.raises(
        ValueError, match="task='bible' has no runs; there are runs of sort"
    ):
        comparison.best([row("a", 1, 0, 1.0)], "bible")


def test_gain_is_0_at_the_base_and_1_at_full():
    assert comparison.gain(5.0, 5.0, 1.0) == 0 and comparison.gain(1.0, 5.0, 1.0) == 1
    assert comparison.gain(2.0, 5.0, 1.0) == pytest.approx(0.75)


def test_pareto_by_hand():
    cost, loss = (
        torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]),
        torch.tensor([5.0, 4.0, 4.0, 3.0, 5.0]),
    )
    # equals do not beat each other
    assert comparison.pareto(cost, loss).tolist() == [True, False, False, True, True]
    with pytest.raises(ValueError, match="loss has shape"):
        comparison.pareto(cost, loss[:2])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)
)
def test_pareto_is_its_definition(points):
    cost, loss = (
        torch.tensor(x, dtype=torch.float32) for x in zip(*points, strict=True)
    )
    beaten = [
        any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
        for a, b in points
    ]
    assert comparison.pareto(cost, loss).tolist() == [not b for b in beaten]


def test_the_shipped_sweep_is_of_this_catalogue():
    rows = comparison.read()
    names = {m.name for m in catalogue.METHODS}
    assert rows and {r["method"] for r in rows} <= names
    keys = [(r["task"], r["method"], r["lr"], r["seed"]) for r in rows]
    assert len(set(keys)) == len(keys), "no run stands there twice"
    assert all(r["steps"] == "40" and r["torch"] for r in rows)
    for task in ("source", "bible", "sort"):
        found = comparison.best(rows, task)
        assert set(found) == names and all(len(r.losses) == 3 for r in found.values())
        assert found["full fine-tuning"].loss < found["Prompt Tuning"].loss


def test_each_rate_of_the_sweep_has_a_worse_neighbour_on_either_side():
    rows = comparison.read()
    for task in ("source", "bible", "sort"):
        for name, found in comparison.best(rows, task).items():
            tried = sorted(
                {
                    float(r["lr"])
                    for r in rows
                    if (r["task"], r["method"]) == (task, name)
                }
            )
            assert tried[0] < found.lr < tried[-1], (
                f"{name} on {task}: {found.lr} lies at an edge of {tried}"
            )
