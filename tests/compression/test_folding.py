"""Folded scales change no output; what cannot be folded is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmlab.compression import calibration, folding
from tests.models.hugging_face import make, theirs

TOKENS = torch.arange(2 * 9).reshape(2, 9) % 17


def scale_for(block, seam, seed=0):
    random = torch.Generator().manual_seed(seed)
    channels = len(block.get_submodule(seam.before).weight)
    return torch.rand(channels, generator=random) * 3 + 0.2


def logits(model):
    out = model(TOKENS)
    return getattr(out, "logits", out).detach()


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},  # without GQA: v → o is a seam, too
        {"num_key_value_heads": 2},
        {"head_dim": 12},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
    ],
)
def test_a_folded_model_computes_the_same(settings, library):
    model = make(**settings)
    if library:
        model = theirs(model)
    before = logits(model)
    for block in calibration.blocks(model).values():
        for seam in folding.seams(block):
            folding.fold(block, seam, scale_for(block, seam))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_under_gqa_no_scale_goes_from_v_to_o():
    block = next(iter(calibration.blocks(make(num_key_value_heads=2)).values()))
    assert "self_attn.v_proj" not in {seam.before for seam in folding.seams(block)}
    block = next(iter(calibration.blocks(make()).values()))
    assert "self_attn.v_proj" in {seam.before for seam in folding.seams(block)}


def test_columns_grow_and_the_norm_shrinks():
    block = next(iter(calibration.blocks(make()).values()))
    seam = folding.seams(block)[0]
    s = scale_for(block, seam)
    norm = block.get_submodule(seam.before).weight.clone()
    q = block.get_submodule(seam.after[0]).weight.clone()
    folding.fold(block, seam, s)
    torch.testing.assert_close(block.get_submodule(seam.before).weight, norm / s)
    torch.testing.assert_close(block.get_submodule(seam.after[0]).weight, q * s)


def test_bad_scales_are_refused_and_nothing_is_changed():
    block = next(iter(calibration.blocks(make()).values()))
    before = {name: t.clone() for name, t in block.state_dict().items()}
    seam = folding.seams(block)[0]
    s = scale_for(block, seam)
    for bad, words in (
        (s[:-1], "has shape"),
        (s * 0, "positive and finite"),
        (s * torch.inf, "positive and finite"),
    ):
        with pytest.raises(ValueError, match=words):
            folding.fold(block, seam, bad)
    for name, t in block.state_dict().items():
        assert torch.equal(t, before[name])
    with pytest.raises(ValueError, match="has no input_layernorm"):
        folding.seams(nn.Sequential(nn.Linear(3, 3)))


def test_the_largest_of_each_column_is_over_all_readers():
    linears = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)}
    both = torch.cat([linear.weight for linear in linears.values()]).abs().amax(0)
    assert torch.equal(folding.largest_columns(linears, ("a", "b")), both)
    alone = linears["a"].weight.abs().amax(0)
    assert torch.equal(folding.largest_columns(linears, ("a",)), alone)
