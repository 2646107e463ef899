"""Four bits at the ends of the float types, and weights that no scale fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.peft import qlora, walk
from llmlab.peft.qlora import nf4
from tests.peft.conftest import make_llama

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(tuple(nf4.CODEBOOKS)),
    double=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    power=st.integers(-36, 38),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_what_is_finite_stays_finite_and_near(kind, double, dtype, power, spread, seed):
    dice = torch.Generator().manual_seed(seed)
    size = 10.0 ** (power + spread * torch.randn(9, 1, generator=dice).double())
    largest = torch.finfo(dtype).max / 2**12  # their mean must be finite, too
    w = torch.randn(9, 66, generator=dice).double() * size
    w = w.clamp(-largest, largest).to(dtype)
    w[1] = 0
    back = nf4.dequantize(nf4.quantize(w, kind, 64, double))
    assert back.dtype == dtype and back.isfinite().all()
    if not double and dtype == torch.float32:
        # NF4's widest gap lies between −1 and −0.70, FP4's between ½ and ⅓, or 0
        c = w.double().abs().max()
        assert ((back.double() - w.double()).abs() <= 0.17 * c).all()


@pytest.mark.parametrize("kind", nf4.CODEBOOKS)
@pytest.mark.parametrize("double", [True, False])
def test_the_largest_of_float16_does_not_become_infinite(kind, double):
    w = torch.full((64, 64), 65504.0, dtype=torch.float16)
    w[:24] *= 0.45
    w[24] = 0  # the scale that is farthest from the mean
    q = nf4.quantize(w, kind, 64, double)
    if double:  # in 8 bits, the largest scales are above it
        assert nf4.scales_of(q).max() > 65520
    assert nf4.dequantize(q).isfinite().all()
    assert nf4.dequantize(q).max() == 65504


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_and_nothing_changes(bad):
    with pytest.raises(ValueError, match="w holds 1 values that are NaN or infinite"):
        nf4.quantize(torch.tensor([1.0, bad]))
    for function in (qlora.quantize, qlora.apply):
        model = make_llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
        before = set(model.state_dict())
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1"
        ):
            function(model, qlora.QLoRAConfig())
        assert set(model.state_dict()) == before
        assert not walk.installed(model, walk.Wrapper)
        assert not list(qlora.qlora.installed(model))


def test_scales_whose_mean_is_infinite_are_refused():
    w = torch.full((128,), 3e38)
    assert nf4.dequantize(nf4.quantize(w, double=False)).isfinite().all()
    with pytest.raises(ValueError, match="the second scale of w holds"):
        nf4.quantize(w)
