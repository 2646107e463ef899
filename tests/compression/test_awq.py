"""AWQ: against closed forms, brute force, the authors' code and llmcompressor.

`awq_goldens.py` and `awq_authors_goldens.py` of `scripts/golden` made the files. Every
trial of every seam is compared, not only the best.
"""

from __future__ import annotations

import csv
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from llmlab.compression import awq, calibration, folding
from llmlab.compression import quantization_basics as qb
from llmlab.compression.awq import AWQConfig
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models.llama import Llama, LlamaConfig
from tests.compression.broken import no_input, not_finite, with_adapter
from tests.models.hugging_face import make, named, theirs

GOLDEN = Path(__file__).parent / "golden"
GROUPS = QuantConfig(3, group_size=4, scale_dtype=torch.float32)
ROWS = QuantConfig(3, per="row", scale_dtype=torch.float32)
AFFINE = QuantConfig(4, False, group_size=8, scale_dtype=torch.float32)
CONFIG = AWQConfig(QuantConfig(3, group_size=8, scale_dtype=torch.float32))


def problem(out=5, columns=12, tokens=40, seed=0):
    """W, and inputs X (in, tokens) of which two channels are large."""
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(columns, tokens, generator=random)
    X[3] *= 30
    X[7] *= 12
    return torch.randn(out, columns, generator=random), X


# Scales -------------------------------------------------------------------------------


def test_the_scale_is_the_papers_power_with_the_authors_normalisation():
    x_mean = torch.tensor([1.0, 4.0, 16.0, 0.25])
    s = awq.scale_of(x_mean, 0.5)
    # 1, 2, 4, ½ by √(4 · ½)
    expected = torch.tensor([1.0, 2.0, 4.0, 0.5]) / 2**0.5
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0))
    assert torch.equal(awq.scale_of(x_mean, 0.0), torch.ones(4))
    ratio = awq.scale_of(x_mean, 1.0) / x_mean
    torch.testing.assert_close(ratio, ratio[:1].expand(4))


def test_a_dead_channel_has_a_scale():
    s = awq.scale_of(torch.tensor([0.0, 1.0]), 0.5)
    assert s.isfinite().all() and (s > 0).all()
    torch.testing.assert_close(s[1] / s[0], torch.tensor(1e4))


@pytest.mark.parametrize("grid", [GROUPS, ROWS, QuantConfig(4, False, group_size=6)])
def test_a_factor_that_all_channels_share_changes_no_code(grid):
    W, X = problem()
    s = awq.scale_of(X.abs().mean(1), 0.5)
    once, _, _ = qb.encode(W * s, grid)
    twice, _, _ = qb.encode(W * s * 4, grid)
    assert torch.equal(once, twice)
    torch.testing.assert_close(
        awq.scaled_nearest(W, torch.full((12,), 0.5), grid), awq.nearest(W, grid)
    )


def test_a_factor_of_a_row_changes_no_code():
    """So what is folded into the rows of v or up does not undo their own search."""
    W, _ = problem()
    rows = 2.0 ** torch.arange(-2, 3)[:, None]
    torch.testing.assert_close(
        awq.nearest(W * rows, GROUPS), awq.nearest(W, GROUPS) * rows
    )


def test_a_scaled_weight_loses_at_most_half_a_step_by_s():
    """Equation 3 of the paper, where the group's largest weight is another one."""
    W = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    W[:, 0] = 3.0  # Δ = 1 at 3 bits, as long as s · w ≤ 3
    for scale in (1.0, 2.0, 3.0):
        s = torch.ones(4)
        s[2] = scale
        error = (awq.scaled_nearest(W, s, ROWS) - W).abs()
        assert error[:, 2].max() <= 0.5 / scale + 1e-6
        assert error[:, 2].max() > 0.4 / scale
        assert error[:, 1].max() > 0.4  # a neighbour, as before


