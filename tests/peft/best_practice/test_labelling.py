"""The labelling task: what its batches depend on, what each method trains, and the
recorded curves.
"""

import pytest
import torch

from llmlab.peft import walk
from llmlab.peft.best_practice import labelling


def test_passages_depend_on_split_and_seed_only():
    tokens, labels = labelling.passages("train", 3, count=5)
    assert tokens.shape == (5, 24) and labels.min() >= 0 and labels.max() < 3
    again, _ = labelling.passages("train", 3, count=5)
    other, _ = labelling.passages("train", 4, count=5)
    held, _ = labelling.passages("valid", 3, count=5)
    assert (
        torch.equal(tokens, again)
        and not torch.equal(tokens, other)
        and not torch.equal(tokens, held)
    )


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [("probe", 384, 384), ("deep", 8_576, 8_576), ("full", 700_000, 10**7)],
)
def test_what_each_method_trains(method, least, most):
    model = labelling.prepare(method, seed=1)
    assert least <= walk.trainable(model)[0] <= most
    assert model(torch.randint(2048, (2, 6)))[:, -1].shape == (2, 3)


def test_training_yields_its_steps_and_learns():
    model = labelling.prepare("full", seed=0)
    tokens, labels = labelling.passages("train", 0)  # the batch of the first step
    before = labelling.accuracy(model, tokens, labels)
    assert list(labelling.train(model, 1e-3, 6, seed=0)) == [1, 2, 3, 4, 5, 6]
    assert labelling.accuracy(model, tokens, labels) > before


def test_a_method_that_there_is_not_is_named():
    with pytest.raises(
        ValueError, match="method='wide' must be one of probe, shallow, deep, full"
    ):
        labelling.prepare("wide", 0)


def test_the_recorded_curves_are_complete():
    rows = labelling.curves()
    keys = [(r["method"], r["rate"], r["seed"], r["steps"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for method, rates in labelling.RATES.items():
        own = [r for r in rows if r["method"] == method]
        assert {float(r["rate"]) for r in own if r["seed"] == "0"} == set(rates)
        (best,) = {r["rate"] for r in own if r["seed"] != "0"}
        last = {
            r["rate"]: float(r["dev"])
            for r in own
            if r["seed"] == "0" and r["steps"] == "240"
        }
        assert last[best] == max(last.values()), "the rate was chosen by dev accuracy"
        assert {r["seed"] for r in own if r["rate"] == best} == {"0", "1", "2"}
