"""ZeroQuant: against loops over blocks and tokens, least squares, torch's own fake
quantisation, and DeepSpeed's compression library (golden file).
"""

from __future__ import annotations

import csv
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmlab.compression import calibration, walk, zeroquant
from llmlab.compression import quantization_basics as qb
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.compression.zeroquant import (
    LKDConfig,
    Student,
    ZeroQuantConfig,
    ZeroQuantLinear,
)
from tests.compression.broken import not_finite, with_adapter, zeros
from tests.models.hugging_face import make, named, theirs

ROWS = ZeroQuantConfig(group_size=None)
GROUPS = ZeroQuantConfig(group_size=8)
GOLDEN = Path(__file__).parent / "golden" / "zeroquant.safetensors"


def numbers(*shape, seed=0):
    """Normal numbers, each row of another size."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random)
    return x * torch.logspace(-1, 1, shape[-2])[:, None]


# Who shares a scale -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_token_wise_is_each_row_by_itself(bits):
    X = numbers(7, 12)
    X[3] = 0
    codes, scale = zeroquant.quantize_tokens(X, ZeroQuantConfig(activation_bits=bits))
    top = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and scale.shape == (7, 1)
    for t, row in enumerate(X):
        s = row.abs().max() / top if row.any() else torch.tensor(1.0)
        torch.testing.assert_close(scale[t, 0], s)
        assert torch.equal(codes[t], torch.round(row / s).to(torch.int8))
        alone, s_alone = zeroquant.quantize_tokens(
            row[None], ZeroQuantConfig(activation_bits=bits)
        )
        assert torch.equal(alone[0], codes[t]) and torch.equal(s_alone[0], scale[t])


def test_one_scale_for_all_tokens_is_the_largest():
    X = numbers(7, 12)
    codes, scale = zeroquant.quantize_tokens(
        X, ZeroQuantConfig(activation_scales="tensor")
    )
    torch.testing.assert_close(scale, torch.full((7, 1), X.abs().max().item() / 127))
    assert codes[0].abs().max() < 127 and codes.abs().max() == 127


# (settings, rows of a block, columns of a block) for a weight of 6 × 24
BLOCKS = [
    ({"group_size": None}, 1, 24),
    ({"group_size": 8}, 1, 8),
    ({"group_size": 24}, 1, 24),
    ({"group_size": None, "groups": 1}, 6, 24),
    ({"group_size": None, "groups": 3}, 2, 24),
    ({"group_size": None, "groups": 6}, 1, 24),
    ({"group_size": None, "groups": 12}, 1, 12),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("settings", "rows", "columns"), BLOCKS, ids=str)
def test_group_wise_is_each_block_by_itself(settings, rows, columns, bits):
    W = numbers(6, 24)
    config = ZeroQuantConfig(**settings)
    codes, scale = zeroquant.quantize_weight(W, bits, config)
    fake = zeroquant.fake_quantize_weight(W, bits, config)
    s_w = zeroquant.column_scales(scale, 6, 24)
    top = 2 ** (bits - 1) - 1
    for i in range(0, 6, rows):
        for j in range(0, 24, columns):
            block = W[i : i + rows, j : j + columns]
            s = (block.abs().max() / top).half().float()
            found = codes[i : i + rows, j : j + columns]
            assert torch.equal(found, torch.round(block / s).to(torch.int8))
            torch.testing.assert_close(
                fake[i : i + rows, j : j + columns], torch.round(block / s) * s
            )
            g = j * s_w.shape[1] // 24
            assert torch.equal(s_w[i : i + rows, g], s.expand(rows))
    assert scale.numel() == 6 * 24 // (rows * columns)


def test_integers_with_both_scales_are_the_product_of_the_levels():
    X, W = numbers(5, 24), numbers(9, 24, seed=1)
    for settings in ({"group_size": 8}, {"group_size": None}):
        config = ZeroQuantConfig(**settings)
        Q_x, s_x = zeroquant.quantize_tokens(X, config)
        Q_w, scale = zeroquant.quantize_weight(W, 4, config)
        s_w = zeroquant.column_scales(scale, 9, 24)
        y = zeroquant.integer_product(Q_x, s_x, Q_w, s_w)
        x_hat = Q_x.double() * s_x
        w_hat = Q_w.double() * s_w.repeat_interleave(24 // s_w.shape[1], 1)
        torch.testing.assert_close(y.double(), x_hat @ w_hat.T)


def test_a_long_sum_of_integers_is_exact():
    """1,536 · 127² is more than a float32 counts one by one."""
    Q = torch.full((1, 1536), 127, dtype=torch.int8)
    Q[0, 0] = 126
    y = zeroquant.integer_product(Q, torch.ones(1, 1), Q, torch.ones(1, 1))
    assert y.item() == torch.tensor(float((Q.long() ** 2).sum())).item()


# The layer ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", [b[0] for b in BLOCKS], ids=str)
def test_the_layer_computes_what_the_student_does(settings, bits):
    linear = nn.Linear(24, 6)
    linear.weight.data.copy_(numbers(6, 24))
    config = ZeroQuantConfig(**settings)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    layer = ZeroQuantLinear(linear, bits, config)
    student = Student(linear, bits, config)
    torch.testing.assert_close(layer(x), student(x), atol=1e-4, rtol=1e-4)
    rounded = zeroquant.fake_quantize_weight(linear.weight, bits, config)
    torch.testing.assert_close(layer.weight, rounded.detach())
    top = 2 ** (bits - 1) - 1
    assert int(layer.weight_codes.abs().max()) == top
    assert layer.codes.nbytes == -(-6 * 24 * bits // 8)


def test_floats_as_inputs_meet_the_levels_of_the_weight():
    linear = nn.Linear(24, 6)
    layer = ZeroQuantLinear(
        linear, 4, ZeroQuantConfig(activation_bits=None, group_size=8)
    )
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + linear.bias)
    assert layer(x[:0]).shape == (0, 6)


def test_each_token_is_computed_as_if_it_were_alone():
    layer = ZeroQuantLinear(nn.Linear(24, 6), 4, GROUPS)
    x = numbers(5, 24)
    rows = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), rows, rtol=0, atol=0)
    assert not layer(x.requires_grad_()).requires_grad


# Straight through, and distillation ---------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_of_the_weight_is_that_of_torch(bits):
    W = numbers(6, 24).requires_grad_()
    upstream = numbers(6, 24, seed=3)
    ours = zeroquant.fake_quantize_weight(W, bits, ROWS)
    (mine,) = torch.autograd.grad((ours * upstream).sum(), W)
    _, scale = zeroquant.quantize_weight(W.detach(), bits, ROWS)
    top = 2 ** (bits - 1) - 1
    zero = torch.zeros(6, dtype=torch.int32)
    library = torch.fake_quantize_per_channel_affine(W, scale, zero, 0, -top, top)
    (expected,) = torch.autograd.grad((library * upstream).sum(), W)
    torch.testing.assert_close(ours, library)
    torch.testing.assert_close(mine, expected)


def test_the_gradient_of_lkd_in_closed_form():
    """∂ MSE / ∂W = 2/N · (X̂ Ŵᵀ − Y)ᵀ X̂ for one linear, straight through."""
    X, W, Y = numbers(9, 24), numbers(6, 24, seed=1), numbers(9, 6, seed=2)
    linear = nn.Linear(24, 6, bias=False)
    linear.weight.data.copy_(W)
    student = Student(linear, 4, GROUPS)
    Y.requires_grad_()
    loss = zeroquant.lkd_loss(student, ((X,), {}), Y)
    loss.backward()
    x_hat = qb.fake_quantize(X, GROUPS.activations)
    w_hat = zeroquant.fake_quantize_weight(W, 4, GROUPS)
    error = x_hat @ w_hat.T - Y.detach()
    torch.testing.assert_close(loss, error.square().mean())
    expected = 2 / error.numel() * error.T @ x_hat
    torch.testing.assert_close(linear.weight.grad, expected)
    assert Y.grad is None


def small_teacher(seed=0):
    """tanh of a linear, and inputs that vary together."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(12, 5), nn.Tanh())
    mix = torch.randn(12, 12, generator=random)
    calls = [((torch.randn(64, 12, generator=random) @ mix,), {}) for _ in range(4)]
    return teacher, calls