def test_beyond_the_largest_weight_the_others_pay():
    W = torch.tensor([[0.2, 0.9]])
    exact = awq.scaled_nearest(W, torch.tensor([8.0, 1.0]), ROWS)
    # the first weight sets the step now, 1.6 / 3, and 0.9 becomes two of it
    torch.testing.assert_close(exact, torch.tensor([[0.2, 3.2 / 3]]))


def test_the_mean_weight_is_taken_in_units_of_each_group():
    W = torch.tensor([[1.0, -2.0, 4.0, 3.0], [5.0, 5.0, 0.0, 8.0]])
    grid = QuantConfig(4, group_size=2)
    expected = torch.tensor([(0.5 + 1) / 2, 1.0, 0.5, (0.75 + 1) / 2])
    torch.testing.assert_close(awq.mean_weight([W], grid), expected)
    both = awq.mean_weight([W[:1], W[1:]], grid)
    torch.testing.assert_close(both, expected)


# Salient channels ---------------------------------------------------------------------


def test_protected_columns_stay_and_all_others_are_rounded():
    W, X = problem()
    kept = awq.salient(X.abs().mean(1), 2 / 12)
    assert set(kept.tolist()) == {3, 7}
    W_hat = awq.protect(W, kept, GROUPS)
    rounded = awq.nearest(W, GROUPS)
    for j in range(12):
        expected = W if j in (3, 7) else rounded
        assert torch.equal(W_hat[:, j], expected[:, j])


@pytest.mark.parametrize(("columns", "count"), [(576, 6), (1536, 15), (40, 1)])
def test_one_percent_is_at_least_one_column(columns, count):
    assert len(awq.salient(torch.rand(columns), 0.01)) == count


def test_protected_columns_cost_sixteen_bits():
    grid = QuantConfig(3, group_size=64)
    assert awq.bits_with_protected(grid, 0.01) == pytest.approx(3.25 * 0.99 + 0.16)
    with pytest.raises(ValueError, match="share=0"):
        awq.salient(torch.ones(4), 0)


# The search ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GROUPS, ROWS, AFFINE])
def test_the_search_is_brute_force_over_alpha(grid):
    columns = 16 if grid is AFFINE else 12
    W, X = problem(columns=columns, seed=2)
    right = W @ X

    def error(s):
        return (awq.scaled_nearest(W, s, grid) @ X - right).square().sum().item()

    config = AWQConfig(grid)
    found = awq.search(X.abs().mean(1), error, config)
    brute = []
    for i in range(20):
        s = X.abs().mean(1) ** (i / 20)  # not normalised: that changes nothing
        rounded = awq.nearest(W @ s.diag(), grid) @ (1 / s).diag()
        brute.append((rounded @ X - right).square().sum().item())
    assert found.alpha == brute.index(min(brute)) / 20 > 0
    torch.testing.assert_close(found.errors, brute, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.scale, awq.scale_of(X.abs().mean(1), found.alpha))


def test_of_equal_errors_the_first_wins_and_nan_never_does():
    x_mean = torch.tensor([1.0, 2.0])
    config = AWQConfig(GROUPS, alphas=(0.0, 0.5, 1.0))
    assert awq.search(x_mean, lambda s: 1.0, config).alpha == 0.0
    errors = iter([float("nan"), 2.0, 1.0])
    assert awq.search(x_mean, lambda s: next(errors), config).alpha == 1.0
    with pytest.raises(ValueError, match="finite"):
        awq.search(x_mean, lambda s: float("nan"), config)
    with pytest.raises(ValueError, match="always 0"):
        awq.search(torch.zeros(2), lambda s: 1.0, config)


