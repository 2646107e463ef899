"""Calibration: sums against the inputs themselves, on our model and transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmlab.compression import calibration
from llmlab.compression import quantization_basics as qb
from tests.models.hugging_face import make, theirs


def ids(rows=2, length=9, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(61, (rows, length), generator=random)


BATCHES = [ids(), ids(1, 5, 1)]


def seen_by_hand(model, name):
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: rows.append(args[0].detach().flatten(0, 1))
    )
    for batch in BATCHES:
        model(batch)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("library", [False, True])
def test_sums_are_those_of_the_inputs(library):
    model = make(num_key_value_heads=2)
    model = theirs(model) if library else model
    linears = qb.linears(model)
    found = calibration.inputs(model, linears, BATCHES)
    assert list(found) == list(linears)
    for name in (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ):
        X = seen_by_hand(model, name)
        s = found[name]
        assert s.tokens == len(X) == 23
        torch.testing.assert_close(s.gram, X.T @ X)
        torch.testing.assert_close(s.absmax, X.abs().amax(0))
        torch.testing.assert_close(s.absmean, X.abs().mean(0))
        torch.testing.assert_close(s.norm, X.norm(dim=0))
        torch.testing.assert_close(
            s.high - s.low, X.amax(0).relu() + (-X).amax(0).relu()
        )


def test_no_gram_unless_asked_for():
    model = make()
    found = calibration.inputs(model, qb.linears(model), BATCHES, gram=False)
    assert all(s.gram is None for s in found.values())


def test_the_sums_have_the_dtype_asked_for():
    model = make().to(torch.bfloat16)
    found = calibration.inputs(model, qb.linears(model), BATCHES, dtype=torch.float64)
    assert all(s.gram.dtype == s.low.dtype == torch.float64 for s in found.values())


def test_from_block_to_block_is_the_whole_model():
    for model in (make(), theirs(make())):
        calls = calibration.first_calls(model, [ids()])
        for block in calibration.blocks(model).values():
            calls = calibration.next_calls(block, calls)
        (hidden, *_), _ = calls[0]
        expected = model(ids())
        logits = model.lm_head(model.model.norm(hidden))
        torch.testing.assert_close(logits, getattr(expected, "logits", expected))


def test_a_block_can_be_run_twice():
    """No cache grows from run to run."""
    model = theirs(make())
    calls = calibration.first_calls(model, [ids()])
    block = next(iter(calibration.blocks(model).values()))
    first, _ = calibration.next_calls(block, calls)[0]
    again, _ = calibration.next_calls(block, calls)[0]
    torch.testing.assert_close(first[0], again[0], rtol=0, atol=0)


def test_the_model_is_left_as_it_was():
    model = make().train()
    model.model.layers[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    calibration.inputs(model, qb.linears(model), BATCHES)
    calibration.first_calls(model, BATCHES)
    with pytest.raises(IndexError):
        calibration.inputs(model, qb.linears(model), [torch.tensor([[1, 99]])])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_named():
    model = make()
    linears = qb.linears(model)
    with pytest.raises(ValueError, match="batches is empty"):
        calibration.inputs(model, linears, [])
    with pytest.raises(ValueError, match="rows of token ids"):
        calibration.inputs(model, linears, [torch.tensor([1, 2])])
    with pytest.raises(ValueError, match="other was given no input"):
        calibration.inputs(model, linears | {"other": nn.Linear(3, 3)}, BATCHES)
    model.model.embed_tokens.weight.data[:, 0] = torch.nan
    with pytest.raises(ValueError, match=r"input of model\.layers\.0\.self_attn\.q"):
        calibration.inputs(model, linears, BATCHES)
    with pytest.raises(ValueError, match="no list of layers"):
        calibration.blocks(nn.Linear(2, 2))


def test_sequences_are_runs_of_the_text():
    tokens = torch.arange(100)
    found = calibration.sample(tokens, length=7, count=40, seed=3)
    assert all((s - s[0, 0] == torch.arange(7)).all() for s in found)
    assert {tuple(s.shape) for s in found} == {(1, 7)}
    again = calibration.sample(tokens, length=7, count=40, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    whole = calibration.sample(tokens, length=100, count=1)
    assert torch.equal(whole[0][0], tokens)
    for bad, message in (
        ({"length": 101, "count": 1}, "too few for a sequence of length=101"),
        ({"length": 5, "count": 0}, "count=0"),
        ({"length": 0, "count": 1}, "length=0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.sample(tokens, **bad)
    with pytest.raises(ValueError, match="one row"):
        calibration.sample(tokens[None], 5, 1)
