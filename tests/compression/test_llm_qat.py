"""LLM-QAT: against closed forms, torch's fake-quant, the authors' code, transformers.

Models of tests are in float64 where two ways of computing the same meet a rounding to
codes: then no last bit decides on which side of a tie a value falls.
"""

from __future__ import annotations

import csv
import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llmlab.compression import llm_qat
from llmlab.compression import quantization_basics as qb
from llmlab.compression.llm_qat import (
    FakeQuantLinear,
    LowBitLinear,
    QATConfig,
    QuantizedCache,
    QuantizedKV,
)
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models.cache import KVCache
from llmlab.models.generation import generate
from llmlab.models.language_model import next_token_loss
from tests.compression.broken import not_finite, with_adapter
from tests.models.hugging_face import make, named, theirs

GOLDEN = Path(__file__).parent / "golden" / "llm_qat.json"


def numbers(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random)


def ids_of(rows=3, length=11, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(61, (rows, length), generator=random)


# Rounding -----------------------------------------------------------------------------


def test_by_hand():
    x = torch.tensor([[0.9, -0.3, 0.1, -1.4], [0.0, 0.0, 0.0, 0.0]])
    found = llm_qat.fake_quantize(x, 3)  # α = 1.4 / 3
    a = torch.tensor(1.4 / 3).half().item()
    torch.testing.assert_close(found[0], torch.tensor([2 * a, -a, 0, -3 * a]))
    assert not found[1].any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_nothing_is_clipped_and_no_error_exceeds_half_a_step(bits):
    x = numbers(7, 13)
    x[2] *= 300  # an outlier row keeps its own α
    x[3, 5] = 1e4
    step = llm_qat.step_size(x, bits)
    codes = llm_qat.codes_of(x, step, bits)
    top = 2 ** (bits - 1) - 1
    assert (codes.abs().amax(-1) == top).all()
    found = llm_qat.fake_quantize(x, bits)
    assert ((found - x).abs() <= step * (0.5 + top * 2**-11)).all()
    grid = QuantConfig(bits, per="row")
    assert torch.equal(found, qb.decode(*qb.encode(x, grid), grid))
    assert torch.equal(llm_qat.fake_quantize(found, bits), found)  # on its levels


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torch_fake_quantize_gives_the_same_values_and_gradients(bits):
    x = numbers(5, 12).requires_grad_()
    top = 2 ** (bits - 1) - 1
    scale = llm_qat.step_size(x, bits)[:, 0]
    away = (x.detach() / scale[:, None] % 1 - 0.5).abs()
    assert away.min() > 1e-5  # no tie: torch multiplies by 1 / scale
    zero = torch.zeros(5, dtype=torch.int32)
    library = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -top, top)
    ours = llm_qat.fake_quantize(x, bits)
    torch.testing.assert_close(ours, library, rtol=1e-6, atol=0)
    upstream = numbers(5, 12, seed=1)
    (expected,) = torch.autograd.grad(library, x, upstream)
    (found,) = torch.autograd.grad(ours, x, upstream)
    assert torch.equal(found, expected) and torch.equal(found, upstream)
    # with half the scale torch clips, and stops the gradient there
    clipped = torch.fake_quantize_per_channel_affine(x, scale / 2, zero, 0, -top, top)
    (stopped,) = torch.autograd.grad(clipped, x, upstream)
    assert (stopped == 0).any()


@pytest.mark.parametrize("dims", [(-1,), (1, 3), (3,)])
def test_the_dimensions_named_share_a_step(dims):
    x = numbers(2, 3, 5, 6)
    found = llm_qat.fake_quantize(x, 4, dims)
    for b in range(2):
        for t in range(5):
            if dims == (1, 3):  # a token of keys, all heads together
                row = x[b, :, t].reshape(1, -1)
                expected = llm_qat.fake_quantize(row, 4).reshape(3, 6)
            else:
                expected = llm_qat.fake_quantize(x[b, :, t], 4)
            assert torch.equal(found[b, :, t], expected)


def test_16_bits_are_floats_and_half_precision_stays_finite():
    x = numbers(4, 8)
    assert llm_qat.fake_quantize(x, 16) is x
    for dtype in (torch.bfloat16, torch.float16):
        found = llm_qat.fake_quantize((x * 30).to(dtype), 4)
        assert found.dtype == dtype and found.isfinite().all()
    tiny = torch.full((1, 4), 1e-9)
    assert llm_qat.fake_quantize(tiny, 4).isfinite().all()


