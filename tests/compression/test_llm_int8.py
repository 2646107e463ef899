"""LLM.int8(): against the sum written out, against bitsandbytes, and on models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlab.compression import llm_int8, walk
from llmlab.compression.llm_int8 import Int8Config, Int8Linear
from tests.libraries import seen_in
from tests.models.hugging_face import VARIANTS, make, theirs

IDS = torch.arange(30).reshape(2, 15)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens=6, features=20, seed=0):
    """Inputs with two outlier columns, one of them in a single token."""
    x = normal(tokens, features, seed=seed).clamp(-3, 3)
    x[:, 4] += 9
    x[2, 11] = -40
    return x


def written_out(x, weight, alpha):
    """Equation 8 in double precision, one number after the other."""
    x, weight = x.double(), weight.double()
    out = [bool((x[:, h].abs() >= alpha).any()) for h in range(x.shape[1])]
    y = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for t in range(len(x)):
        a_x = max([abs(float(x[t, h])) for h in range(x.shape[1]) if not out[h]] + [0])
        for o in range(len(weight)):
            a_w = float(weight[o].abs().max())
            for h in range(x.shape[1]):
                code_w = round(float(weight[o, h]) / a_w * 127) if a_w else 0
                if out[h]:
                    y[t, o] += x[t, h] * code_w * a_w / 127
                else:
                    code_x = round(float(x[t, h]) / a_x * 127) if a_x else 0
                    y[t, o] += code_x * code_w * a_x * a_w / 127**2
    return y.float()


def product(x, weight, alpha):
    return llm_int8.int8_matmul(x, *llm_int8.quantize_rows(weight), Int8Config(alpha))


def outliers(x, alpha):
    return llm_int8.outlier_columns(x, Int8Config(alpha))


# Mathematics --------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [6.0, 2.0, 100.0])
@pytest.mark.parametrize("shape", [(6, 20, 5), (1, 13, 3), (3, 17, 9)])
def test_equation_8_written_out(shape, alpha):
    tokens, features, out = shape
    x = with_outliers(max(tokens, 3), features)[:tokens]
    weight = normal(out, features, seed=1) * torch.logspace(-3, 1, out)[:, None]
    weight[1] = 0
    torch.testing.assert_close(
        product(x, weight, alpha), written_out(x, weight, alpha), rtol=1e-5, atol=1e-5
    )


def test_the_lessons_example_by_hand():
    x = torch.tensor([[0.5, 12.0, -1.0], [2.0, 7.0, 1.0]])
    weight = torch.tensor([[1.0, -1.0, 0.25]])
    assert outliers(x, 6.0).tolist() == [False, True, False]
    codes, absmax = llm_int8.quantize_rows(x[:, [0, 2]])
    assert codes.tolist() == [[64, -127], [127, 64]] and absmax.tolist() == [1, 2]
    codes, absmax = llm_int8.quantize_rows(weight)
    assert codes.tolist() == [[127, -127, 32]] and absmax.tolist() == [1]
    sums = torch.tensor([64 * 127 - 127 * 32, 127 * 127 + 64 * 32]).float()
    right = sums * torch.tensor([1.0, 2.0]) / 127**2 - torch.tensor([12.0, 7.0])
    torch.testing.assert_close(product(x, weight, 6.0)[:, 0], right)
    plain = torch.tensor([-15846 * 12, -10981 * 7]) / 127**2
    torch.testing.assert_close(product(x, weight, None)[:, 0], plain)


def test_numbers_that_are_codes_already_are_multiplied_exactly():
    x = torch.randint(-127, 128, (5, 300), generator=torch.Generator().manual_seed(0))
    weight = torch.randint(-127, 128, (7, 300))
    x[:, 0] = 127
    weight[:, 0] = -127
    got = product(x.float(), weight.float(), None)
    torch.testing.assert_close(got, (x @ weight.T).float())


def test_the_limits_of_the_threshold():
    x = with_outliers()
    weight = normal(5, 20, seed=1)
    codes, absmax = llm_int8.quantize_rows(weight)
    decoded = llm_int8.dequantize_rows(codes, absmax)
    # all columns out: only the weight is rounded
    everything = llm_int8.int8_matmul(x, codes, absmax, Int8Config(1e-9))
    torch.testing.assert_close(everything, x @ decoded.T)
    # none out: both are rounded, each row by its own scale
    rows = llm_int8.dequantize_rows(*llm_int8.quantize_rows(x))
    for alpha in (None, 1e9):
        nothing = llm_int8.int8_matmul(x, codes, absmax, Int8Config(alpha))
        torch.testing.assert_close(nothing, rows @ decoded.T, rtol=1e-5, atol=1e-5)


def test_rows_of_the_smallest_and_of_the_largest_numbers():
    x = torch.tensor([[1e-44, 0.0], [2e-36, -1.1e-36], [3e38, -3e38], [0.0, 0.0]])
    codes, absmax = llm_int8.quantize_rows(x)
    assert codes.tolist() == [[0, 0], [127, -70], [127, -127], [0, 0]]
    assert torch.equal(absmax, x.abs().amax(1))
    assert llm_int8.dequantize_rows(codes, absmax).isfinite().all()


def test_ties_go_to_even_and_minus_128_is_not_used():
    codes, _ = llm_int8.quantize_rows(torch.tensor([[127, 63.5, 0.5, -0.5, 1.5, -127]]))
    assert codes.tolist() == [[127, 64, 0, 0, 2, -127]]


def test_one_scale_for_all_tokens_and_a_number_of_columns():
    x = with_outliers()
    weight = normal(5, 20, seed=1)
    codes, absmax = llm_int8.quantize_rows(weight)
    decoded = llm_int8.dequantize_rows(codes, absmax)
    for columns, left in ((0, []), (1, [11]), (2, [4, 11])):
        config = Int8Config(None, columns, "tensor")
        out = llm_int8.outlier_columns(x, config)
        assert torch.nonzero(out).flatten().tolist() == left
        step = x.masked_fill(out, 0).abs().max() / 127
        rounded = torch.where(out, x, torch.round(x / step) * step)
        got = llm_int8.int8_matmul(x, codes, absmax, config)
        torch.testing.assert_close(got, rounded @ decoded.T, rtol=1e-5, atol=1e-5)
    # a threshold and a number: both
    both = llm_int8.outlier_columns(x, Int8Config(20.0, 2))
    assert torch.nonzero(both).flatten().tolist() == [4, 11]
    assert llm_int8.outlier_columns(x, Int8Config(None, 99)).all()


def test_an_outlier_is_at_least_the_threshold_in_one_token():
    x = torch.tensor([[6.0, -6.0, 5.99, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert outliers(x, 6.0).tolist() == [True, True, False, False]


def test_a_decomposition_removes_the_outliers_from_every_scale():
    """5.9 in an outlier column does not set the scale of its row."""
    x = torch.tensor([[60.0, 0.01], [5.9, 0.01]])
    weight = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(product(x, weight, 6.0), torch.full((2, 1), 0.01))
    assert (product(x, weight, None) == 0).all()


def test_what_a_token_gets_depends_on_its_company():
    """O belongs to the batch: another token's outlier takes a column out of mine."""
    x = with_outliers()
    weight = normal(5, 20, seed=1)
    alone = product(x[:1], weight, 6.0)
    assert not torch.equal(product(x, weight, 6.0)[:1], alone)
    assert torch.equal(product(x, weight, None)[:1], product(x[:1], weight, None))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 6),
    alpha=st.sampled_from([None, 0.5, 2.0, 6.0]),
    size=st.sampled_from([1e-30, 1e-4, 1.0, 1e4, 1e30]),
)
def test_what_holds_for_every_product(seed, tokens, alpha, size):
    x = normal(tokens, 12, seed=seed)
    x[:, 3] *= 20
    x[0] = 0
    weight = normal(5, 12, seed=seed + 1) * size
    weight[2] = 0
    before = x.clone()
    codes, absmax = llm_int8.quantize_rows(weight)
    assert codes.dtype == torch.int8 and codes.min() >= -127
    assert (codes.abs().amax(1)[absmax > 0] == 127).all()
    y = llm_int8.int8_matmul(x, codes, absmax, Int8Config(alpha))
    assert torch.equal(x, before), "the input is not changed"
    assert y.isfinite().all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()
    # no error is larger than half a step of x, times the weights that it meets
    decoded = llm_int8.dequantize_rows(codes, absmax)
    kept = x.masked_fill(outliers(x, alpha), 0)
    half_step = kept.abs().amax(1, keepdim=True) / 254
    bound = half_step * decoded.abs().sum(1) + 1e-5 * x.abs() @ decoded.abs().T
    assert ((y - x @ decoded.T).abs() <= bound).all()
    # the order of the columns is of no account
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = llm_int8.int8_matmul(
        x[:, order], codes[:, order], absmax, Int8Config(alpha)
    )
    torch.testing.assert_close(shuffled, y, rtol=1e-5, atol=1e-5 * size)