@pytest.mark.parametrize("grid", [GROUPS, ROWS, QuantConfig(3, False, group_size=6)])
def test_clipping_is_brute_force_over_limits(grid):
    W, X = problem(seed=4)
    limits = awq.clip_limits(W, X @ X.T, grid)
    size = 12 // limits.shape[1]
    for row in range(5):
        for g in range(limits.shape[1]):
            run = slice(g * size, (g + 1) * size)
            w, x = W[row : row + 1, run], X[run]
            errors = []
            for i in range(10):
                limit = w.abs().max() * (1 - i / 20)
                cut = awq.nearest(
                    w.clamp(-limit, limit),
                    QuantConfig(
                        3, grid.symmetric, per="row", scale_dtype=grid.scale_dtype
                    ),
                )
                errors.append(((cut - w) @ x).square().sum().item())
            best = errors.index(min(errors))
            expected = w.abs().max() * (1 - best / 20)
            torch.testing.assert_close(limits[row, g, 0], expected)
    assert (limits < awq.in_groups(W, grid).abs().amax(-1, keepdim=True)).any()
    cut = awq.clipped(W, limits, grid)
    assert (awq.in_groups(cut, grid).abs() <= limits).all()
    assert torch.equal(cut.sign(), W.sign())


# The authors' code and llmcompressor --------------------------------------------------


@cache
def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def llama(stored, prefix, **shape):
    model = Llama(LlamaConfig(vocab_size=61, num_attention_heads=4, **shape)).eval()
    state = {
        name.removeprefix(prefix): t.float()
        for name, t in stored.items()
        if name.startswith(prefix)
    }
    model.load_state_dict(state)
    return model


def part(stored, prefix):
    return {
        n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)
    }


def test_the_authors_code_finds_the_same_scales_and_limits():
    stored = golden("awq_authors")
    model = llama(
        stored, "base/", hidden_size=64, intermediate_size=128, num_hidden_layers=1
    )
    grid = QuantConfig(4, False, group_size=32, scale_dtype=torch.float32)
    calls = calibration.first_calls(model, [stored["tokens"]])
    block = model.model.layers[0]
    searched = awq.search_block(block, calls, AWQConfig(grid, clip=True))
    scales = part(stored, "scale/")
    assert set(searched.found) == set(scales)
    for place, scale in scales.items():
        torch.testing.assert_close(searched.found[place].scale, scale)
        assert searched.found[place].alpha > 0
    folded = awq.fold_block(block, searched, AWQConfig(grid))
    both = awq.fold_block(block, searched, AWQConfig(grid, clip=True))
    limits = part(stored, "limits/")
    assert set(limits) == set(searched.inputs) - {
        "self_attn.q_proj",
        "self_attn.k_proj",
    }
    for name in searched.inputs:
        weight = folded.get_submodule(name).weight
        if name in limits:
            weight = awq.clipped(weight, limits[name], grid)
        # a tie may go to another limit: their sums are in another order
        off = (both.get_submodule(name).weight - weight).abs() > 1e-5
        assert off.float().mean() < 0.01


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_llmcompressor_finds_the_same_scales_by_the_same_errors(shape, duo):
    stored = golden("awq")
    heads, layers = (4, 1) if shape == "mha" else (2, 2)
    model = llama(
        stored,
        f"{shape}/base/",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_key_value_heads=heads,
    )
    steps = 18 if duo else 19  # their grid: 20 trials, one of them without scales
    alphas = tuple(i / steps for i in range(steps + 1))
    config = AWQConfig(AFFINE, alphas, duo)
    batches = [row[None] for row in stored["tokens"]]
    blocks, found = awq.folded_blocks(model, batches, config)
    key = f"{shape}/{'duo' if duo else 'plain'}"
    scales = part(stored, f"{key}/scale/")
    assert set(found) == set(scales) and len(scales) == (4 if shape == "mha" else 6)
    for place, scale in scales.items():
        torch.testing.assert_close(found[place].scale, scale)
        errors = stored[f"{key}/errors/{place}"]
        ours = torch.tensor(found[place].errors)
        # ours are shares of the outputs' squares, theirs are means
        torch.testing.assert_close(
            ours / ours[0], errors / errors[0], rtol=0.01, atol=1e-3
        )
    for name, weight in part(stored, f"{key}/after/model.layers.0.").items():
        ours = blocks["model.layers.0"].get_parameter(name)
        torch.testing.assert_close(ours, weight, rtol=1e-5, atol=1e-6)