def test_the_authors_code():
    """Their values differ by their 1e-6; their gradient stops at |x| ≥ 2."""
    golden = json.loads(GOLDEN.read_text())
    x = torch.tensor(golden["x"]).requires_grad_()
    for bits, values in golden["values"].items():
        found = llm_qat.fake_quantize(x, int(bits))
        assert (found - torch.tensor(values)).abs().max() < 2e-3
    stopped = torch.tensor(golden["gradient"]) == 0
    assert torch.equal(stopped, x.abs() >= 2) and stopped.any()
    (ours,) = torch.autograd.grad(found.sum(), x)
    assert (ours == 1).all()


def test_gradients_of_a_rounded_linear():
    config = QATConfig(3, 4)
    linear = torch.nn.Linear(6, 5)
    rounded = FakeQuantLinear(linear, config)
    x = numbers(2, 7, 6).requires_grad_()
    upstream = numbers(2, 7, 5, seed=1)
    W_hat = llm_qat.fake_quantize(linear.weight, 3).detach()
    x_hat = llm_qat.fake_quantize(x, 4).detach()
    out = rounded(x)
    torch.testing.assert_close(out, x_hat @ W_hat.T + linear.bias)
    found = torch.autograd.grad(out, [x, linear.weight, linear.bias], upstream)
    torch.testing.assert_close(found[0], upstream @ W_hat)
    torch.testing.assert_close(found[1], torch.einsum("bto,bti->oi", upstream, x_hat))
    torch.testing.assert_close(found[2], upstream.sum((0, 1)))
    stored = LowBitLinear.from_float(linear, config)
    assert torch.equal(stored(x), out)


# The cache ----------------------------------------------------------------------------

SHAPES = [(2, 3, 9, 5), (1, 1, 4, 8), (3, 2, 6, 7)]  # B, K, S, D: odd widths, too


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_codes_are_packed_and_come_back(bits):
    top = 2 ** (bits - 1) - 1
    codes = torch.arange(2 * 3 * 13).reshape(2, 3, 13) % (2 * top + 1) - top
    packed = llm_qat.pack_rows(codes.float(), bits)
    assert packed.shape == (2, 3, 2 * bits) and packed.dtype == torch.uint8
    assert torch.equal(llm_qat.unpack_rows(packed, bits, 13), codes.float())


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_prompt_at_once_is_its_tokens_one_by_one(bits, shape, per_head):
    B, K, S, D = shape
    k, v = numbers(*shape), 3 * numbers(*shape, seed=1)
    k[:, :, 2] = 0
    whole = QuantizedCache(2, bits, per_head)
    at_once = whole.append(1, k, v)
    dims = (3,) if per_head else (1, 3)
    for x, found in zip((k, v), at_once, strict=True):
        assert torch.equal(found, llm_qat.fake_quantize(x, bits, dims))
    steps = QuantizedCache(2, bits, per_head)
    for t in range(S):
        one = slice(t, t + 1)
        found = steps.append(1, k[:, :, one], v[:, :, one])
    for a, b in zip(at_once, found, strict=True):
        assert torch.equal(a, b)
    stored = whole.codes[1] + whole.steps[1]
    for a, b in zip(stored, steps.codes[1] + steps.steps[1], strict=True):
        assert torch.equal(a, b)
    assert whole.length == 0  # layer 0 has none yet
    whole.append(0, k, v)
    assert whole.length == S
    scales = K if per_head else 1
    token = math.ceil(K * D / 8) * bits + 2 * scales
    assert whole.nbytes == 2 * 2 * B * S * token


def test_what_is_stored_is_counted_for_a_model():
    model = make(num_key_value_heads=2)
    for bits, per_head in ((4, False), (3, True), (8, False)):
        cache = QuantizedCache(2, bits, per_head)
        model(ids_of(), cache=cache)
        counted = llm_qat.kv_bytes(model.config, 11, bits, batch=3, per_head=per_head)
        assert cache.nbytes == counted
    floats = KVCache(2)
    model(ids_of(), cache=floats)
    assert llm_qat.kv_bytes(model.config, 11, 16, batch=3) == floats.nbytes / 2


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"head_dim": 6}])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_sees_what_the_cache_gives_token_by_token(bits, changes):
    model = make(**changes).double()
    ids = ids_of(rows=2)
    with torch.no_grad():
        trained_on = llm_qat.logits(model, ids, bits)
        at_once = model(ids, cache=QuantizedCache(2, bits))
        cache = QuantizedCache(2, bits)
        one_by_one = [model(ids[:, t : t + 1], cache=cache) for t in range(11)]
    torch.testing.assert_close(at_once, trained_on)
    torch.testing.assert_close(torch.cat(one_by_one, 1), trained_on)
    assert not torch.allclose(trained_on, model(ids), atol=1e-4)