def test_gradients_are_those_of_the_decoded_weight():
    linear = nn.Linear(20, 5)
    layer = Int8Linear(linear, Int8Config())
    x = with_outliers().reshape(2, 3, 20).requires_grad_()
    upstream = normal(2, 3, 5, seed=2)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(linear.bias.grad, upstream.sum((0, 1)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


# bitsandbytes -------------------------------------------------------------------------


def in_bitsandbytes(linear, threshold, training=False):
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").train(training)


def half_linear(inputs=40, out=24, bias=True):
    """A linear whose weights fit float16, to which bitsandbytes casts them."""
    torch.manual_seed(1)
    linear = nn.Linear(inputs, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.half())
    return linear


def half_input(tokens=5):
    """Inputs that fit float16. Where a column is an outlier it is one in each token,
    so that both ways of taking a row's scale agree.
    """
    x = normal(tokens, 40, seed=3).clamp(-3, 3)
    x[:, 7] = 9 + normal(tokens, seed=4).abs()
    x[:, 30] *= 0
    x[:, 30] -= 41
    return x.half().float()


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 5)])
def test_bitsandbytes_forward_and_backward(shape, bias, alpha):
    linear = half_linear(bias=bias)
    x = half_input(int(torch.tensor(shape).prod())).reshape(*shape, 40)
    ours = Int8Linear(copy.deepcopy(linear), Int8Config(alpha))
    other = in_bitsandbytes(linear, alpha or 0.0)
    results = []
    for layer in (ours, other):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(normal(*y.shape, seed=5))
        results.append((y.detach(), inputs.grad))
    assert torch.equal(ours.codes, other.state.CB)
    assert torch.equal(ours.absmax, other.state.SCB)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def test_bitsandbytes_finds_the_same_columns_and_codes():
    import bitsandbytes.functional as bnb

    x = half_input(6)
    codes, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    out = outliers(x, 6.0)
    assert torch.nonzero(out).flatten().tolist() == columns.tolist() == [7, 30]
    ours = llm_int8.quantize_rows(x.masked_fill(out, 0))
    assert torch.equal(ours[0], codes) and torch.equal(ours[1], absmax)