def test_one_linear_reaches_the_optimum_of_least_squares():
    """The student has no tanh, so that something is left; 8 bits and float inputs."""
    teacher, calls = small_teacher()
    config = ZeroQuantConfig(activation_bits=None, group_size=None)
    student = nn.Sequential(Student(nn.Linear(12, 5), 8, config))
    X = torch.cat([args[0] for args, _ in calls])
    with torch.no_grad():
        Y = teacher(X)
    whole = torch.cat([X, torch.ones(len(X), 1)], 1)
    best = torch.linalg.lstsq(whole, Y).solution
    least = (whole @ best - Y).square().mean()
    start = (student(X) - Y).square().mean()
    how = LKDConfig(steps=500, learning_rate=0.05)
    zeroquant.train_layer(student, teacher, [((X,), {})], how)
    with torch.no_grad():
        left = (student(X) - Y).square().mean()
    assert start > 3 * least and least <= left < 1.02 * least


def test_a_bias_learns_the_mean_of_what_rounding_left():
    """With the weight held fast the optimum is a mean."""
    teacher = nn.Linear(12, 5)
    X = numbers(64, 12) + 1
    student = Student(deepcopy(teacher), 2, ROWS)
    before = student.linear.weight.detach().clone()
    with torch.no_grad():
        target = (teacher(X) - student(X)).mean(0) + student.linear.bias
    adam = torch.optim.SGD([student.linear.bias], lr=1.0)
    for _ in range(100):
        adam.zero_grad()
        zeroquant.lkd_loss(student, ((X,), {}), teacher(X)).backward()
        adam.step()
    torch.testing.assert_close(student.linear.bias.data, target, atol=1e-4, rtol=0)
    assert torch.equal(student.linear.weight, before)