def test_gradients_pass_the_rounded_cache():
    """They are those of attention at the rounded keys and values."""
    q, k, v = numbers(1, 4, 5, 6), numbers(1, 2, 5, 6, seed=1), numbers(1, 2, 5, 6)
    k.requires_grad_()
    v.requires_grad_()
    out = QuantizedKV(3)(q, k, v, None)
    found = torch.autograd.grad(out.square().sum(), [k, v])
    rounded = [
        llm_qat.fake_quantize(x, 3, (1, 3)).detach().requires_grad_() for x in (k, v)
    ]
    plain = F.scaled_dot_product_attention(q, *rounded, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(plain.square().sum(), rounded)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}])
def test_transformers_rounds_keys_and_values_at_the_same_place(changes):
    model = make(**changes).double()
    library = theirs(model).double()
    ids = ids_of()
    ours = llm_qat.logits(model, ids, 3)
    torch.testing.assert_close(llm_qat.logits(library, ids, 3), ours)
    torch.testing.assert_close(llm_qat.logits(library, ids), model(ids))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_the_cache_of_transformers_needs_another_library(backend):
    """The lesson says so; where one is installed, there is nothing to say."""
    from importlib.util import find_spec

    from transformers import LlamaConfig as TheirConfig
    from transformers import QuantizedCache as TheirCache

    if find_spec({"quanto": "optimum"}.get(backend, backend)):
        pytest.skip(f"{backend} is installed")
    with pytest.raises(ImportError):
        TheirCache(backend, TheirConfig(num_hidden_layers=2))


def test_the_cache_forgets_and_generates():
    model = make(num_key_value_heads=2).double()
    ids = ids_of()
    cache = QuantizedCache(2, 4)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate(6)
        assert cache.length == 6
        again = model(ids[:, 6:], cache=cache)
        whole = model(ids, cache=QuantizedCache(2, 4))
    torch.testing.assert_close(again, whole[:, 6:])
    out = generate(model, ids, 5, cache=QuantizedCache(2, 8))
    assert out.shape == (3, 16)
    for length in (-1, 12):
        with pytest.raises(ValueError, match="must lie between 0 and the 11"):
            cache.truncate(length)


# Text of its own ----------------------------------------------------------------------


def test_the_hybrid_is_greedy_for_three_to_five_tokens_and_then_drawn():
    model = make().double()
    text = llm_qat.self_generate(model, 30, 40, seed=1)
    assert text.shape == (30, 40) and len(text[:, 0].unique()) == 30
    with torch.no_grad():
        likeliest = model(text).argmax(-1)[:, :-1]
    agrees = likeliest == text[:, 1:]
    for i in range(30):
        assert agrees[i, : 3 + i % 3].all()
    # the next ones are the likeliest only as often as they are likely
    assert not torch.stack([agrees[i, 3 + i % 3] for i in range(30)]).all()
    greedy = llm_qat.self_generate(model, 6, 12, "greedy")
    with torch.no_grad():
        assert torch.equal(model(greedy).argmax(-1)[:, :-1], greedy[:, 1:])
    sampled = llm_qat.self_generate(model, 30, 40, "sampled", seed=1)
    assert torch.equal(sampled[:, 0], text[:, 0])
    assert not (sampled[:, 1:4] == text[:, 1:4]).all()


