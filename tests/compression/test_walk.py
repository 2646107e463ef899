"""The walk over a model: what is refused, and that nothing is half changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmlab.compression import llm_int8, walk
from llmlab.compression import quantization_basics as qb
from tests.models.hugging_face import make, theirs


@pytest.mark.parametrize("model_of", [make, lambda: theirs(make())])
def test_the_linears_of_the_blocks_are_found_by_name(model_of):
    found = walk.linears(model_of())
    assert {name.rpartition(".")[2] for name in found} == {
        f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_what_cannot_be_compressed_is_named():
    name = "model.layers.1.mlp.up_proj"
    for spoil, words in (
        (lambda w: w.mul_(torch.nan), "NaN or infinite"),
        (lambda w: w.zero_(), "all zeros"),
    ):
        model = make()
        with torch.no_grad():
            spoil(model.get_submodule(name).weight)
        with pytest.raises(ValueError, match=f"{name}.weight.*{words}"):
            walk.linears(model)
    for compress in (
        lambda m: qb.apply(m, qb.QuantConfig(group_size=4)),
        llm_int8.apply,
    ):
        with pytest.raises(ValueError, match="is compressed already"):
            walk.linears(compress(make()))
    with pytest.raises(ValueError, match="no linear"):
        walk.linears(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="never calls it"):
        walk.linears(nn.TransformerEncoderLayer(8, 2, 16))


def test_weights_are_put_all_or_none():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    good, bad = list(walk.linears(model))[:2]
    shape = model.get_submodule(good).weight.shape
    weights = {good: torch.ones(shape), bad: torch.ones(2, 3)}
    with pytest.raises(ValueError, match=f"{bad}.weight has shape"):
        walk.put_weights(model, weights)
    weights[bad] = torch.full_like(model.get_submodule(bad).weight, torch.inf)
    with pytest.raises(ValueError, match="would not be finite"):
        walk.put_weights(model, weights)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    walk.put_weights(model, {good: torch.ones(shape)})
    assert (model.get_submodule(good).weight == 1).all()
