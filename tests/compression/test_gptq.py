"""GPTQ: against closed forms, against OBQ, on our model and transformers'.

The oracle is the least-squares solution itself. Once the weights R of a row are on
their levels ŵ_R, the free ones F are at their best at

    w_F + (H_FF)⁻¹ H_FR (w_R − ŵ_R)

which needs no inverse of H, no elimination and no Cholesky factor.
"""

from __future__ import annotations

import csv
from copy import deepcopy

import pytest
import torch

from llmlab.compression import calibration, gptq
from llmlab.compression import quantization_basics as qb
from llmlab.compression.gptq import GPTQConfig
from llmlab.compression.quantization_basics import QuantConfig
from tests.compression.broken import no_input, not_finite, with_adapter, zeros
from tests.models.hugging_face import make, named, theirs

ROWS = QuantConfig(3, per="row", scale_dtype=torch.float32)
GROUPS = QuantConfig(3, group_size=4, scale_dtype=torch.float32)


def problem(out=5, columns=12, tokens=40, seed=0):
    """W, X Xᵀ with correlated and unequal inputs, both float64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    X = mix @ torch.randn(columns, tokens, generator=random, dtype=torch.float64)
    X *= torch.logspace(0, 1, columns, dtype=torch.float64)[:, None]
    W = torch.randn(out, columns, generator=random, dtype=torch.float64)
    return W, X @ X.T


def damped(H, share=0.01):
    return H + share * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def at_their_best(W, W_hat, done, H):
    """The rows of W with the first `done` weights at Ŵ and the others at their best."""
    error = (W - W_hat)[:, :done]
    best = W.clone()
    best[:, :done] = W_hat[:, :done]
    move = torch.linalg.solve(H[done:, done:], H[done:, :done] @ error.T)
    best[:, done:] += move.T
    return best


def in_order(W, H, config):
    """GPTQ without its shortcuts: solve for the free weights before each column."""
    W_hat = W.clone()
    size = W.shape[1] if config.grid.per == "row" else config.grid.group_size
    scale, zero = gptq.scales_of(W, config.grid)
    for q in range(W.shape[1]):
        now = at_their_best(W, W_hat, q, H)
        g = q // size
        if q % size == 0 and not config.fixed_scales:
            s, z = gptq.scales_of(now[:, q : q + size], config.grid)
            scale[:, g : g + 1], zero[:, g : g + 1] = s, z
        W_hat[:, q] = gptq.round_column(now[:, q], scale[:, g], zero[:, g], config.grid)
    return W_hat


# Optimal Brain Surgeon and OBQ --------------------------------------------------------


def test_the_surgeon_finds_the_least_loss_and_its_size():
    W, H = problem(out=1)
    w, H_inv = W[0], torch.linalg.inv(H)
    q, value = 3, 0.25
    found = gptq.surgeon(w, q, value, H_inv)
    assert found[q] == value
    # solved for, with weight q held fast
    rest = [i for i in range(len(w)) if i != q]
    move = torch.linalg.solve(H[rest][:, rest], H[rest, q]) * (w[q] - value)
    torch.testing.assert_close(found[rest], w[rest] + move)
    delta = found - w
    half = (w[q] - value) ** 2 / H_inv[q, q] / 2
    torch.testing.assert_close(delta @ H @ delta / 2, half)
    for seed in range(20):  # no other change that sets weight q costs less
        step = torch.randn(len(w), generator=torch.Generator().manual_seed(seed))
        other = delta + 0.1 * step.double()
        other[q] = delta[q]
        assert other @ H @ other > delta @ H @ delta


def test_without_is_the_inverse_of_the_smaller_matrix():
    _, H = problem(columns=9)
    for q in range(9):
        smaller = gptq.without(torch.linalg.inv(H), q)
        rest = [i for i in range(9) if i != q]
        torch.testing.assert_close(smaller[rest][:, rest], H[rest][:, rest].inverse())
        assert not smaller[q].any() and not smaller[:, q].any()


def test_greedy_obq_takes_the_cheapest_weight_next():
    W, H = problem(out=1, columns=5, seed=3)
    scale, zero = gptq.scales_of(W, ROWS)
    s, z = scale.expand_as(W), zero.expand_as(W)
    found = gptq.obq(W, H, s, z, ROWS)
    row, left, fixed = W[0].clone(), list(range(5)), []
    target = W[0].clone()
    while left:
        inverse = H[left][:, left].inverse()
        level = gptq.round_column(row, scale[0], zero[0], ROWS)
        cost = ((row - level)[left] ** 2 / inverse.diagonal()).tolist()
        q = left.pop(cost.index(min(cost)))
        target[q] = level[q]
        fixed.append(q)
        if left:
            gap = W[0][fixed] - target[fixed]
            move = torch.linalg.solve(H[left][:, left], H[left][:, fixed] @ gap)
            row[left] = W[0][left] + move
    torch.testing.assert_close(found[0], target)
    assert fixed != sorted(fixed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_obq_in_a_fixed_order(bits, symmetric):
    W, H = problem()
    grid = QuantConfig(bits, symmetric, per="row", scale_dtype=torch.float32)
    found = gptq.gptq(W, H, GPTQConfig(grid, damping=0.02, block_size=5))
    scale, zero = gptq.scales_of(W, grid)
    fixed = gptq.obq(
        W, damped(H, 0.02), scale.expand_as(W), zero.expand_as(W), grid, greedy=False
    )
    torch.testing.assert_close(found.weight, fixed)
    low, high = grid.range
    assert found.codes.min() >= low and found.codes.max() <= high
    assert (found.codes == found.codes.round()).all()


# GPTQ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
@pytest.mark.parametrize(
    "grid",
    [ROWS, GROUPS, QuantConfig(3, False, group_size=6), QuantConfig(2, group_size=12)],
)
def test_block_size_changes_nothing_and_least_squares_agrees(grid, block_size):
    W, H = problem()
    config = GPTQConfig(grid, block_size=block_size)
    found = gptq.gptq(W, H, config)
    torch.testing.assert_close(found.weight, in_order(W, damped(H), config))


def test_scales_of_groups_come_from_the_updated_weights():
    W, H = problem()
    found = gptq.gptq(W, H, GPTQConfig(GROUPS, block_size=3))
    now = at_their_best(W, found.weight, 8, damped(H))
    updated, _ = gptq.scales_of(now[:, 8:12], GROUPS)
    torch.testing.assert_close(found.scale[:, 2:3], updated)
    as_they_were, _ = gptq.scales_of(W, GROUPS)
    assert not torch.allclose(found.scale[:, 2], as_they_were[:, 2])
    static = gptq.gptq(W, H, GPTQConfig(GROUPS, static_groups=True))
    torch.testing.assert_close(static.scale, as_they_were)


@pytest.mark.parametrize("grid", [ROWS, GROUPS, QuantConfig(4, False, group_size=3)])
def test_a_diagonal_h_gives_round_to_nearest_exactly(grid):
    W = problem()[0].float()
    H = torch.diag(torch.logspace(-2, 2, 12))
    for act_order in (False, True):
        found = gptq.gptq(W, H, GPTQConfig(grid, act_order=act_order))
        assert torch.equal(found.weight, gptq.nearest(W, grid))


def test_damping_without_end_gives_round_to_nearest():
    W, H = problem()
    found = gptq.gptq(W, H, GPTQConfig(ROWS, damping=1e9))
    torch.testing.assert_close(found.weight, gptq.nearest(W.float(), ROWS).double())


def test_the_factor_is_upper_and_gives_the_damped_inverse():
    _, H = problem()
    U = gptq.inverse_factor(H, 0.1)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U, damped(H, 0.1).inverse())


def test_act_order_is_gptq_on_columns_in_another_order():
    W, H = problem(seed=5)
    perm = H.diagonal().argsort(descending=True)
    assert perm.tolist() != list(range(12))
    ordered = gptq.gptq(W, H, GPTQConfig(ROWS, act_order=True))
    by_hand = gptq.gptq(W[:, perm], H[perm][:, perm], GPTQConfig(ROWS))
    torch.testing.assert_close(ordered.weight[:, perm], by_hand.weight)
    torch.testing.assert_close(ordered.codes[:, perm], by_hand.codes)


@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_stored_gives_the_weight_back(act_order):
    """Column j has the scale of group j // g, whenever it was its turn."""
    W, H = problem(seed=5)
    grid = QuantConfig(3, False, group_size=4, scale_dtype=torch.float32)
    found = gptq.gptq(W, H, GPTQConfig(grid, act_order=act_order))
    assert found.group.tolist() == [j // 4 for j in range(12)]
    back = (found.codes - found.zero[:, found.group]) * found.scale[:, found.group]
    torch.testing.assert_close(back, found.weight)
    if act_order:
        torch.testing.assert_close(found.scale, gptq.scales_of(W, grid)[0])


def test_dead_columns_become_zero_and_disturb_nothing():
    W, H = problem()
    H[4] = 0
    H[:, 4] = 0
    before = W.clone()
    found = gptq.gptq(W, H, GPTQConfig(ROWS, damping=0))
    assert not found.weight[:, 4].any() and torch.equal(W, before)
    alive = [i for i in range(12) if i != 4]
    W[:, 4] = 0
    rest = gptq.gptq(W[:, alive], H[alive][:, alive], GPTQConfig(ROWS, damping=0))
    torch.testing.assert_close(found.weight[:, alive], rest.weight)


def test_a_factor_in_h_changes_nothing_and_inputs_stay_as_they_are():
    W, H = problem()
    before = W.clone(), H.clone()
    once = gptq.gptq(W, H, GPTQConfig(GROUPS))
    twice = gptq.gptq(W, 2 * H, GPTQConfig(GROUPS))
    torch.testing.assert_close(once.weight, twice.weight)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_rounding(bits):
    """Inputs with 6 directions and a little noise leave much to make up for."""
    grid = QuantConfig(bits, group_size=8)
    shares = []
    for seed in range(5):
        W, _ = problem(out=16, columns=32, seed=seed)
        random = torch.Generator().manual_seed(seed)
        X = torch.randn(32, 6, generator=random) @ torch.randn(6, 90, generator=random)
        X = X.double() + 0.2 * torch.randn(32, 90, generator=random)
        found = gptq.gptq(W, X @ X.T, GPTQConfig(grid))
        error = gptq.output_error(W, found.weight, X @ X.T)
        shares.append(error / gptq.output_error(W, gptq.nearest(W, grid), X @ X.T))
    assert max(shares) < 0.5


def test_the_output_error_is_that_of_the_outputs():
    W, _ = problem()
    X = torch.randn(12, 9, generator=torch.Generator().manual_seed(1)).double()
    W_hat = gptq.nearest(W, ROWS)
    expected = ((W_hat - W) @ X).square().sum() / (W @ X).square().sum()
    found = gptq.output_error(W, W_hat, X @ X.T)
    torch.testing.assert_close(found, expected.item())


# On models ----------------------------------------------------------------------------

CONFIG = GPTQConfig(QuantConfig(3, group_size=8, scale_dtype=torch.float32))
VARIANTS = [
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 14, "intermediate_size": 56},
]


