"""Scales at the ends of their float type, weights that no scale fits, and models that
hold more than plain linears.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlab.compression import quantization_basics as qb
from llmlab.compression.quantization_basics import QuantConfig
from tests.models.hugging_face import make

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
configs = st.builds(
    QuantConfig,
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    per=st.sampled_from(qb.BLOCKS),
    group_size=st.sampled_from([2, 12]),
    scale_dtype=st.sampled_from(FLOATS),
)


def weights(seed, size, dtype, shift=0.0):
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 12, generator=dice) + shift
    kind = torch.finfo(dtype)
    x = (x.double() * size).clamp(kind.min, kind.max).to(dtype)
    x[1] = 0
    return x


def relative(back, x):
    back, x = back.double(), x.double()
    return ((back - x).norm() / x.norm()).item()


@settings(max_examples=300, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 99),
    power=st.integers(-36, 38),
    dtype=st.sampled_from(FLOATS),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)
def test_what_holds_at_every_size(config, seed, power, dtype, shift):
    x = weights(seed, 10.0**power, dtype, shift)
    codes, s, z = qb.encode(x, config)
    stored = s.to(config.scale_dtype)
    assert (stored > 0).all() and stored.isfinite().all()
    assert torch.equal(stored.float(), s), "what is computed with is what is stored"
    back = qb.decode(codes, s, z, config)
    assert back.isfinite().all() and (back[1] == 0).all()
    assert qb.fake_quantize(x, config).isfinite().all()

    real = x.double()
    error = (back.double() - real).abs()
    if config.symmetric:  # 0 would never have been nearer
        assert (error <= real.abs() * (1 + 1e-6)).all()
    step = s.double().expand_as(qb.to_blocks(x, config)).reshape(x.shape)
    largest = torch.finfo(config.scale_dtype).max
    # a scale of 8 (bf16) or 11 bits moves the last level a part of a step
    slack = 0.5 + 2**config.bits * torch.finfo(config.scale_dtype).eps
    slack += 0 if config.symmetric else 0.5
    assert ((error <= step * slack) | (step == largest)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("per", qb.BLOCKS)
def test_a_large_value_stays_large_and_a_small_one_does_not_vanish(
    per, scale_dtype, symmetric
):
    many = QuantConfig(8, symmetric, per, 12, scale_dtype=scale_dtype)
    few = QuantConfig(4, symmetric, per, 12, scale_dtype=scale_dtype)
    x = weights(0, 6e5, torch.float32).clamp(-6e5, 6e5)
    for config, worst in ((few, 0.4), (many, 0.02)):
        codes, s, z = qb.encode(x, config)
        back = qb.decode(codes, s, z, config)
        assert relative(back, x) < worst
    x = weights(0, 1e-6, torch.float32)
    assert relative(qb.fake_quantize(x, many), x) < 0.05


def test_the_ends_of_float16_by_hand():
    config = QuantConfig(4, per="row")
    codes, s, _ = qb.encode(torch.tensor([[6e5, -7e4, 0.0]]), config)
    # 6e5 / 7 = 85,714 is more than float16 holds
    assert s.item() == 65504 and codes.tolist() == [[7.0, -1.0, 0.0]]
    config = QuantConfig(8, per="row")
    codes, s, _ = qb.encode(torch.tensor([[1e-6, -3e-8, 0.0]]), config)
    # 1e-6 / 127 = 7.9e-9 is less than its smallest, 2⁻²⁴ = 6.0e-8
    assert s.item() == 2**-24 and codes.tolist() == [[17.0, -1.0, 0.0]]
    # between two subnormal numbers the scale is rounded up: nothing is clipped
    x = torch.tensor([[127 * 1.4 * 2**-24, 0.0]])
    codes, s, _ = qb.encode(x, config)
    assert s.item() == 2 * 2**-24 and codes[0, 0] == 89


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_last_level_above_the_largest_number_is_that_number(dtype):
    largest = torch.finfo(dtype).max
    linear = nn.Linear(4, 2, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight.fill_(largest)
    for bits in (2, 3, 4, 8):
        config = QuantConfig(bits, per="row", scale_dtype=dtype)
        model = nn.Sequential(copy.deepcopy(linear))
        qb.round_weights(model, config)
        assert model[0].weight.isfinite().all()
        packed = qb.apply(nn.Sequential(copy.deepcopy(linear)), config)
        one = torch.eye(4, dtype=dtype)
        assert torch.equal(packed(one).T, model[0].weight)
        assert qb.fake_quantize(linear.weight, config).isfinite().all()


@pytest.mark.parametrize("calibration", qb.RANGES)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_every_calibration_takes_every_size(size, calibration):
    x = weights(1, size, torch.float32)
    config = QuantConfig(
        8,
        per="row",
        calibration=calibration,
        percentile=90.0,
        scale_dtype=torch.float32,
    )
    assert relative(qb.fake_quantize(x, config), x) < 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("function", [qb.apply, qb.round_weights])
def test_weights_that_are_not_finite_are_named_and_nothing_changes(function, bad):
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    before = copy.deepcopy(model.state_dict())
    says = r"layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN or infinite"
    with pytest.raises(ValueError, match=says):
        function(model, QuantConfig(group_size=8))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    with pytest.raises(ValueError, match="x holds 1 values"):
        qb.fake_quantize(torch.tensor([[1.0, bad]]), QuantConfig(per="row"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "float16"])
def test_a_scale_is_a_float_of_16_or_32_bits(dtype):
    with pytest.raises(ValueError, match=f"scale_dtype={dtype}"):
        QuantConfig(scale_dtype=dtype)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        kind = nn.TransformerEncoderLayer
        self.layer = kind(12, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def test_weights_that_a_module_reads_are_quantised_in_evaluation_too():
    model = Attends()
    x = weights(3, 1.0, torch.float32)[None]
    plain = model(x)
    config = QuantConfig(4, per="row")
    packed = qb.apply(copy.deepcopy(model), config)
    rounded = qb.round_weights(copy.deepcopy(model), config)
    out = rounded(x)
    assert (out - plain).abs().max() > 0.01
    with torch.no_grad():  # where PyTorch reads `linear1.weight` and calls nothing
        for other in (packed, rounded):
            assert torch.allclose(other.train()(x), out, atol=1e-5)
            assert torch.allclose(other.eval()(x), out, atol=1e-5)


def test_inputs_of_what_is_never_called_are_refused():
    model = Attends()
    config = QuantConfig(3, per="row")
    says = r"layer\.self_attn\.out_proj is in an nn\.MultiheadAttention"
    with pytest.raises(ValueError, match=says):
        qb.quantize_inputs(model, config)
    assert not model.layer.linear1._forward_pre_hooks
    x = weights(3, 1.0, torch.float32)[None]
    hooks = qb.quantize_inputs(model, config, skip=("out_proj",))
    out = model(x)
    with torch.no_grad():  # hooks switch PyTorch's fast path off
        assert torch.allclose(model.eval()(x), out, atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert (model(x) - out).abs().max() > 0.01