def test_training_changes_the_student_alone_and_takes_batches_in_turn():
    teacher, calls = small_teacher()
    before = deepcopy(teacher.state_dict())
    student = deepcopy(teacher)
    student[0] = Student(student[0], 4, ROWS)
    seen = []
    student.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    losses = zeroquant.train_layer(student, teacher, calls[:3], LKDConfig(steps=5))
    assert len(losses) == 5
    order = [next(i for i, c in enumerate(calls) if c[0][0] is x) for x in seen]
    assert order == [0, 1, 2, 0, 1]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in teacher.parameters())
    changed = student[0].linear.weight - before["0.weight"]
    assert changed.abs().max() > 1e-4


def test_each_step_is_one_of_adam_with_a_rate_that_falls_to_zero():
    teacher, calls = small_teacher()
    student = deepcopy(teacher)
    student[0] = Student(student[0], 4, ROWS)
    by_hand = deepcopy(student)
    how = LKDConfig(steps=3, learning_rate=0.1)
    zeroquant.train_layer(student, teacher, calls, how)
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.1)
    for step, rate in enumerate((0.1, 0.2 / 3, 0.1 / 3)):
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        x = calls[step][0][0]
        error = by_hand(x) - teacher(x).detach()
        error.square().mean().backward()
        adam.step()
    for a, b in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_that_is_not_finite_is_named():
    teacher = nn.Linear(4, 4)
    student = Student(deepcopy(teacher), 4, ROWS)
    teacher.weight.data *= 1e38
    calls = [((torch.full((2, 4), 1e5),), {})]
    with pytest.raises(ValueError, match="after 0 steps: use a smaller"):
        zeroquant.train_layer(student, teacher, calls, LKDConfig())


def test_distillation_beats_rounding_on_inputs_that_it_did_not_see():
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        teacher = nn.Linear(32, 16)
        basis = torch.randn(6, 32)

        def draw(basis=basis):
            return torch.randn(256, 6) @ basis + 0.2 * torch.randn(256, 32)

        student = Student(deepcopy(teacher), 3, ROWS)
        other = draw()
        with torch.no_grad():
            before = (student(other) - teacher(other)).square().mean()
        calls = [((draw(),), {}) for _ in range(4)]
        zeroquant.train_layer(student, teacher, calls, LKDConfig(100, 0.01))
        with torch.no_grad():
            after = (student(other) - teacher(other)).square().mean()
        shares.append((after / before).item())
    assert max(shares) < 0.8


# On models ----------------------------------------------------------------------------

CONFIG = ZeroQuantConfig(group_size=None)
SHORT = LKDConfig(steps=3, learning_rate=1e-3)
VARIANTS = [
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 14, "intermediate_size": 56},
]


