"""LoRAPrune: against a step of SGD, against autograd, on our model and transformers'.

The oracles: what SGD does to W₀ + s B A, done by torch's optimiser; the gradient of W₀
itself, by autograd; the expectation over A, by drawing it often; a model whose rows and
columns are cut in a test's own words; and the `peft` library.
"""

from __future__ import annotations

import csv
import itertools
import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.compression import dependencies, loraprune
from llmlab.compression.loraprune import LoRAPruneConfig, Pruner
from llmlab.models import accounting
from llmlab.peft import lora
from tests.models.hugging_face import make, named, theirs

GQA = {"num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 35}
VARIANTS = {
    "gqa, odd widths": GQA,
    "tied head": GQA | {"tie_word_embeddings": True},
    "biases": GQA | {"attention_bias": True, "mlp_bias": True},
    "plain": {},
}
TOKENS = torch.tensor([[3, 9, 27, 20, 60, 58, 2], [1, 1, 2, 3, 5, 8, 13]])


def factors(d=5, k=7, r=3, seed=0):
    """W, A, B, G of unequal sizes, in float64."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return draw(d, k), draw(r, k), draw(d, r), draw(d, k)


def adapted(model, r=3, alpha=5, seed=0, grown=True, targets="all-linear", **changes):
    """LoRA on a model; `grown`: with a B that is not 0."""
    config = lora.LoRAConfig(r=r, alpha=alpha, target_modules=targets, **changes)
    random = torch.Generator().manual_seed(seed)
    lora.apply(model, config, generator=random)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and grown:
                p.copy_(0.1 * torch.randn(p.shape, generator=random))
    return model


def backward(model):
    """The gradients of one batch."""
    model.zero_grad()
    out = model(TOKENS)
    logits = getattr(out, "logits", out)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()


# The estimate -------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1.0, 0.1, 3e-4])
@pytest.mark.parametrize("scaling", [1.0, 0.4, 2.0])
def test_the_estimate_is_what_a_step_of_sgd_takes_off_w(lr, scaling):
    W, A, B, G = factors()
    A.requires_grad_(True)
    B.requires_grad_(True)
    before = W + scaling * (B @ A).detach()
    ((W + scaling * B @ A) * G).sum().backward()
    grad_A, grad_B = A.grad.clone(), B.grad.clone()
    found = loraprune.estimated_gradient(
        A.detach(), B.detach(), grad_A, grad_B, scaling, lr
    )
    torch.optim.SGD([A, B], lr=lr).step()
    after = (W + scaling * B @ A).detach()
    torch.testing.assert_close(found, (before - after) / lr)


def test_the_estimate_in_terms_of_the_gradient_that_nobody_computes():
    _, A, B, G = factors()
    s, lr = 0.7, 0.3
    grad_A, grad_B = s * B.T @ G, s * G @ A.T
    found = loraprune.estimated_gradient(A, B, grad_A, grad_B, s, lr)
    right = s**2 * (G @ A.T @ A + B @ B.T @ G) - lr * s**3 * G @ A.T @ B.T @ G
    torch.testing.assert_close(found, right)


def test_the_estimate_is_the_gradient_where_nothing_is_projected_away():
    _, _, _, G = factors()
    A = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]  # r = k, orthogonal
    B = torch.zeros(5, 7, dtype=torch.float64)
    found = loraprune.estimated_gradient(A, B, B.T @ G, G @ A.T)
    torch.testing.assert_close(found, G)
    A = torch.zeros(5, 7, dtype=torch.float64)
    B = torch.eye(5, dtype=torch.float64)
    found = loraprune.estimated_gradient(A, B, B.T @ G, G @ A.T)
    torch.testing.assert_close(found, G)


def test_at_the_start_the_rank_is_at_most_r():
    _, A, _, G = factors(d=6, k=9, r=2)
    B = torch.zeros(6, 2, dtype=torch.float64)
    found = loraprune.estimated_gradient(A, B, B.T @ G, G @ A.T)
    assert torch.linalg.matrix_rank(found) == 2
    torch.testing.assert_close(found, G @ A.T @ A)
    _, A, B, G = factors(d=6, k=9, r=2)
    found = loraprune.estimated_gradient(A, B, B.T @ G, G @ A.T)
    assert torch.linalg.matrix_rank(found) == 4  # 2 r, once B has grown


@pytest.mark.parametrize("r", [1, 4])
def test_the_mean_over_draws_of_a(r):
    _, _, _, G = factors(d=3, k=6)
    draws = 60_000
    random = torch.Generator().manual_seed(1)
    A = torch.rand(draws, r, 6, generator=random, dtype=torch.float64) * 2 - 1
    estimate = G @ A.mT @ A
    sigma = 1 / 3**0.5
    found = estimate.square().mean(0) / (r * sigma**4)
    right = loraprune.expected_square(G, r)
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.05)
    # The estimate itself is right on average, but for a factor.
    torch.testing.assert_close(estimate.mean(0) / (r * sigma**2), G, rtol=0, atol=0.08)


def test_rows_are_ranked_at_the_start_and_columns_are_not():
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    rows, columns = [], []
    for _ in range(10):
        W = draw(128, 128)
        # rows and columns of G differ in size as those of real gradients do
        G = draw(128, 128) * draw(128, 1).exp() * draw(1, 128).exp()
        A = draw(8, 128)
        found = loraprune.weight_importance(W, G @ A.T @ A)
        right = loraprune.weight_importance(W, G)
        each = [loraprune.rank_correlation(found.sum(i), right.sum(i)) for i in (1, 0)]
        rows.append(each[0])
        columns.append(each[1])
    assert sum(rows) / 10 > 0.75
    assert abs(sum(columns) / 10) < 0.25


# Scores -------------------------------------------------------------------------------


def test_importance_is_the_square_of_the_first_order_change():
    W, _, _, G = factors()
    found = loraprune.weight_importance(W, G)
    for i, j in ((0, 0), (4, 6), (2, 3)):
        without = W.clone()
        without[i, j] = 0
        change = (G * (without - W)).sum()  # of a loss that is linear in W
        torch.testing.assert_close(found[i, j], change.square())
    torch.testing.assert_close(loraprune.weight_importance(W, G, 1), found.sqrt())


def test_by_unit_gathers_what_belongs_together():
    values = torch.arange(24.0).reshape(4, 6)
    index = torch.tensor([[0, 1], [2, 3]])
    found = loraprune.by_unit(values, 0, index)
    assert found.tolist() == [values[:2].sum().item(), values[2:].sum().item()]
    index = torch.tensor([[0, 5], [1, 2], [3, 4]])  # units need not be neighbours
    found = loraprune.by_unit(values, 1, index)
    right = [values[:, i].sum().item() for i in ([0, 5], [1, 2], [3, 4])]
    assert found.tolist() == right


def test_the_moving_average_forgets_geometrically():
    new = [torch.randn(4) for _ in range(5)]
    average = None
    for each in new:
        average = loraprune.moving_average(average, each, 0.8)
    right = sum(0.2 * 0.8 ** (4 - i) * each for i, each in enumerate(new))
    torch.testing.assert_close(average, right)
    assert torch.equal(loraprune.moving_average(new[0], new[1], 0.0), new[1])


def test_the_schedule_has_its_ends_and_is_a_cubic_between():
    of = {"steps": 100, "warmup": 0.1, "cooldown": 0.2, "final": 0.5}
    shares = [loraprune.share_pruned(step, **of) for step in range(1, 101)]
    assert shares[:10] == [0.0] * 10 and shares[10] > 0
    assert shares[78] < 0.5 and shares[79:] == [0.5] * 21
    assert shares == sorted(shares)
    middle = loraprune.share_pruned(45, **of)  # half of the way from 10 to 80
    assert middle == pytest.approx(0.5 * (1 - 0.5**3))
    growth = [b - a for a, b in itertools.pairwise(shares[9:80])]
    assert growth == sorted(growth, reverse=True)  # fast first
    at_once = {"steps": 7, "final": 0.3}
    first = [loraprune.share_pruned(s, warmup=0, cooldown=1, **at_once) for s in (1, 7)]
    last = [loraprune.share_pruned(s, warmup=1, cooldown=0, **at_once) for s in (6, 7)]
    assert first == [0.3, 0.3] and last == [0.0, 0.3]


def test_the_schedule_is_the_authors_up_to_where_theirs_stops():
    """schedule_sparsity_ratio of their utils.py, with warm-up and cool-down of 0.1."""
    for step in range(101, 900, 37):
        left = 1 - (step - 100) / (1000 - 200)
        theirs = 0.5 + (0 - 0.5) * left**3
        found = loraprune.share_pruned(step, 1000, 0.1, 0.1, 0.5)
        assert found == pytest.approx(theirs)


def test_how_many_units_a_share_is():
    assert loraprune.units_pruned(100, 0.29) == 29  # 100 · 0.29 = 28.999…
    assert loraprune.units_pruned(3, 0.2) == 0
    assert loraprune.units_pruned(32, 0.5) == 16
    assert loraprune.units_pruned(32, 0.4999) == 15


def test_prune_to_takes_the_lowest_and_gives_nothing_back():
    average = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])
    kept = torch.ones(5, dtype=torch.bool)
    once = loraprune.prune_to(average, kept, 1)
    assert once.tolist() == [True, False, True, True, True]  # of equal ones the first
    rising = torch.tensor([3.0, 9.0, 2.0, 1.0, 5.0])  # what is gone now looks good
    twice = loraprune.prune_to(rising, once, 3)
    assert twice.tolist() == [True, False, False, False, True]
    assert torch.equal(loraprune.prune_to(rising, twice, 1), twice)
    assert kept.all()


def test_the_mask_is_on_both_parts():
    W, A, B, _ = factors()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    mask = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)
    found = loraprune.masked_linear(x, W, A, B, 0.4, mask)
    merged = (W + 0.4 * B @ A) * mask[:, None]
    torch.testing.assert_close(found, F.linear(x, merged))
    B.requires_grad_(True)
    loraprune.masked_linear(x, W, A, B, 0.4, mask).sum().backward()
    assert not B.grad[mask == 0].any() and B.grad[mask == 1].all()


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(50), torch.randn(50)
    b += a
    right = stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert loraprune.rank_correlation(a, b) == pytest.approx(right)
    assert loraprune.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert loraprune.overlap(a, -a, 25) == 0
    assert loraprune.overlap(torch.arange(9.0), torch.arange(9.0).roll(1), 3) == 2 / 3


def test_bytes_are_counted_as_a_model_has_them():
    model = make(**GQA)
    weights = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    count = sum(p.numel() for p in weights)
    assert loraprune.gradient_bytes(model.config, size=4) == 4 * count
    everywhere = lora.LoRAConfig(r=3, target_modules=r".*_proj")
    count = lora.num_parameters(model, everywhere)
    assert loraprune.gradient_bytes(model.config, r=3) == 2 * count


# A whole model ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_a_model_are_sums_over_its_weights(variant):
    model = make(**VARIANTS[variant])
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    backward(model)
    found = {
        name: loraprune.importance(
            loraprune.adapters(model), group, LoRAPruneConfig(lr=0.5)
        )
        for name, group in groups.items()
    }
    config = model.config
    for layer in range(config.num_hidden_layers):
        total = {"self_attn": 0, "mlp": 0}
        for name in accounting.linear_shapes(config):
            wrapper = model.get_submodule(f"model.layers.{layer}.{name}")
            A, B = wrapper.lora_A["default"], wrapper.lora_B["default"]
            s = 5 / 3
            estimate = s * (B.grad @ A + B @ A.grad - 0.5 * B.grad @ A.grad)
            scores = (estimate * (wrapper.base.weight + s * B @ A)).square()
            part = name.split(".")[0]
            units = config.num_key_value_heads
            if part == "mlp":
                units = config.intermediate_size
            if name.endswith(("o_proj", "down_proj")):
                scores = scores.T
            total[part] = total[part] + scores.reshape(units, -1).sum(1).detach()
        for part, right in total.items():
            torch.testing.assert_close(found[f"model.layers.{layer}.{part}"], right)


def test_full_gradients_are_those_of_autograd_and_magnitude_asks_for_none():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    plain = deepcopy(model)
    lora.merge_and_unload(plain)
    plain.requires_grad_(True)
    backward(plain)
    for adapter in loraprune.adapters(model).values():
        adapter.base.weight.requires_grad_(True)
    backward(model)
    name = "model.layers.1.mlp"
    read = loraprune.adapters(model)
    found = loraprune.importance(read, groups[name], LoRAPruneConfig(criterion="full"))
    size = loraprune.importance(
        read, groups[name], LoRAPruneConfig(criterion="magnitude")
    )
    mlp = plain.get_submodule(name)
    right, squares = 0, 0
    for linear, axis in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0)):
        W = linear.weight.detach()
        right = right + (linear.weight.grad * W).square().sum(axis)
        squares = squares + W.square().sum(axis)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(size, squares)


def test_only_the_gradients_of_a_and_b_are_asked_for():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    backward(model)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name)
    Pruner(model, groups, LoRAPruneConfig()).step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_model_is_the_cut_one(variant):
    model = make(**VARIANTS[variant])
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    config = LoRAPruneConfig(0.5, steps=1, warmup=0, cooldown=1, every=1)
    pruner = Pruner(model, groups, config)
    backward(model)
    whole = model(TOKENS)
    pruner.step()
    masked = model(TOKENS)
    assert not torch.allclose(masked, whole, atol=1e-2)
    units = {name: int(kept.sum()) for name, kept in pruner.kept.items()}
    f, heads = model.config.intermediate_size, model.config.num_key_value_heads
    for name, left in units.items():
        total = f if name.endswith("mlp") else heads
        assert left == total - total // 2
    pruner.remove()
    torch.testing.assert_close(model(TOKENS), whole)
    small = loraprune.finish(model, groups, pruner.kept)
    torch.testing.assert_close(small(TOKENS), masked, atol=2e-5, rtol=1e-4)
    left = {type(m).__name__ for m in small.modules()}
    assert "LoRALinear" not in left
    assert not any("lora" in name for name in small.state_dict())
    assert small.model.layers[0].mlp.gate_proj.weight.shape[0] == f - f // 2
    assert small.config.intermediate_size == f - f // 2
    if model.config.tie_word_embeddings:
        assert small.lm_head.weight is small.model.embed_tokens.weight


def test_masked_units_get_no_gradient_and_so_score_nothing():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    config = LoRAPruneConfig(0.5, steps=1, warmup=0, cooldown=1, every=1, lr=0)
    pruner = Pruner(model, groups, config)
    backward(model)
    pruner.step()
    backward(model)
    for name, group in groups.items():
        kept = pruner.kept[name]
        for linear, member in loraprune.weights_of(group, columns=False).items():
            gone = member.index[~kept].flatten()
            grad = model.get_submodule(linear).lora_B["default"].grad
            assert not grad[gone].any() and grad.any()


@pytest.mark.parametrize("every", [1, 3, 20])
def test_progressive_pruning_ends_at_the_final_share_exactly(every):
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model, grown=False)
    config = LoRAPruneConfig(0.4, steps=11, warmup=0.2, cooldown=0.3, every=every)
    pruner = Pruner(model, groups, config)
    seen = []
    for _ in range(config.steps):
        backward(model)
        pruner.step()
        seen.append(35 - int(pruner.kept["model.layers.0.mlp"].sum()))
    assert seen == sorted(seen) and seen[0] == 0
    assert seen[-1] == 14  # ⌊35 · 0.4⌋
    assert int(pruner.kept["model.layers.0.self_attn"].sum()) == 2  # ⌊2 · 0.4⌋ = 0
    if every == 1:
        assert len(set(seen)) > 4
        assert seen[7] == 14  # where the cool-down begins


def test_apply_trains_prunes_merges_and_cuts():
    model = make(**GQA)
    before = deepcopy(model)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model, grown=False)
    A_and_B = [p for p in model.parameters() if p.requires_grad]
    config = LoRAPruneConfig(0.5, steps=6, every=2)
    optimizer = torch.optim.AdamW(A_and_B, lr=0.01)
    small = loraprune.apply(model, [TOKENS] * 9, config, groups, optimizer)
    assert small is model
    for layer in small.model.layers:
        assert layer.self_attn.q_proj.weight.shape == (2 * 6, 32)
        assert layer.self_attn.k_proj.weight.shape == (6, 32)
        assert layer.mlp.down_proj.weight.shape == (32, 18)
    # what the norms and the embedding are has not changed
    assert torch.equal(small.model.norm.weight, before.model.norm.weight)
    embeddings = [m.model.embed_tokens.weight for m in (small, before)]
    assert torch.equal(*embeddings)
    with torch.no_grad():
        assert small(TOKENS).isfinite().all()


def test_the_outer_layers_and_the_residual_stream_are_left_out():
    model = make(num_hidden_layers=11)
    names = {name.split(".")[2] for name in loraprune.prunable(model)}
    assert names == {str(i) for i in range(1, 10)}  # int(11 · 0.1) = 1, and the last
    groups = dependencies.groups(model)
    residual = set(groups) - set(loraprune.prunable(model, first=0, last=0))
    assert len(residual) == 1


def test_a_group_is_scored_by_the_linears_that_have_lora():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model, targets=("o_proj", "up_proj", "down_proj"))
    backward(model)
    name = "model.layers.0.mlp"
    read = loraprune.adapters(model)
    both = loraprune.importance(read, groups[name], LoRAPruneConfig())
    rows = loraprune.importance(read, groups[name], LoRAPruneConfig(columns=False))
    up, down = (read[f"{name}.{each}_proj"] for each in ("up", "down"))
    scores = [(a.gradient("", LoRAPruneConfig()) * a.weight) ** 2 for a in (up, down)]
    torch.testing.assert_close(rows, scores[0].sum(1).detach())
    torch.testing.assert_close(both, (scores[0].sum(1) + scores[1].sum(0)).detach())
    with pytest.raises(ValueError, match="self_attn has no linear with LoRA"):
        Pruner(model, groups, LoRAPruneConfig(columns=False))


def test_the_authors_code_adds_scores_of_length_one():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    backward(model)
    name = "model.layers.1.mlp"
    read = loraprune.adapters(model)
    config = LoRAPruneConfig(power=1, normalise=True)
    found = loraprune.importance(read, groups[name], config)
    right = 0
    for linear, axis in (("gate", 1), ("up", 1), ("down", 0)):
        wrapper = model.get_submodule(f"{name}.{linear}_proj")
        a, b = wrapper.lora_A["default"], wrapper.lora_B["default"]
        # compute_sensitivity of their utils.py, in which the scale is left out
        grad = b.grad @ a + b @ a.grad - b.grad @ a.grad
        s = (grad * (b @ a * 5 / 3 + wrapper.base.weight)).abs().sum(axis)
        right = right + s / (torch.linalg.norm(s) + 1e-8)
    torch.testing.assert_close(found, right.detach())


def test_half_precision_weights_are_scored_in_fp32():
    model = make(**GQA).bfloat16()
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    config = LoRAPruneConfig(0.5, steps=1, warmup=0, cooldown=1)
    pruner = Pruner(model, groups, config)
    backward(model)
    pruner.step()
    masked = model(TOKENS)
    pruner.remove()
    assert all(a.dtype == torch.float32 for a in pruner.average.values())
    small = loraprune.finish(model, groups, pruner.kept)
    found = small(TOKENS)
    assert found.dtype == torch.bfloat16
    assert small.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    error = (found.float() - masked.float()).norm() / masked.float().norm()
    assert error < 0.05


# transformers and peft ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_on_transformers_gives_the_same_scores_and_the_same_model(variant):
    peft = pytest.importorskip("peft")
    model = make(**VARIANTS[variant])
    hf = theirs(model)
    groups = loraprune.prunable(model, first=0, last=0)
    their_groups = loraprune.prunable(hf, first=0, last=0)
    assert groups.keys() == their_groups.keys()
    targets = [name.split(".")[1] for name in accounting.linear_shapes(model.config)]
    adapted(model, targets=tuple(targets))
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(hf, settings)
    inner = wrapped.get_base_model()
    ours = loraprune.adapters(model)
    with torch.no_grad():
        for name, adapter in loraprune.adapters(inner).items():
            adapter.A.copy_(ours[name].A)
            adapter.B.copy_(ours[name].B)
    config = LoRAPruneConfig(0.5, steps=1, warmup=0, cooldown=1)
    pruners = [
        Pruner(model, groups, config),
        Pruner(inner, their_groups, config),
    ]
    for each, pruner in zip((model, inner), pruners, strict=True):
        backward(each)
        pruner.step()
    for name, average in pruners[0].average.items():
        theirs_average = pruners[1].average[name]
        torch.testing.assert_close(average, theirs_average, rtol=1e-3, atol=1e-8)
        assert torch.equal(pruners[0].kept[name], pruners[1].kept[name])
    masked = wrapped(TOKENS).logits
    for pruner in pruners:
        pruner.remove()
    small = loraprune.finish(inner, their_groups, pruners[1].kept)
    torch.testing.assert_close(small(TOKENS).logits, masked, atol=2e-5, rtol=1e-4)
    ours_small = loraprune.finish(model, groups, pruners[0].kept)
    torch.testing.assert_close(ours_small(TOKENS), masked, atol=2e-5, rtol=1e-4)


# To disk and back, and what is refused ------------------------------------------------


def test_state_goes_to_disk_and_back(tmp_path):
    def trainer(model):
        groups = loraprune.prunable(model, first=0, last=0)
        adapted(model)
        config = LoRAPruneConfig(0.5, steps=6, warmup=0, cooldown=0.2, every=1)
        return Pruner(model, groups, config)

    straight = trainer(make(**GQA))
    stopped = trainer(make(**GQA))
    for _ in range(6):
        backward(straight.model)
        straight.step()
    for _ in range(3):
        backward(stopped.model)
        stopped.step()
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = trainer(make(**GQA))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for _ in range(3):
        backward(resumed.model)
        resumed.step()
    for name, kept in straight.kept.items():
        assert torch.equal(kept, resumed.kept[name])
        torch.testing.assert_close(straight.average[name], resumed.average[name])
    state = straight.state_dict()
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.kept"):
        state_without = {k: v for k, v in state.items() if "0.mlp.kept" not in k}
        resumed.load_state_dict(state_without)
    state["model.layers.0.mlp.kept"] = state["model.layers.0.mlp.kept"][1:]
    with pytest.raises(ValueError, match=r"shape \(34,\), not \(35,\)"):
        resumed.load_state_dict(state)
    fresh = trainer(make(**GQA))
    resumed.load_state_dict(fresh.state_dict())
    assert resumed.steps == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"final": 1.0}, "final=1.0 must be at least 0 and below 1"),
        ({"final": -0.1}, "final=-0.1"),
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"every": 1.5}, "every=1.5"),
        ({"warmup": 1.1}, "warmup=1.1 must be from 0 to 1"),
        ({"warmup": 0.6, "cooldown": 0.6}, "at most 1 together"),
        ({"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"criterion": "wanda"}, "must be one of lora, full, magnitude"),
        ({"power": 3}, "power=3 must be 1 or 2"),
    ],
    ids=named,
)
def test_bad_settings_are_refused(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        LoRAPruneConfig(**changes)


def test_what_cannot_be_pruned_is_refused():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    with pytest.raises(ValueError, match="model=Llama has no LoRA"):
        Pruner(model, groups, LoRAPruneConfig())
    everything = dependencies.groups(model)
    adapted(model)
    with pytest.raises(ValueError, match="of no linear"):
        Pruner(model, everything, LoRAPruneConfig())
    pruner = Pruner(model, groups, LoRAPruneConfig())
    with pytest.raises(ValueError, match="has no gradient: call backward"):
        pruner.step()
    backward(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.lora_A["default"].grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: A holds 1 values NaN"):
        pruner.step()
    assert pruner.steps == 0 and not pruner.average
    full = Pruner(model, groups, LoRAPruneConfig(criterion="full"))
    with pytest.raises(ValueError, match=r"proj.weight has no gradient"):
        full.step()
    lora.merge(model)
    with pytest.raises(ValueError, match="has its adapter merged"):
        loraprune.adapters(model)


@pytest.mark.parametrize("special", [{"dora": True}, {"init": "pissa"}], ids=named)
def test_more_than_a_and_b_is_refused(special):
    model = make(**GQA)
    adapted(model, grown=False, **special)
    with pytest.raises(ValueError, match="take plain LoRA"):
        loraprune.adapters(model)


def test_two_adapters_and_wrapped_bases_are_refused():
    model = make(**GQA)
    adapted(model)
    lora.apply(model, lora.LoRAConfig(target_modules=("up_proj",)), adapter="second")
    lora.set_adapter(model, ["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters .* it must be one"):
        loraprune.adapters(model)
    model = make(**GQA)
    adapted(model)
    model.model.layers[0].mlp.up_proj.base = nn.Identity()
    with pytest.raises(ValueError, match="has a Identity below its adapter"):
        loraprune.adapters(model)


def test_a_failure_leaves_the_model_as_it_was():
    model = make(**GQA)
    groups = loraprune.prunable(model, first=0, last=0)
    adapted(model)
    before = model(TOKENS)
    name = "model.layers.0.mlp"
    for mask, says in (
        (torch.zeros(35, dtype=torch.bool), "keeps nothing"),
        (torch.ones(34, dtype=torch.bool), r"shape \(34,\), and groups has 35"),
    ):
        with pytest.raises(ValueError, match=says):
            loraprune.finish(model, groups, {name: mask})
    with pytest.raises(ValueError, match="no group of that name"):
        loraprune.finish(model, groups, {"other": torch.ones(3, dtype=torch.bool)})
    assert torch.equal(model(TOKENS), before)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    config = LoRAPruneConfig(0.5, steps=5, warmup=0, cooldown=1)
    with pytest.raises(ValueError, match="batches holds 2 batches; steps=5"):
        loraprune.apply(model, [TOKENS] * 2, config, groups, optimizer)
    assert torch.equal(model(TOKENS), before)


def test_the_stored_runs_are_complete():
    with loraprune.FILE.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    keys = [(r["criterion"], r["when"], r["share"], r["seed"]) for r in runs]
    assert len(set(keys)) == len(keys) > 30
    for run in runs:
        assert float(run["grown_error"]) > 0
        if (run["criterion"], run["when"]) == ("full", "at once"):
            assert float(run["gained"]) == 0 and float(run["correlation"]) == 1