@seen_in("bitsandbytes", "0.50.2")
def test_bitsandbytes_lets_an_outlier_column_set_the_scale_of_other_rows():
    import bitsandbytes.functional as bnb

    x = torch.tensor([[8, -3, 1, 0.5], [2, -3, 1, 0.5], [4, -3, 1, 0.5]])
    _, absmax, _ = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert absmax.tolist() == [3, 3, 4]
    ours = llm_int8.quantize_rows(x.masked_fill(outliers(x, 6.0), 0))
    assert ours[1].tolist() == [3, 3, 3]


@seen_in("bitsandbytes", "0.50.2")
def test_bitsandbytes_multiplies_floats_in_training_mode():
    linear = half_linear()
    x = half_input()
    weight_only = nn.functional.linear(
        x, Int8Linear(linear, Int8Config()).weight, linear.bias
    )
    for threshold in (0.0, 6.0):
        training = in_bitsandbytes(linear, threshold, training=True)
        torch.testing.assert_close(training(x), weight_only, rtol=1e-5, atol=1e-5)
        gap = (in_bitsandbytes(linear, threshold)(x) - weight_only).abs().max()
        assert gap > 5e-3
    ours = Int8Linear(linear, Int8Config())
    assert torch.equal(ours.train()(x), ours.eval()(x))