# One block ----------------------------------------------------------------------------

VARIANTS = [
    {},
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 14, "intermediate_size": 56, "num_key_value_heads": 2},
]


def text(seed=0, rows=2, length=24):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (rows, length), generator=random) for _ in range(2)]


def loud(**changes):
    """A small model whose norms make some channels large."""
    model = make(**changes)
    for name, p in model.named_parameters():
        if "layernorm" in name:
            p.data = (2 * torch.randn(p.shape)).exp()
    return model


@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm"])
def test_the_outputs_of_attention_and_mlp_are_the_judges(place):
    """Brute force: a copy of the block with weights put in, run as a whole."""
    model = loud(num_key_value_heads=2)
    calls = calibration.first_calls(model, text())
    block = model.model.layers[0]
    searched = awq.search_block(block, calls, CONFIG)
    seam = next(s for s in folding.seams(block) if s.before == place)
    name = awq.judge_of(seam)
    assert name == ("self_attn" if place == "input_layernorm" else "mlp")
    norm = block.get_submodule(place)
    size = searched.inputs[seam.after[0]].absmean
    for i in (0, 7, 13):
        s = awq.scale_of(size, CONFIG.alphas[i])
        copy = deepcopy(block)
        for linear in seam.after:
            weight = copy.get_submodule(linear).weight
            weight.data = awq.nearest(weight.data * s, CONFIG.grid)
        copy.get_submodule(place).weight.data /= s
        lost = whole = 0.0
        outputs = []
        for part_ in (block, copy):
            kept = []
            hook = part_.get_submodule(name).register_forward_hook(
                lambda module, args, out, kept=kept: kept.append(out.detach())
            )
            for args, kwargs in calls:
                part_(*args, **kwargs)
            hook.remove()
            outputs.append(kept)
        for right, got in zip(*outputs, strict=True):
            lost += (got - right).square().sum().item()
            whole += right.square().sum().item()
        assert searched.found[place].errors[i] == pytest.approx(lost / whole, rel=0.02)
    assert norm.weight.shape == searched.found[place].scale.shape


def test_a_search_changes_nothing():
    model = loud()
    before = deepcopy(model.state_dict())
    calls = calibration.first_calls(model, text())
    config = AWQConfig(CONFIG.grid, clip=True)
    searched = awq.search_block(model.model.layers[0], calls, config)
    awq.fold_block(model.model.layers[0], searched, config)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_folded_block_computes_what_it_computed():
    model = loud()
    calls = calibration.first_calls(model, text())
    block = model.model.layers[0]
    searched = awq.search_block(block, calls, CONFIG)
    assert max(f.alpha for f in searched.found.values()) > 0
    folded = awq.fold_block(block, searched, CONFIG)
    for (right, *_), (got, *_) in zip(
        (args for args, _ in calibration.next_calls(block, calls)),
        (args for args, _ in calibration.next_calls(folded, calls)),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_some_batches_judge_and_all_of_them_give_the_mean():
    model = loud()
    one = AWQConfig(CONFIG.grid, trial_batches=1)
    calls = calibration.first_calls(model, text())
    block = model.model.layers[0]
    with_one = awq.search_block(block, calls, one)
    with_all = awq.search_block(block, calls, CONFIG)
    alone = awq.search_block(block, calls[:1], CONFIG)
    place = "mlp.up_proj"
    means = [s.inputs["mlp.down_proj"].absmean for s in (with_one, with_all, alone)]
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])
    # without a scale the mean plays no part
    assert with_one.found[place].errors[0] == alone.found[place].errors[0]
    assert with_one.found[place].errors[0] != with_all.found[place].errors[0]


# On models ----------------------------------------------------------------------------