def test_seeds_first_tokens_and_no_gradient():
    model = make()
    before = deepcopy(model.state_dict())
    once, again, other = (llm_qat.self_generate(model, 4, 9, seed=s) for s in (5, 5, 6))
    assert torch.equal(once, again) and not torch.equal(once, other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())
    few = llm_qat.self_generate(model, 8, 3, vocabulary=4)
    assert sorted(few[:, 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([1.0, -1.0, 0.5, -3.0]).expand(40_000, 4)
    greedy = torch.arange(40_000) % 2 == 0
    found = llm_qat.next_tokens(logits, greedy, torch.Generator().manual_seed(0))
    assert (found[greedy] == 0).all()
    p = logits[0].softmax(-1)
    share = torch.bincount(found[~greedy], minlength=4) / 20_000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_transformers_writes_the_same_text():
    model = make(num_key_value_heads=2).double()
    library = theirs(model).double()
    for kind in llm_qat.KINDS:
        ours = llm_qat.self_generate(model, 5, 12, kind, seed=3)
        assert torch.equal(llm_qat.self_generate(library, 5, 12, kind, seed=3), ours)


# The loss -----------------------------------------------------------------------------


def test_soft_labels_by_enumeration_and_by_the_library():
    student = numbers(2, 3, 5).requires_grad_()
    teacher = (2 * numbers(2, 3, 5, seed=1)).requires_grad_()
    loss = llm_qat.soft_label_loss(student, teacher)
    p, q = teacher.detach().softmax(-1), student.detach().softmax(-1)
    total = 0.0
    for b in range(2):
        for t in range(3):
            for c in range(5):
                total -= p[b, t, c].item() * math.log(q[b, t, c].item())
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    library = F.cross_entropy(student.flatten(0, 1), p.flatten(0, 1))
    torch.testing.assert_close(loss, library)
    loss.backward()
    torch.testing.assert_close(student.grad, (q - p) / 6)
    assert teacher.grad is None


def test_a_sure_teacher_is_the_shifted_token():
    """One-hot labels, the next token at each position: the usual loss."""
    ids = ids_of(rows=2, length=7)
    student = numbers(2, 7, 61)
    teacher = 200.0 * F.one_hot(ids[:, 1:], 61)
    found = llm_qat.soft_label_loss(student[:, :-1], teacher)
    torch.testing.assert_close(found, next_token_loss(student, ids))


def test_least_where_the_student_is_the_teacher():
    teacher = numbers(2, 3, 5)
    p = teacher.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(llm_qat.soft_label_loss(teacher + 7, teacher), entropy)
    for seed in range(5):
        other = teacher + numbers(2, 3, 5, seed=9 + seed)
        assert llm_qat.soft_label_loss(other, teacher) > entropy


# On models ----------------------------------------------------------------------------

VARIANTS = [
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 14, "intermediate_size": 50},
]
CONFIG = QATConfig(3, 8, 4, lr=1e-3)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_without_text_it_is_rounding_to_nearest(changes):
    model = make(**changes)
    before = deepcopy(model)
    llm_qat.apply(model, [], QATConfig(4, 16, 16))
    expected = qb.round_weights(deepcopy(before), QuantConfig(4, per="row"))
    torch.testing.assert_close(model(ids_of()), expected(ids_of()))
    left = dict(before.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, left[name])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ours_and_transformers_train_to_the_same(changes):
    model = make(**changes).double()
    library = theirs(model).double()
    text = [ids_of(seed=s) for s in (1, 2)]
    tied = bool(changes.get("tie_word_embeddings"))
    before = deepcopy(model)
    llm_qat.apply(model, text, CONFIG)
    llm_qat.apply(library, text, CONFIG)
    same = total = 0
    for name, linear in model.named_modules():
        if isinstance(linear, LowBitLinear):
            other = library.get_submodule(name).codes()
            same += (linear.codes() == other).sum().item()
            total += other.numel()
    assert same > 0.99 * total  # training is in float32
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        assert not torch.equal(p, old), f"{name} was not trained"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_training_lowers_the_soft_loss_and_the_model_keeps_what_was_trained():
    model = make(num_key_value_heads=2)
    teacher = deepcopy(model)
    text = llm_qat.self_generate(model, 8, 16, seed=0)
    losses = []

    def seen(done, total, loss):
        assert total == 40
        losses.append(loss)

    llm_qat.apply(model, [text] * 40, CONFIG, progress=seen)
    assert len(losses) == 40
    with torch.no_grad():
        now = llm_qat.soft_label_loss(llm_qat.logits(model, text, 4), teacher(text))
        floor = llm_qat.soft_label_loss(teacher(text), teacher(text))
    assert now - floor < 0.5 * (losses[0] - floor)
    # the last step is small: what is left is what was trained
    assert now.item() == pytest.approx(losses[-1], abs=0.02)


def test_hard_labels_are_the_next_tokens():
    model = make()
    text = [ids_of(seed=s) for s in (1, 1)]
    losses = []
    config = QATConfig(16, 16, 16, labels="hard", lr=1e-4)
    expected = next_token_loss(model(text[0]), text[0]).item()
    llm_qat.apply(
        deepcopy(model), text, config, progress=lambda i, n, x: losses.append(x)
    )
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[1] < losses[0]


def test_to_disk_and_back(tmp_path):
    model = make(num_key_value_heads=2, attention_bias=True)
    llm_qat.apply(model, [ids_of()], CONFIG)
    torch.save(model.state_dict(), tmp_path / "low.pt")
    empty = llm_qat.apply(
        make(seed=3, num_key_value_heads=2, attention_bias=True), [], CONFIG
    )
    empty.load_state_dict(torch.load(tmp_path / "low.pt"))
    assert torch.equal(empty(ids_of()), model(ids_of()))
    stored = model.model.layers[0].mlp.up_proj
    assert stored.packed.numel() == 48 * 32 * 3 / 8 and stored.activation_bits == 8


def test_half_precision_and_no_rounded_weight():
    model = make().to(torch.bfloat16)
    llm_qat.apply(model, [ids_of()], CONFIG)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model(ids_of()).isfinite().all()
    model = make()
    llm_qat.apply(model, [ids_of()], QATConfig(16, 4, 16))
    linear = model.model.layers[1].mlp.up_proj
    assert isinstance(linear, FakeQuantLinear) and linear.weight.requires_grad


def quantised(model):
    return qb.apply(model, QuantConfig(4, group_size=8))


def burst(model):
    """Finite weights whose logits are not."""
    model.lm_head.weight.data.fill_(3e38)
    return model


BAD_MODELS = [
    (with_adapter, "carries an adapter: merge it"),
    (not_finite, "layers.1.mlp.down_proj.weight holds 1 values"),
    (quantised, "is compressed already"),
    (burst, "the loss of step 1 is not finite"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODELS, ids=named)
def test_a_model_that_cannot_be_trained_stays_as_it_was(spoil, message):
    model = spoil(make()).train()
    kinds = [type(module) for module in model.modules()]
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        llm_qat.apply(model, [ids_of()] * 2, CONFIG)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.training and [type(module) for module in model.modules()] == kinds


def test_bad_arguments_are_named():
    for bad in (
        {"weight_bits": 1},
        {"activation_bits": 9},
        {"kv_bits": 4.5},
        {"labels": "firm"},
        {"lr": 0.0},
        {"clip": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            QATConfig(**bad)
    for bad in (torch.ones(2, 3), ids_of(2, 1), ids_of()[0], "text"):
        with pytest.raises(ValueError, match="each of batches"):
            llm_qat.apply(make(), [bad], CONFIG)
    with pytest.raises(ValueError, match="num_layers=0"):
        QuantizedCache(0)
    with pytest.raises(ValueError, match="bits=16 must"):
        QuantizedCache(2, 16)
    with pytest.raises(ValueError, match="bits=1 must"):
        QuantizedKV(1)
    with pytest.raises(ValueError, match="kv_bits=12"):
        llm_qat.logits(make(), ids_of(), 12)
    with pytest.raises(ValueError, match="bits=0"):
        llm_qat.kv_bytes(make().config, 10, 0)
    for bad in ({"kind": "beam"}, {"count": 0}, {"length": 0}, {"vocabulary": 0}):
        given = {"count": 2, "length": 3} | bad
        with pytest.raises(ValueError, match=next(iter(bad))):
            llm_qat.self_generate(make(), **given)


# On the course model ------------------------------------------------------------------


def stored_runs():
    with llm_qat.FILE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_the_sweep_measured_is_told_apart_from_noise():
    runs = stored_runs()
    keys = [tuple(run.values())[:6] for run in runs]
    assert len(set(keys)) == len(keys)
    own = [
        run
        for run in runs
        if (run["model"], run["bits"], run["text"], run["labels"])
        == ("course", "3-8-4", "hybrid", "soft")
    ]
    assert len(own) == 3
    for run in own:
        assert float(run["gained"]) > 5 * float(run["gained_error"])


@pytest.mark.slow
def test_text_of_its_own_mends_the_course_model():
    from llmlab.models import course_model
    from llmlab.training import pretraining

    model = course_model.load()
    valid = course_model.tokens("valid")
    windows = pretraining.evaluation_windows(valid, 128, 8)
    config = QATConfig(3, 8, 16)
    text = llm_qat.self_generate(model, 160, 64, seed=0)
    rounded = llm_qat.apply(deepcopy(model), [], config)
    trained = llm_qat.apply(deepcopy(model), text.split(8), config)
    losses = []
    with torch.no_grad():
        for student in (model, rounded, trained):
            losses.append(next_token_loss(student(windows), windows).item())
    assert losses[2] - losses[0] < 0.85 * (losses[1] - losses[0])