@seen_in("bitsandbytes", "0.50.2")
def test_bitsandbytes_overflows_float16_without_a_threshold():
    linear = half_linear()
    x = half_input()
    x[0, 0] = 7e4
    assert in_bitsandbytes(linear, 0.0)(x)[0].isnan().all()
    assert in_bitsandbytes(linear, 6.0)(x).isfinite().all()
    for alpha in (None, 6.0):
        y = Int8Linear(linear, Int8Config(alpha))(x)
        assert ((y - linear(x)).abs() < 0.01 * 7e4).all()


@seen_in("bitsandbytes", "0.50.2")
def test_defaults_of_the_libraries():
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig

    state = Linear8bitLt(4, 4).state
    assert state.threshold == 0.0 and state.has_fp16_weights
    assert BitsAndBytesConfig(load_in_8bit=True).llm_int8_threshold == 6.0


# Models -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases", "head_dim", "odd"])
def test_our_model_and_transformers_compute_the_same(variant):
    odd = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 2}
    ours = make(**(odd if variant == "odd" else VARIANTS[variant]))
    others = theirs(ours)
    plain = ours(IDS)
    head = ours.lm_head.weight
    with torch.no_grad():
        for model in (ours, others):
            llm_int8.apply(model, Int8Config(2.0))
        got = ours(IDS)
        # float32 sums in another order can round a code up or down
        assert (got - others(IDS).logits).abs().max() < 0.05 * plain.abs().max()
        assert (got - plain).abs().max() < 0.2 * plain.abs().max()
    assert sum(isinstance(m, Int8Linear) for m in ours.modules()) == 14
    assert ours.lm_head.weight is head
    if variant == "tied":
        assert ours.model.embed_tokens.weight is head


def test_our_model_is_that_of_its_decoded_weights_when_all_columns_are_out():
    model = make(num_key_value_heads=2, attention_bias=True)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for linear in walk.linears(rounded).values():
            pair = llm_int8.quantize_rows(linear.weight)
            linear.weight.copy_(llm_int8.dequantize_rows(*pair))
        llm_int8.apply(model, Int8Config(1e-6))
        torch.testing.assert_close(model(IDS), rounded(IDS), rtol=1e-4, atol=1e-4)


def test_one_byte_for_each_weight_and_four_for_each_row():
    linear = nn.Linear(33, 7)
    layer = Int8Linear(linear, Int8Config())
    assert layer.codes.nbytes + layer.absmax.nbytes == 33 * 7 + 4 * 7
    assert "threshold=6.0" in repr(layer)


def test_half_precision_comes_back_as_it_was():
    model = make().bfloat16()
    llm_int8.apply(model)
    with torch.no_grad():
        assert model(IDS).dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.absmax.dtype == torch.float32


def test_no_tokens_give_no_rows():
    layer = Int8Linear(nn.Linear(6, 4), Int8Config())
    assert layer(torch.zeros(2, 0, 6)).shape == (2, 0, 4)


def test_the_threshold_of_a_model_can_be_changed():
    model = llm_int8.apply(make(), Int8Config(1.0))
    with torch.no_grad():
        few = model(IDS)
        llm_int8.configure(model, Int8Config(None))
        fresh = llm_int8.apply(make(), Int8Config(None))
        assert torch.equal(model(IDS), fresh(IDS)) and not torch.equal(model(IDS), few)


def test_mode_and_bias_are_those_of_the_linear():
    model = make(attention_bias=True).eval()
    bias = model.model.layers[0].self_attn.q_proj.bias
    llm_int8.apply(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.bias is bias and not layer.training


# Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.0, -6.0, float("nan")])
def test_a_threshold_is_above_zero(alpha):
    with pytest.raises(ValueError, match=f"threshold={alpha}"):
        Int8Config(alpha)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"columns": -1}, "columns=-1"),
        ({"columns": 0.1}, "columns=0.1"),
        ({"scales": "row"}, "scales='row'"),
    ],
)
def test_wrong_settings_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        Int8Config(**changes)


def broken(change):
    model = make()
    with torch.no_grad():
        change(model.model.layers[1].mlp.up_proj.weight)
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w[3, 2].fill_(torch.nan), "holds 1 values that are NaN or infinite"),
        (lambda w: w[0, :2].fill_(-torch.inf), "holds 2 values"),
        (lambda w: w.zero_(), "is all zeros"),
    ],
)
def test_weights_that_cannot_be_quantised_are_named_and_nothing_changes(change, says):
    model = broken(change)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj\.weight {says}"):
        llm_int8.apply(model)
    assert dict(model.named_modules()) == before