def logits(model):
    out = model(text()[0])
    return getattr(out, "logits", out).detach()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ours_and_transformers_get_the_same_weights(changes):
    model = loud(**changes)
    library = theirs(model)
    head = model.lm_head.weight.clone()
    mine = awq.apply(model, text(), CONFIG, floats=True)
    others = awq.apply(library, text(), CONFIG, floats=True)
    assert {n: f.alpha for n, f in mine.items()} == {
        n: f.alpha for n, f in others.items()
    }
    with_o = model.config.num_key_value_heads == 4
    assert len(mine) == 2 * (4 if with_o else 3)
    for name, weight in library.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], weight, atol=1e-4, rtol=1e-3
        )
    assert torch.equal(model.lm_head.weight, head)
    for linear in qb.linears(model).values():
        groups = linear.weight.unflatten(1, (-1, 8))
        assert groups[0, 0].unique().numel() <= 7


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("library", [False, True])
def test_codes_give_the_outputs_of_floats_and_go_to_disk_and_back(
    library, symmetric, tmp_path
):
    grid = QuantConfig(3, symmetric, group_size=8)
    model = loud(num_key_value_heads=2, tie_word_embeddings=True, mlp_bias=True)
    model = theirs(model) if library else model
    fresh = deepcopy(model)
    for p in fresh.parameters():
        torch.nn.init.normal_(p)
    floats = deepcopy(model)
    awq.apply(model, text(), AWQConfig(grid))
    awq.apply(floats, text(), AWQConfig(grid), floats=True)
    torch.testing.assert_close(logits(model), logits(floats), rtol=1e-4, atol=1e-4)
    assert isinstance(model.model.layers[1].mlp.up_proj, qb.QuantLinear)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    qb.apply(fresh, grid)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ValueError, match="compressed already"):
        awq.apply(model, text(), AWQConfig(grid))


def test_loud_channels_lose_less_than_by_rounding():
    """On three models; and clipping leaves the sum over its trials no worse."""
    for seed in range(3):
        model = loud(seed=seed)
        right = logits(model)
        rounded = qb.round_weights(deepcopy(model), CONFIG.grid)
        with_scales = deepcopy(model)
        awq.apply(with_scales, text(), CONFIG, floats=True)
        error = F.mse_loss(logits(with_scales), right)
        assert error < 0.9 * F.mse_loss(logits(rounded), right)


def test_alpha_zero_is_round_to_nearest():
    model = loud()
    rounded = qb.round_weights(deepcopy(model), CONFIG.grid)
    awq.apply(model, text(), AWQConfig(CONFIG.grid, alphas=(0.0,)), floats=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, rounded.state_dict()[name])


def test_what_is_skipped_is_folded_and_not_rounded():
    model = loud()
    before = deepcopy(model.state_dict())
    skip = ("lm_head", "v_proj", "down_proj")
    found = awq.apply(model, text(), CONFIG, skip=skip, floats=True)
    assert not any(name.endswith("up_proj") for name in found)
    for i in range(2):
        prefix = f"model.layers.{i}"
        s = found[f"{prefix}.input_layernorm"].scale
        o = found[f"{prefix}.self_attn.v_proj"].scale
        v = before[f"{prefix}.self_attn.v_proj.weight"] * s / o[:, None]
        layer = model.model.layers[i]
        torch.testing.assert_close(layer.self_attn.v_proj.weight.data, v)
        down = before[f"{prefix}.mlp.down_proj.weight"]
        assert torch.equal(layer.mlp.down_proj.weight, down)


def test_half_precision_in_and_out():
    model = loud().to(torch.bfloat16)
    awq.apply(model, text(), AWQConfig(CONFIG.grid, clip=True), floats=True)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert weight.unflatten(1, (-1, 8))[0, 0].unique().numel() <= 7
    assert logits(model).isfinite().all()


# What is refused ----------------------------------------------------------------------


def odd_width(model):
    return make(intermediate_size=44)


def other_names(model):
    return nn.Sequential(nn.Embedding(61, 8), Layers())


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