def text(seed=0, rows=2, length=24):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (rows, length), generator=random) for _ in range(2)]


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("batches", [None, text()], ids=["no data", "LKD"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ours_and_transformers_get_the_same(changes, batches):
    model = make(**changes)
    library = theirs(model)
    head = model.lm_head.weight.clone()
    how = None if batches is None else SHORT
    zeroquant.apply(model, CONFIG, batches, how)
    zeroquant.apply(library, CONFIG, batches, how)
    ours = model.state_dict()
    different = 0
    for name, value in library.state_dict().items():
        if value.dtype in (torch.uint8, torch.int8):
            different += int((value != ours[name]).sum())
        else:
            torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=0)
    # a weight half way between two levels may fall to either side
    assert different <= (0 if batches is None else 60)
    assert torch.equal(model.lm_head.weight, head)
    for name, module in model.named_modules():
        if isinstance(module, ZeroQuantLinear):
            assert module.bits == (4 if ".mlp." in name else 8)


def test_without_data_the_model_is_rounded_and_its_inputs_are():
    model = make()
    expected = deepcopy(model)
    for name, linear in walk.linears(expected).items():
        bits = 4 if "mlp" in name else 8
        grid = QuantConfig(bits, per="row")
        linear.weight.data = qb.decode(*qb.encode(linear.weight, grid), grid)
    qb.quantize_inputs(expected, QuantConfig(8, per="row", scale_dtype=torch.float32))
    zeroquant.apply(model, CONFIG)
    tokens = text()[0]
    torch.testing.assert_close(
        logits(model, tokens), logits(expected, tokens), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("inputs", zeroquant.INPUTS)
def test_teacher_and_student_of_a_layer_read_the_same(inputs):
    """With floats it is what the float layers put out; else what the students did."""
    model = make()
    how = LKDConfig(steps=2, inputs=inputs)
    students = zeroquant.distill(model, text(), CONFIG, how)
    layers = list(calibration.blocks(model).values())
    calls = calibration.first_calls(model, text())
    by_hand = zeroquant.student_of(layers[0], CONFIG, "model.layers.0")
    zeroquant.train_layer(by_hand, layers[0], calls, how)
    before = by_hand if inputs == "quantized" else layers[0]
    calls = calibration.next_calls(before, calls)
    second = zeroquant.student_of(layers[1], CONFIG, "model.layers.1")
    zeroquant.train_layer(second, layers[1], calls, how)
    found = students["model.layers.1"].state_dict()
    for name, value in second.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_lkd_brings_each_layer_nearer_to_its_teacher():
    model = make()
    how = LKDConfig(steps=60, learning_rate=5e-3)
    config = ZeroQuantConfig(attention_bits=3, mlp_bits=3, group_size=None)
    students = zeroquant.distill(model, text(rows=8), config, how)
    calls = calibration.first_calls(model, text(seed=9))
    for prefix, teacher in calibration.blocks(model).items():
        rounded = zeroquant.student_of(teacher, config, prefix)
        with torch.no_grad():
            target = zeroquant.output(teacher, calls[0])
            before = zeroquant.lkd_loss(rounded, calls[0], target)
            after = zeroquant.lkd_loss(students[prefix], calls[0], target)
        assert after < 0.9 * before
        calls = calibration.next_calls(teacher, calls)


def test_what_is_stored_comes_back(tmp_path):
    model = make(attention_bias=True)
    again = deepcopy(model)
    zeroquant.apply(model, CONFIG, text(), SHORT)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    zeroquant.apply(again, CONFIG)
    tokens = text()[0]
    assert not torch.equal(logits(again, tokens), logits(model, tokens))
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(
        logits(again, tokens), logits(model, tokens), rtol=0, atol=0
    )


def test_norms_and_biases_are_trained_and_put_in():
    model = make(attention_bias=True)
    before = deepcopy(model)
    zeroquant.apply(model, CONFIG, text(), SHORT)
    norm = "model.layers.1.input_layernorm"
    assert not torch.equal(
        model.get_submodule(norm).weight, before.get_submodule(norm).weight
    )
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(
        model.get_submodule(name).bias, before.get_submodule(name).bias
    )
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_model_stays_frozen():
    model = make(attention_bias=True).requires_grad_(False)
    zeroquant.apply(model, CONFIG, text(), SHORT)
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_are_distilled_in_eval_mode_and_come_back_in_theirs():
    model = make().train()
    modes = []
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    zeroquant.apply(model, CONFIG, text(), SHORT)
    assert len(modes) > 3 and not any(modes)
    assert all(module.training for module in model.modules())


def test_a_skipped_linear_stays_a_float_and_learns_along():
    model = make()
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    zeroquant.apply(model, CONFIG, text(), SHORT, skip=("lm_head", "down_proj"))
    down = model.model.layers[0].mlp.down_proj
    assert type(down) is nn.Linear and not torch.equal(down.weight, before)


@pytest.mark.parametrize("batches", [None, text()], ids=["no data", "LKD"])
def test_half_precision_in_and_out(batches):
    model = make().to(torch.bfloat16)
    zeroquant.apply(model, CONFIG, batches)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    out = logits(model, text()[0])
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def overflowing(model):
    """Finite weights, infinite outputs."""
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight.data *= 1e20
    mlp.down_proj.weight.data *= 1e20
    return model


def quantised(model):
    return zeroquant.apply(model, CONFIG)


BAD = [
    (with_adapter, {}, "carries an adapter: merge it"),
    (not_finite, {}, "layers.1.mlp.down_proj.weight holds 1 values"),
    (zeros, {}, "layers.1.mlp.down_proj.weight is all zeros"),
    (quantised, {}, "is compressed already"),
    (None, {"config": ZeroQuantConfig(group_size=7)}, "q_proj: group_size=7 must"),
    (
        None,
        {"config": ZeroQuantConfig(group_size=None, groups=11)},
        "q_proj: groups=11 must",
    ),
    (None, {"batches": []}, "batches is empty"),
    (None, {"batches": None}, "lkd needs batches="),
    (overflowing, {}, "layers.1: "),
]


@pytest.mark.parametrize(("spoil", "changes", "message"), BAD, ids=named)
def test_a_model_that_cannot_be_quantised_stays_as_it_was(spoil, changes, message):
    model = make().train()
    if spoil is not None:
        model = spoil(model).train()
    before = deepcopy(model.state_dict())
    arguments = {"config": CONFIG, "batches": text(), "lkd": SHORT, **changes}
    with pytest.raises(ValueError, match=message):
        zeroquant.apply(model, **arguments)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_bad_settings_are_named():
    for bad in (
        {"attention_bits": 9},
        {"mlp_bits": 1},
        {"mlp_bits": None},
        {"activation_bits": 4.0},
        {"group_size": 0},
        {"groups": 0, "group_size": None},
        {"groups": 4},
        {"activation_scales": "row"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ZeroQuantConfig(**bad)
    for bad in (
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": 1.5},
        {"learning_rate": float("nan")},
        {"inputs": "both"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LKDConfig(**bad)
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="mlp_bits=4 is for linears within"):
        zeroquant.apply(plain, CONFIG)
    zeroquant.apply(plain, ZeroQuantConfig(8, 8, group_size=2))
    assert isinstance(plain[0], ZeroQuantLinear)


# DeepSpeed ----------------------------------------------------------------------------

LIBRARY = {  # bits, groups of the matrix
    "w8a8, 8 groups": (8, 8),
    "w4a8, 8 groups": (4, 8),
    "w4a8, 4 groups": (4, 4),
    "w4, 16 groups": (4, 16),
}


def deepspeed_levels(blocks, bits):
    """What DeepSpeed 0.18.2 does to each row of `blocks`: the step is absmax / 2^(b−1),
    and the codes are −2^(b−1) … 2^(b−1) − 1.
    """
    half = 2 ** (bits - 1)
    step = blocks.abs().amax(1, keepdim=True) / half
    return (blocks / step).round().clamp(-half, half - 1) * step


@pytest.mark.parametrize("name", LIBRARY)
def test_deepspeed_has_our_blocks_and_tokens_and_another_step(name):
    golden = load_file(GOLDEN)
    W, x, upstream = golden["W"], golden["x"][0], golden["upstream"][0]
    bits, groups = LIBRARY[name]
    config = ZeroQuantConfig(group_size=None, groups=groups)
    blocks = zeroquant.weight_blocks(W, config)
    weight = deepspeed_levels(blocks, bits).reshape(W.shape)
    torch.testing.assert_close(golden[f"{name}/weight"], weight)
    x_hat = deepspeed_levels(x, 8) if "a8" in name else x
    torch.testing.assert_close(golden[f"{name}/y"][0], x_hat @ weight.T)
    # its largest positive weight is clipped by a step; ours never is
    ours = zeroquant.fake_quantize_weight(W, bits, config)
    positive = blocks.amax(1) == blocks.abs().amax(1)
    top = blocks.amax(1)[positive]
    theirs_top = weight.reshape(blocks.shape).amax(1)[positive]
    ours_top = ours.reshape(blocks.shape).amax(1)[positive]
    torch.testing.assert_close(theirs_top, top * (1 - 2.0 ** (1 - bits)))
    torch.testing.assert_close(ours_top, top, rtol=1e-3, atol=0)
    # straight through, the clipped ones too: as ours, where nothing is clipped
    torch.testing.assert_close(golden[f"{name}/grad W"], upstream.T @ x_hat)
    torch.testing.assert_close(golden[f"{name}/grad x"][0], upstream @ weight)


def test_deepspeed_has_no_scale_for_a_token_of_zeros():
    golden = load_file(GOLDEN)
    y = golden["a token of zeros/y"][0]
    assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all()
    linear = nn.Linear(6, 8, bias=False)
    linear.weight.data.copy_(golden["W"])
    x = golden["x"][0].clone()
    x[1] = 0
    found = ZeroQuantLinear(linear, 8, ROWS)(x)
    assert found.isfinite().all() and not found[1].any()


def test_deepspeed_quantises_nothing_before_its_scheduler_has_run():
    golden = load_file(GOLDEN)
    x = golden["x"]
    torch.testing.assert_close(golden["after init_compression/y"], x @ golden["W"].T)
    # and `redundancy_clean` leaves levels in the weight, and the inputs floats
    weight = golden["w8a8, 8 groups/weight"]
    torch.testing.assert_close(golden["after redundancy_clean/y"], x @ weight.T)


def test_the_asymmetric_step_of_deepspeed_is_a_16th_of_the_range():
    golden = load_file(GOLDEN)
    W = golden["W"]
    low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    step = (high - low) / 16
    zero = (low / step).round() * step
    levels = ((W - zero) / step).round().clamp(0, 15) * step + zero
    torch.testing.assert_close(golden["w4, 8 groups, asymmetric/weight"], levels)


# Costs, and the sweep -----------------------------------------------------------------


def test_bytes_of_training_are_those_of_the_tensors():
    model = make()
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    found = zeroquant.training_bytes(layer, 2, whole - 2 * layer)
    assert found["the model, to run it"] == 2 * whole
    assert found["training all of it"] == 18 * whole
    assert found["distilling all of it"] == 20 * whole
    assert found["LKD, a layer at a time"] == 2 * whole + 18 * layer


def test_moved_bytes_by_hand():
    """2 tokens, 3 inputs, 5 outputs: X has 6 numbers, W 15, Y 10."""
    assert zeroquant.moved_bytes(2, 3, 5) == {
        "16-bit floats": 12 + 12 + 12 + 30 + 20,
        "8 bits, a kernel each": 12 + 12 + 12 + 6 + 6 + 15 + 40 + 40 + 20,
        "8 bits, fused": 12 + 6 + 6 + 15 + 20,
    }


def sweep():
    with zeroquant.FILE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_the_sweep_measured_is_told_apart_from_noise():
    """On its kind of text LKD gains more than three standard errors; and 8 bits without
    data cost a thirtieth of a nat at most.
    """
    runs = sweep()
    keys = [tuple(list(run.values())[:6]) for run in runs]
    assert len(set(keys)) == len(keys)
    distilled = [run for run in runs if run["text"] == "addresses"]
    assert len(distilled) >= 4
    for run in distilled:
        assert float(run["gained"]) > 3 * float(run["gained_error"])
    eight = [run for run in runs if (run["weights"], run["inputs"]) == ("8", "token")]
    assert len(eight) == 3
    assert all(float(run["grown"]) < 1 / 30 for run in eight)


@pytest.mark.real_model
@pytest.mark.slow
def test_lkd_helps_on_text_that_it_did_not_see():
    from llmlab.models import course_model, real_model

    real_model.fetch(quiet=True)
    model = real_model.load()
    encode = real_model.load_tokenizer().encode
    train, other = (
        torch.tensor(encode(course_model.corpus("addresses", split)[:8_000]).ids)
        for split in ("train", "valid")
    )
    config = ZeroQuantConfig(group_size=None)
    name, teacher = next(iter(calibration.blocks(model).items()))
    calls = calibration.first_calls(model, calibration.sample(train, 128, 8))
    judge = calibration.first_calls(model, [other[None, :256]])[0]
    student = zeroquant.student_of(teacher, config, name)
    with torch.no_grad():
        target = zeroquant.output(teacher, judge)
        before = zeroquant.lkd_loss(student, judge, target)
    zeroquant.train_layer(student, teacher, calls, LKDConfig(steps=16))
    with torch.no_grad():
        after = zeroquant.lkd_loss(student, judge, target)
    assert after < 0.9 * before