def text(seed=0, rows=2, length=24):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (rows, length), generator=random) for _ in range(2)]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ours_and_transformers_get_the_same_weights(changes):
    model = make(**changes)
    library = theirs(model)
    head = model.lm_head.weight.clone()
    before = {name: p.clone() for name, p in model.named_parameters()}
    gptq.apply(model, text(), CONFIG)
    gptq.apply(library, text(), CONFIG)
    for name, weight in library.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-4, rtol=0)
    assert torch.equal(model.lm_head.weight, head)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in qb.linears(model)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_stored_codes_stand_for_the_same_weights(bits, symmetric, act_order):
    grid = QuantConfig(bits, symmetric=symmetric, group_size=8)
    config = GPTQConfig(grid, act_order=act_order)
    model = make(num_key_value_heads=2, attention_bias=True)
    floats = gptq.apply(deepcopy(model), text(), config)
    packed = gptq.apply(model, text(), config, store=True)
    for name, linear in qb.linears(floats).items():
        found = packed.get_submodule(name)
        assert torch.equal(found.weight, linear.weight)
        assert found.bias is None or torch.equal(found.bias, linear.bias)
    ids = torch.cat(text())
    assert torch.equal(packed(ids), floats(ids))


def test_each_block_sees_what_the_quantised_ones_before_it_put_out():
    model = make()
    first = gptq.apply(deepcopy(model), text(), CONFIG)
    half = deepcopy(model)
    half.model.layers[0].load_state_dict(first.model.layers[0].state_dict())
    linears = {n: m for n, m in qb.linears(half).items() if ".layers.1." in n}
    seen = calibration.inputs(half, linears, text())
    for name, linear in linears.items():
        expected = gptq.gptq(linear.weight, seen[name].gram, CONFIG).weight
        found = first.get_submodule(name).weight
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_half_precision_in_and_out():
    model = make().to(torch.bfloat16)
    gptq.apply(model, text(), CONFIG)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert weight.unflatten(1, (-1, 8))[0, 0].unique().numel() <= 7
    assert model(text()[0]).isfinite().all()