def test_what_is_quantised_or_adapted_already_is_refused():
    from llmlab.compression import quantization_basics
    from llmlab.peft import lora

    model = llm_int8.apply(make())
    words = r"layers\.0\.self_attn\.q_proj is compressed already"
    with pytest.raises(ValueError, match=words):
        llm_int8.apply(model)
    adapted = lora.apply(make(), lora.LoRAConfig(r=2))
    before = dict(adapted.named_modules())
    with pytest.raises(ValueError, match=r"q_proj carries an adapter"):
        llm_int8.apply(adapted)
    assert dict(adapted.named_modules()) == before
    packed = quantization_basics.apply(
        make(), quantization_basics.QuantConfig(per="row")
    )
    with pytest.raises(ValueError, match="is compressed already"):
        llm_int8.apply(packed)


def test_a_model_of_bitsandbytes_is_refused():
    model = nn.Sequential(in_bitsandbytes(half_linear(), 6.0))
    with pytest.raises(ValueError, match=r"0\.weight is in torch\.int8"):
        llm_int8.apply(model)


def test_a_linear_that_is_read_and_never_called_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj is in an nn\.Multihead"):
        llm_int8.apply(model)
    assert type(model.linear1) is nn.Linear
    llm_int8.apply(model, skip=("out_proj",))
    assert isinstance(model.linear1, Int8Linear)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0\.weight is on the device 'meta'"):
        llm_int8.apply(model)


# Outlier features ---------------------------------------------------------------------


def test_outlier_features_are_counted_as_the_paper_does():
    hidden = [torch.zeros(50, 5) for _ in range(8)]
    for layer in (0, 3):  # a quarter of the layers
        hidden[layer][:, 1] = -7
    for layer in range(8):  # all layers, one token of 50: 2%
        hidden[layer][0, 2] = 9
    hidden[5][:, 3] = 100  # one layer
    for layer in (1, 2, 4):
        hidden[layer][::2, 4] = 6
        hidden[layer][1, 4] = -6
    found = llm_int8.outlier_features(hidden)
    assert [f.dimension for f in found] == [1, 4]
    assert found[0].layers == 0.25 and found[0].tokens == 0.25 and found[0].one_sided
    assert found[1].layers == 0.375 and not found[1].one_sided
    assert found[1].tokens == pytest.approx(3 * 26 / 400)
    assert llm_int8.outlier_features(hidden, threshold=9.5, min_layers=0.1)[0] == (
        llm_int8.OutlierFeature(3, 0.125, 0.125, True)
    )
    for bad in ([], [torch.zeros(2, 3), torch.zeros(2, 4)]):
        with pytest.raises(ValueError, match="hidden="):
            llm_int8.outlier_features(bad)


def test_inputs_are_collected_and_the_hooks_go():
    model = make()
    layers = walk.linears(model)
    with llm_int8.inputs_of(layers) as seen, torch.no_grad():
        model(IDS)
        model(IDS[:1])
    assert seen.keys() == layers.keys()
    assert seen["model.layers.1.mlp.down_proj"].shape == (45, 48)
    with pytest.raises(RuntimeError), llm_int8.inputs_of(layers):
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.real_model
@pytest.mark.slow
def test_one_dimension_of_the_real_model_is_an_outlier_feature():
    from llmlab.models import course_model, real_model

    real_model.fetch(quiet=True)
    model = real_model.load()
    text = course_model.corpus("addresses", "valid")[:2000]
    tokens = torch.tensor(real_model.load_tokenizer().encode(text).ids)[None, :256]
    names = [f"model.layers.{i}." for i in range(30)]
    layers = walk.linears(model)
    with llm_int8.inputs_of(layers) as seen, torch.inference_mode():
        model(tokens)
    hidden = []
    for name in names:
        parts = (seen[f"{name}self_attn.q_proj"], seen[f"{name}mlp.gate_proj"])
        hidden.append(torch.cat(parts))
    (feature,) = llm_int8.outlier_features(hidden)
    assert feature.dimension == 247 and 0.3 < feature.layers < 0.6
