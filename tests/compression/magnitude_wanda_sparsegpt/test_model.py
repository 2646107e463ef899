"""On models: ours and transformers', failures that change nothing, training on."""

from __future__ import annotations

import csv
from copy import deepcopy

import pytest
import torch

from llmlab.compression import calibration, walk
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression import quantization_basics as qb
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
from tests.compression.broken import no_input, not_finite, with_adapter, zeros
from tests.compression.magnitude_wanda_sparsegpt.problems import text
from tests.models.hugging_face import make, named, theirs

CONFIGS = [
    PruneConfig("magnitude", 0.5),
    PruneConfig("wanda", 0.5),
    PruneConfig("wanda", pattern="1:2"),
    PruneConfig("sparsegpt", 0.3, mask_block=8),
    PruneConfig("sparsegpt", pattern="1:2"),
]
VARIANTS = [
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 14, "intermediate_size": 58},
]


def name_of(value):
    if isinstance(value, PruneConfig):
        return f"{value.method} {value.sparsity or value.pattern}"
    return None


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_ours_and_transformers_get_the_same_weights(config, changes):
    model = make(**changes)
    library = theirs(model)
    head = model.lm_head.weight.clone()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert pruning.apply(model, text(), config) is model
    pruning.apply(library, text(), config)
    for name, weight in library.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-4, rtol=0)
    assert torch.equal(model.lm_head.weight, head)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in walk.linears(model)}


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_linear_loses_exactly_what_was_asked(config):
    model = pruning.apply(make(), text(), config)
    for linear in walk.linears(model).values():
        W = linear.weight
        zeros = int((W == 0).sum())
        if config.pattern:
            kept = (W != 0).unflatten(1, (-1, 2)).sum(-1)
            assert (kept == 1).all()
        elif config.method == "magnitude":
            assert zeros == pruning.pruned_count(W.numel(), config.sparsity)
        elif config.method == "wanda":
            assert ((W == 0).sum(1) == W.shape[1] // 2).all()
        else:
            blocks = W.split(8, 1)
            counts = [pruning.pruned_count(b.numel(), config.sparsity) for b in blocks]
            assert [int((b == 0).sum()) for b in blocks] == counts
    asked = config.sparsity or 0.5
    assert abs(pruning.sparsity(model) - asked) < 0.02


def test_magnitude_and_wanda_change_no_weight_that_they_keep():
    for config in CONFIGS[:3]:
        model = make()
        before = {name: m.weight.clone() for name, m in walk.linears(model).items()}
        pruning.apply(model, text(), config)
        for name, linear in walk.linears(model).items():
            kept = linear.weight != 0
            assert torch.equal(linear.weight[kept], before[name][kept])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_sees_what_the_pruned_ones_before_it_put_out(method):
    config = PruneConfig(method, 0.5)
    model = make()
    first = pruning.apply(deepcopy(model), text(), config)
    half = deepcopy(model)
    half.model.layers[0].load_state_dict(first.model.layers[0].state_dict())
    linears = {n: m for n, m in walk.linears(half).items() if ".layers.1." in n}
    seen = calibration.inputs(half, linears, text())
    for name, linear in linears.items():
        expected = pruning.prune(linear.weight, seen[name], config)
        found = first.get_submodule(name).weight
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_magnitude_needs_no_text_and_the_others_say_so():
    config = PruneConfig("magnitude", 0.5)
    with_text = pruning.apply(make(), text(), config)
    without = pruning.apply(make(), None, config)
    for ours, other in zip(with_text.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, other)
    with pytest.raises(ValueError, match="batches=None: method='wanda' needs text"):
        pruning.apply(make(), None, PruneConfig("wanda", 0.5))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_half_precision_in_and_out(config):
    model = make().to(torch.bfloat16)
    pruning.apply(model, text(), config)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert abs(pruning.sparsity(model) - (config.sparsity or 0.5)) < 0.02
    assert model(text()[0]).isfinite().all()


def quantised(model):
    return qb.apply(model, qb.QuantConfig(4, group_size=8))


BAD_MODELS = [
    (with_adapter, "carries an adapter: merge it"),
    (not_finite, r"layers\.1\.mlp\.down_proj\.weight holds 1 values"),
    (zeros, r"layers\.1\.mlp\.down_proj\.weight is all zeros"),
    (no_input, r"layers\.1\.mlp\.gate_proj: H is all zeros"),
    (quantised, "is compressed already"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODELS, ids=named)
def test_a_model_that_cannot_be_pruned_stays_as_it_was(spoil, message):
    model = spoil(make()).train()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pruning.apply(model, text(), PruneConfig("sparsegpt", 0.5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_that_does_not_fit_one_linear_names_it_and_changes_none(method):
    model = make(intermediate_size=58)  # the hidden size is a multiple of 4
    before = deepcopy(model.state_dict())
    message = r"layers\.0\.mlp\.down_proj: m=4 must divide the columns, 58"
    with pytest.raises(ValueError, match=message):
        pruning.apply(model, text(), PruneConfig(method, pattern="2:4"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="batches is empty"):
        pruning.apply(make(), [], PruneConfig("wanda", 0.5))
    W = torch.randn(3, 8)
    without_gram = calibration.InputStatistics.empty(8, gram=False)
    for config, seen, message in (
        (PruneConfig("wanda", 0.5), None, "seen=None"),
        (PruneConfig("sparsegpt", 0.5), without_gram, r"seen\.gram=None"),
        (
            PruneConfig("wanda", 0.5),
            calibration.InputStatistics.empty(7),
            r"norm has shape \(7,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pruning.prune(W, seen, config)
    with pytest.raises(ValueError, match="norm=None"):
        pruning.keep_mask(W, None, PruneConfig("wanda", 0.5))


# Training on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    ],
    ids=["AdamW", "SGD"],
)
def test_pruned_weights_stay_zero_while_the_others_train(optimizer):
    def train(model):
        steps = optimizer(model.parameters())
        for _ in range(3):
            steps.zero_grad()
            model(text()[0]).square().mean().backward()
            steps.step()

    model = pruning.apply(make(), text(), PruneConfig("wanda", pattern="1:2"))
    before = {
        name: m.weight.detach().clone() for name, m in walk.linears(model).items()
    }
    free = deepcopy(model)
    hooks = pruning.hold_zeros(model)
    assert len(hooks) == len(before)
    train(model)
    for name, linear in walk.linears(model).items():
        W = linear.weight.detach()
        assert torch.equal(W == 0, before[name] == 0)
        assert not torch.equal(W, before[name])
    train(free)
    assert pruning.sparsity(free) < 0.01
    for hook in hooks:
        hook.remove()
    train(model)
    assert pruning.sparsity(model) < 0.01


# On the real model --------------------------------------------------------------------


def runs(method, amount, text="addresses"):
    with pruning.FILE.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    keys = [
        tuple(run[k] for k in ("method", "per", "amount", "text", "seed"))
        for run in found
    ]
    assert len(set(keys)) == len(keys)
    kind = (method, amount, text)
    return [run for run in found if (run["method"], run["amount"], run["text"]) == kind]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("amount", ["0.3", "0.5", "2:4"])
def test_what_the_sweep_measured_is_told_apart_from_noise(method, amount):
    """Both beat magnitude by more than five standard errors, with every draw."""
    found = runs(method, amount)
    assert found
    for run in found:
        assert float(run["gained"]) > 5 * float(run["gained_error"])


def test_sparsegpts_update_pays_on_its_kind_of_text_alone():
    """At 50% every draw of addresses beats all of Wanda's, and none of the Bible."""

    def grown(method: str, text: str) -> list[float]:
        return [float(run["grown"]) for run in runs(method, "0.5", text)]

    assert max(grown("sparsegpt", "addresses")) < min(grown("wanda", "addresses"))
    assert max(grown("wanda", "bible")) < min(grown("sparsegpt", "bible"))


@pytest.mark.real_model
@pytest.mark.slow
def test_wanda_beats_magnitude_on_text_that_it_did_not_see():
    from llmlab.compression import hessian
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

    def statistics(batches):
        calls = calibration.first_calls(model, batches)
        read = calibration.collect(up, lambda: calibration.next_calls(block, calls))
        return read["mlp.up_proj"]

    W = up["mlp.up_proj"].weight.detach()
    seen = statistics(calibration.sample(train, 128, 8))
    judge = statistics([other[None, :512]]).gram
    errors = {
        method: hessian.output_error(
            W, pruning.prune(W, seen, PruneConfig(method, 0.5)), judge
        )
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    assert errors["wanda"] < 0.8 * errors["magnitude"]
    assert errors["sparsegpt"] < errors["wanda"]