def quantised(model):
    return qb.apply(model, QuantConfig(4, group_size=8))


BAD_MODELS = [
    (with_adapter, "carries an adapter: merge it"),
    (not_finite, "layers.1.mlp.down_proj.weight holds 1 values"),
    (zeros, "layers.1.mlp.down_proj.weight is all zeros"),
    (no_input, "layers.1.mlp.gate_proj: H is all zeros"),
    (quantised, "is compressed already"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODELS, ids=named)
def test_a_model_that_cannot_be_quantised_stays_as_it_was(spoil, message):
    model = spoil(make()).train()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        gptq.apply(model, text(), CONFIG)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_bad_arguments_are_named():
    W, H = problem()
    with pytest.raises(ValueError, match="group_size=5 must divide"):
        gptq.gptq(W, H, GPTQConfig(QuantConfig(3, group_size=5)))
    with pytest.raises(ValueError, match="H has shape"):
        gptq.gptq(W, H[:5], GPTQConfig(ROWS))
    with pytest.raises(ValueError, match="H holds 1 values"):
        H_bad = H.clone()
        H_bad[1, 1] = torch.inf
        gptq.gptq(W, H_bad, GPTQConfig(ROWS))
    with pytest.raises(ValueError, match="no inverse with damping=0"):
        x = torch.ones(12, 1, dtype=torch.float64)
        gptq.gptq(W, x @ x.T, GPTQConfig(ROWS, damping=0))
    with pytest.raises(ValueError, match="group_size=7 must divide"):
        gptq.apply(make(), text(), GPTQConfig(QuantConfig(3, group_size=7)))
    with pytest.raises(ValueError, match="batches is empty"):
        gptq.apply(make(), [], CONFIG)
    for bad in ({"damping": -0.1}, {"damping": float("nan")}, {"block_size": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GPTQConfig(**bad)
    with pytest.raises(ValueError, match="per='tensor'"):
        GPTQConfig(QuantConfig(per="tensor"))


# On the real model --------------------------------------------------------------------


def test_what_the_sweep_measured_is_told_apart_from_noise():
    """Calibrated on its kind of text, GPTQ gains more than five standard errors."""
    with gptq.FILE.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    keys = [
        tuple(run[k] for k in ("method", "bits", "text", "tokens", "seed"))
        for run in runs
    ]
    assert len(set(keys)) == len(keys)
    kind = ("act-order", "addresses")
    best = [run for run in runs if (run["method"], run["text"]) == kind]
    assert len(best) >= 2
    for run in best:
        assert float(run["gained"]) > 5 * float(run["gained_error"])


@pytest.mark.real_model
@pytest.mark.slow
def test_error_feedback_beats_rounding_on_text_that_it_did_not_see():
    from llmlab.models import course_model, real_model

    real_model.fetch(quiet=True)
    model = real_model.load()
    encode = real_model.load_tokenizer().encode
    train, other = (
        torch.tensor(encode(course_model.corpus("addresses", split)[:20_000]).ids)
        for split in ("train", "valid")
    )
    block = next(iter(calibration.blocks(model).values()))
    up = {"mlp.up_proj": block.get_submodule("mlp.up_proj")}

    def gram(batches):
        calls = calibration.first_calls(model, batches)
        seen = calibration.collect(up, lambda: calibration.next_calls(block, calls))
        return seen["mlp.up_proj"].gram

    W = up["mlp.up_proj"].weight.detach()
    grid = QuantConfig(3, group_size=64)
    known = gram(calibration.sample(train, 128, 8))
    found = gptq.gptq(W, known, GPTQConfig(grid, act_order=True)).weight
    judge = gram([other[None, :512]])
    error = gptq.output_error(W, found, judge)
    assert error < 0.7 * gptq.output_error(W, gptq.nearest(W, grid), judge)