BAD_MODELS = [
    (with_adapter, "carries an adapter: merge it"),
    (not_finite, "layers.1.mlp.down_proj.weight holds 1 values"),
    (no_input, "layers.1.mlp.gate_proj: its input is always 0"),
    (odd_width, "group_size=8 must divide"),
    (other_names, "has no input_layernorm"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODELS, ids=named)
def test_a_model_that_cannot_be_quantised_stays_as_it_was(spoil, message):
    model = spoil(make()).train()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        awq.apply(model, text(), CONFIG)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    hooks = [m._forward_pre_hooks or m._forward_hooks for m in model.modules()]
    assert model.training and not any(hooks)


def test_a_weight_that_does_not_fit_its_dtype_is_named():
    block = make().half().model.layers[0]
    seam = folding.seams(block)[0]
    s = torch.ones(32)
    s[3] = 1e7
    found = {seam.before: awq.Found(s, 0.5, [])}
    with pytest.raises(ValueError, match="weight would not be finite in"):
        awq.fold_block(block, awq.SearchedBlock({}, found), CONFIG)


def test_bad_arguments_are_named():
    for bad in (
        {"alphas": ()},
        {"alphas": (0.5, 1.5)},
        {"alphas": (float("nan"),)},
        {"trial_batches": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AWQConfig(**bad)
    with pytest.raises(ValueError, match="per='tensor'"):
        AWQConfig(QuantConfig(per="tensor"))
    with pytest.raises(ValueError, match="batches is empty"):
        awq.apply(make(), [], CONFIG)


# On the real model --------------------------------------------------------------------


def runs(method, text, bits="4"):
    """(gained, its standard error) of each seed, in groups of 64."""
    with awq.FILE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    keys = [tuple(line[k] for k in list(line)[:6]) for line in lines]
    assert len(set(keys)) == len(keys)
    key = (method, bits, "group", text)
    found = [
        (float(line["gained"]), float(line["gained_error"]))
        for line in lines
        if tuple(line[k] for k in ("method", "bits", "per", "text")) == key
    ]
    assert found
    return found


def test_what_the_sweep_measured_is_told_apart_from_noise():
    """In 4 bits, which columns are kept decides, and scales gain without a bit."""
    for bits in ("3", "4"):
        for gained, error in runs("1% by x", "addresses", bits):
            assert gained > 8 * error
            others = runs("1% random", "", bits) + runs("1% by w", "", bits)
            assert all(gained > 5 * abs(other) for other, _ in others)
    for text_ in ("addresses", "bible"):
        for gained, error in runs("AWQ", text_):
            assert gained > 4 * error


@pytest.mark.real_model
@pytest.mark.slow
def test_the_inputs_say_which_columns_matter():
    """On a layer of the real model, judged by text that nobody calibrated on."""
    from llmlab.models import course_model, real_model

    real_model.fetch(quiet=True)
    model = real_model.load()
    encode = real_model.load_tokenizer().encode
    train, other = (
        torch.tensor(encode(course_model.corpus("addresses", split)[:9_000]).ids)[:512]
        for split in ("train", "valid")
    )
    *before, block = list(calibration.blocks(model).values())[:16]
    linear = {"q": block.get_submodule("self_attn.q_proj")}

    def read(ids):
        calls = calibration.first_calls(model, [ids[None]])
        for earlier in before:
            calls = calibration.next_calls(earlier, calls)
        run = partial(calibration.next_calls, block, calls)
        return calibration.collect(linear, run)["q"]

    W = linear["q"].weight.detach()
    grid = QuantConfig(4, group_size=64)
    x_mean, gram = read(train).absmean, read(other).gram

    def error(W_hat):
        return (((W_hat - W) @ gram) * (W_hat - W)).sum()

    rounded = error(awq.nearest(W, grid))
    by_inputs = error(awq.protect(W, awq.salient(x_mean), grid))
    by_weights = error(awq.protect(W, awq.salient(W.square().sum(0)), grid))
    scaled = error(awq.scaled_nearest(W, awq.scale_of(x_mean, 0.4), grid))
    assert by_inputs < 0.4 * rounded < 0.9 * rounded < by_weights
    assert scaled < 0.5 * rounded
