"""PEQA: against sums written out, autograd, finite differences and transformers."""

from __future__ import annotations

import csv
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.compression import formats, gptq
from llmlab.compression import peqa_and_qlora as peqa
from llmlab.compression import quantization_basics as qb
from llmlab.compression.gptq import GPTQConfig
from llmlab.compression.peqa_and_qlora import PEQAConfig, PEQALinear
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models import accounting, course_model
from llmlab.models.presets import preset
from llmlab.peft import lora
from llmlab.peft.lora import LoRAConfig
from tests.models.hugging_face import make, theirs

GRIDS = {
    "rows": QuantConfig(4, symmetric=False, per="row"),
    "groups": QuantConfig(3, symmetric=False, group_size=5),
    "symmetric groups": QuantConfig(3, group_size=3),
    "two bits": QuantConfig(2, symmetric=False, group_size=15),
    "eight bits": QuantConfig(8, symmetric=False, per="row"),
    "a matrix": QuantConfig(4, symmetric=False, per="tensor"),
}
GROUPS = QuantConfig(4, symmetric=False, group_size=16, scale_dtype=torch.float32)
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def layer_of(grid, out=7, columns=15, bias=True, unpacked=True, seed=0):
    """A PEQALinear, 7 × 15, one of whose scales is not what it began with."""
    torch.manual_seed(seed)
    linear = nn.Linear(columns, out, bias=bias)
    nn.init.normal_(linear.weight, mean=0.2)
    layer = PEQALinear(QuantLinear(linear, grid), unpacked)
    with torch.no_grad():
        layer.scale[-1] *= 1.5
    return layer


def plain(layer, x, scale):
    """The linear by operations that autograd knows: nothing of ours but the codes."""
    codes, zeros = layer.stored.codes(), layer.stored.zeros()
    blocks = codes.reshape(len(scale), -1) - zeros
    weight = (scale * blocks.to(scale.dtype)).reshape(codes.shape)
    return F.linear(x, weight, layer.stored.bias.to(x.dtype))


# Mathematics --------------------------------------------------------------------------


def test_the_gradient_of_a_scale_is_a_sum_over_its_block():
    random = torch.Generator().manual_seed(0)
    G = torch.randn(3, 8, generator=random)
    integers = torch.randint(-7, 8, (3, 8), generator=random).float()
    groups = QuantConfig(4, group_size=4)
    found = peqa.scale_gradient(G, integers, groups)
    assert found.shape == (6, 1)
    for row in range(3):
        for group in range(2):
            total = 0.0
            for j in range(4 * group, 4 * group + 4):
                total += G[row, j].item() * integers[row, j].item()
            assert found[2 * row + group].item() == pytest.approx(total, abs=1e-5)
    rows = peqa.scale_gradient(G, integers, QuantConfig(4, per="row"))
    torch.testing.assert_close(rows[:, 0], (G * integers).sum(1))


@each_grid
@pytest.mark.parametrize("shape", [(15,), (4, 15), (2, 3, 15)])
def test_forward_and_gradients_are_those_of_autograd(grid, shape):
    layer = layer_of(grid)
    layer.stored.bias.requires_grad_(True)
    x = torch.randn(shape, requires_grad=True)
    scale = layer.scale.detach().clone().requires_grad_(True)
    weights = torch.randn(*shape[:-1], 7)

    (layer(x) * weights).sum().backward()
    ours = [x.grad.clone(), layer.scale.grad, layer.stored.bias.grad.clone()]
    x.grad = None
    layer.stored.bias.grad = None
    expected = plain(layer, x, scale)
    torch.testing.assert_close(layer(x), expected)
    (expected * weights).sum().backward()
    for found, right in zip(
        ours, [x.grad, scale.grad, layer.stored.bias.grad], strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@each_grid
def test_gradients_agree_with_finite_differences(grid):
    layer = layer_of(grid).double()
    x = torch.randn(3, 15, dtype=torch.float64, requires_grad=True)

    def run(x, scale):
        return peqa.ScaledIntegers.apply(x, scale, layer.stored.bias, layer)

    assert torch.autograd.gradcheck(run, (x, layer.scale))


@each_grid
def test_packed_and_unpacked_integers_are_the_same(grid):
    layer, packed = layer_of(grid), layer_of(grid, unpacked=False)
    assert packed.unpacked is None and not layer.unpacked.is_floating_point()
    assert torch.equal(layer.integers(), packed.integers())
    codes = layer.stored.codes().reshape(len(layer.scale), -1)
    expected = (codes - layer.stored.zeros()).reshape(7, 15)
    assert torch.equal(layer.integers(), expected)
    x = torch.randn(4, 15)
    assert torch.equal(layer(x), packed(x))
    layer(x).square().sum().backward()
    packed(x).square().sum().backward()
    assert torch.equal(layer.scale.grad, packed.scale.grad)


def test_eight_bits_with_a_zero_point_reach_beyond_a_byte():
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 1, 2, 3], [0, -1, -2, -3]]))
    layer = PEQALinear(QuantLinear(linear, QuantConfig(8, symmetric=False, per="row")))
    assert layer.integers().aminmax() == (-255, 255)


def test_a_scale_per_row_is_a_multiplier_of_the_output():
    layer = layer_of(GRIDS["rows"], bias=False)
    x, g = torch.randn(6, 15), torch.randn(6, 7)
    h = layer(x)
    h.backward(g)
    by_outputs = (g * h.detach()).sum(0) / layer.scale.detach().flatten()
    torch.testing.assert_close(layer.scale.grad.flatten(), by_outputs)
    factor = torch.linspace(0.5, 2, 7)
    with torch.no_grad():
        layer.scale *= factor[:, None]
    torch.testing.assert_close(layer(x), h.detach() * factor)


def test_a_scale_per_group_is_more_than_a_multiplier():
    layer = layer_of(GRIDS["groups"], bias=False)
    x = torch.randn(6, 15)
    before = layer(x)
    with torch.no_grad():
        layer.scale[1] *= 2  # the second group of the first row
    change = layer(x) - before
    expected = x[:, 5:10] @ layer.weight[0, 5:10] / 2
    torch.testing.assert_close(change[:, 0], expected)
    assert not change[:, 1:].any()


def test_lsq_gives_the_scale_another_gradient():
    """torch's learnable fake quantisation: its integers follow the scale."""
    torch.manual_seed(0)
    W, G = torch.randn(5, 12), torch.randn(5, 12)
    scale = W.abs().amax(1) / 3  # −4 … 3: some values are clipped, at the lower scale
    scale[1] /= 2
    s = scale.clone().requires_grad_(True)
    zero = torch.zeros(5)
    w = W.clone().requires_grad_(True)
    fake = torch._fake_quantize_learnable_per_channel_affine(
        w, s, zero.requires_grad_(True), 0, -4, 3, 1.0
    )
    fake.backward(G)
    steps = W / scale[:, None]
    codes = steps.round().clamp(-4, 3)
    inside = (steps.round() >= -4) & (steps.round() <= 3)
    assert (~inside).any()
    rows = QuantConfig(3, per="row")
    ours = peqa.scale_gradient(G, codes, rows)
    followed = peqa.scale_gradient(G, steps * inside, rows)
    torch.testing.assert_close(s.grad, (ours - followed).flatten())
    assert (s.grad - ours.flatten()).abs().max() > 0.1


def test_bf16_inputs_meet_scales_in_fp32():
    layer = layer_of(GRIDS["groups"])
    x = torch.randn(2, 5, 15)
    x_16 = x.bfloat16().requires_grad_(True)
    layer(x).square().sum().backward()
    right = layer.scale.grad.clone()
    layer.scale.grad = None
    h = layer(x_16)
    assert h.dtype == torch.bfloat16
    h.square().sum().backward()
    assert layer.scale.grad.dtype == torch.float32
    assert x_16.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.scale.grad, right, rtol=0.1, atol=1.0)


# Models -------------------------------------------------------------------------------

VARIANTS = {
    "grouped queries": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
TOKENS = torch.arange(12).reshape(2, 6)


def loss_of(model):
    out = model(TOKENS)
    return getattr(out, "logits", out).log_softmax(-1).square().mean()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_ours_and_transformers_model_get_the_same_gradients(changes):
    model = make(**changes)
    hf = theirs(model)
    rounded = qb.round_weights(deepcopy(model), GROUPS)
    config = PEQAConfig(GROUPS)
    for m in (model, hf):
        peqa.apply(m, config)
        loss_of(m).backward()
    torch.testing.assert_close(model(TOKENS), rounded(TOKENS), rtol=1e-4, atol=1e-4)
    ours, others = peqa.layers_of(model), peqa.layers_of(hf)
    assert len(ours) == 14 and ours.keys() == others.keys()
    for name, layer in ours.items():
        assert layer.scale.grad.any()
        torch.testing.assert_close(
            layer.scale.grad, others[name].scale.grad, rtol=1e-3, atol=1e-5
        )
    for m in (model, hf):
        trained = [n for n, p in m.named_parameters() if p.requires_grad]
        assert trained and all(n.endswith("_proj.scale") for n in trained)
    head = isinstance(model.lm_head, nn.Linear)
    assert head and not isinstance(model.lm_head, PEQALinear)


def test_training_changes_scales_and_nothing_else():
    model = peqa.apply(make(num_key_value_heads=2), PEQAConfig(GROUPS))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    integers = peqa.fingerprint(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    first = loss_of(model)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < first - 0.01
    assert peqa.fingerprint(model) == integers
    for name, tensor in model.state_dict().items():
        is_scale = name.endswith("_proj.scale")
        assert torch.equal(tensor, before[name]) != is_scale, name
    for layer in peqa.layers_of(model).values():
        steps = layer.weight.reshape(len(layer.scale), -1) / layer.scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_the_way_back_is_exact():
    quantised = qb.apply(make(), GROUPS)
    expected = quantised(TOKENS)
    model = peqa.train_scales(deepcopy(quantised))
    shifted(model, 1.2)
    assert not torch.allclose(model(TOKENS), expected)
    peqa.remove(model)
    assert torch.equal(model(TOKENS), expected)


def shifted(model, factor):
    with torch.no_grad():
        for i, layer in enumerate(peqa.layers_of(model).values()):
            layer.scale *= factor + 0.01 * i
    return model


@pytest.mark.parametrize("per", ["row", "group"])
def test_a_stored_model_keeps_its_integers_and_opens_from_a_folder(tmp_path, per):
    grid = QuantConfig(4, symmetric=False, per=per, group_size=16)
    model = shifted(peqa.apply(make(num_key_value_heads=2), PEQAConfig(grid)), 1.1)
    expected = model(TOKENS)
    codes = {n: m.stored.codes() for n, m in peqa.layers_of(model).items()}
    with pytest.raises(ValueError, match="PEQALinear"):
        formats.save(model, tmp_path / "a")
    peqa.store(model)
    for name, found in codes.items():
        layer = model.get_submodule(name)
        assert type(layer) is QuantLinear and layer.scale.dtype == torch.float16
        assert torch.equal(layer.codes(), found)
    # what 16 bits cost: 11 of them are the mantissa
    torch.testing.assert_close(model(TOKENS), expected, rtol=2e-2, atol=2e-2)
    opened = formats.load(formats.save(model, tmp_path / "b"))
    assert torch.equal(opened(TOKENS), model(TOKENS))
    # and from a folder it goes on
    again = peqa.train_scales(opened)
    torch.testing.assert_close(again(TOKENS), model(TOKENS))
    loss_of(again).backward()


def test_rounding_a_scale_to_16_bits_moves_a_weight_by_a_part_in_2048():
    layer = layer_of(GRIDS["rows"])
    with torch.no_grad():
        layer.scale *= torch.linspace(0.9, 1.1, 7)[:, None]
    stored = layer.to_quant_linear().weight
    assert not torch.equal(stored, layer.weight)
    assert ((stored - layer.weight).abs() <= layer.weight.abs() / 2048).all()


def test_codes_of_gptq_stay_while_their_scales_train():
    model = make()
    batch = torch.randint(61, (4, 32), generator=torch.Generator().manual_seed(0))
    gptq.apply(model, [batch], GPTQConfig(GROUPS), store=True)
    expected, codes = model(TOKENS), model.model.layers[0].mlp.up_proj.codes()
    peqa.train_scales(model)
    torch.testing.assert_close(model(TOKENS), expected)
    loss_of(model).backward()
    assert torch.equal(model.model.layers[0].mlp.up_proj.stored.codes(), codes)


def test_a_state_dict_brings_its_integers_along():
    one = peqa.apply(make(seed=0), PEQAConfig(GROUPS))
    other = shifted(peqa.apply(make(seed=1), PEQAConfig(GROUPS)), 1.1)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(TOKENS), other(TOKENS))


# Tasks --------------------------------------------------------------------------------


def test_tasks_are_swapped_by_their_scales(tmp_path):
    model = peqa.apply(make(), PEQAConfig(GROUPS))
    start, outputs = peqa.scales(model), {}
    for name, factor in (("a", 0.9), ("b", 1.2)):
        peqa.load_scales(model, start)
        shifted(model, factor)
        outputs[name] = model(TOKENS)
        peqa.save_task(model, tmp_path / name)
    parameters = list(model.parameters())
    for name in ("a", "b", "a"):
        peqa.load_task(model, tmp_path / name)
        assert torch.equal(model(TOKENS), outputs[name])
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert not torch.equal(
        start["model.layers.0.mlp.up_proj"],
        peqa.scales(model)["model.layers.0.mlp.up_proj"],
    )


def test_a_task_file_holds_scales_alone_in_16_bits(tmp_path):
    grid = QuantConfig(4, symmetric=False, group_size=16)
    model = shifted(peqa.apply(make(), PEQAConfig(grid)), 1.1)
    file = peqa.save_task(model, tmp_path / "task.safetensors")
    count = sum(s.numel() for s in peqa.scales(model).values())
    assert 2 * count < file.stat().st_size < 2 * count + 3000
    peqa.load_task(model, file)
    expected = model(TOKENS)
    assert torch.equal(peqa.store(model)(TOKENS), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda task: task.pop("model.layers.1.mlp.up_proj"), "missing model.layers.1"),
        (lambda task: task.update(extra=torch.ones(3)), "unknown extra"),
        (
            lambda task: task.update({"model.layers.1.mlp.up_proj": torch.ones(5)}),
            "has shape",
        ),
        (lambda task: task["model.layers.1.mlp.up_proj"].fill_(torch.nan), "NaN"),
        (lambda task: task["model.layers.1.mlp.up_proj"].fill_(torch.inf), "infinite"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_and_changes_nothing(change, says):
    model = peqa.apply(make(), PEQAConfig(GROUPS))
    expected = model(TOKENS)
    task = {name: 2 * scale for name, scale in peqa.scales(model).items()}
    change(task)
    with pytest.raises(ValueError, match=says):
        peqa.load_scales(model, task)
    assert torch.equal(model(TOKENS), expected)


def test_a_task_of_other_integers_is_refused(tmp_path):
    file = peqa.save_task(peqa.apply(make(), PEQAConfig(GROUPS)), tmp_path / "task")
    other = make()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] *= -1
    peqa.apply(other, PEQAConfig(GROUPS))
    expected = other(TOKENS)
    with pytest.raises(ValueError, match="task was made with other integers"):
        peqa.load_task(other, file)
    assert torch.equal(other(TOKENS), expected)


# What is refused ----------------------------------------------------------------------


def test_a_failure_leaves_the_model_as_it_was():
    model = make()
    with pytest.raises(ValueError, match=r"q_proj: group_size=10 must divide"):
        peqa.apply(model, PEQAConfig(QuantConfig(4, group_size=10)))
    with_lora = lora.apply(make(), LoRAConfig(2))
    with pytest.raises(ValueError, match="carries an adapter"):
        peqa.apply(with_lora, PEQAConfig(GROUPS))
    peqa.apply(model, PEQAConfig(GROUPS))
    with pytest.raises(ValueError, match="is compressed already"):
        peqa.apply(model, PEQAConfig(GROUPS))
    with pytest.raises(ValueError, match="no QuantLinear"):
        peqa.train_scales(model)
    floats = make()
    for function in (peqa.scales, peqa.store, peqa.remove, peqa.fingerprint):
        with pytest.raises(ValueError, match="no PEQALinear"):
            function(floats)
    assert all(p.requires_grad for p in floats.parameters())


@pytest.mark.parametrize("value", [1e6, torch.nan])
def test_a_scale_beyond_16_bits_is_not_stored(tmp_path, value):
    grid = QuantConfig(4, symmetric=False, group_size=16)
    model = peqa.apply(make(), PEQAConfig(grid))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.scale[3] = value
    for function in (peqa.store, lambda m: peqa.save_task(m, tmp_path / "task")):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: scale holds 1"):
            function(model)
    assert len(peqa.layers_of(model)) == 14
    assert not (tmp_path / "task").exists()


# What it costs ------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "group"])
def test_the_plan_counts_what_a_model_holds(per):
    grid = QuantConfig(4, symmetric=False, per=per, group_size=16)
    model = peqa.apply(course_model.load(), PEQAConfig(grid, unpacked=False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert peqa.trained_values(model.config, "peqa", grid) == trained
    plan = peqa.memory_plan(model.config, "peqa", grid)
    peqa.store(model)
    held = 2 * sum(p.numel() for p in model.parameters())  # 4 bytes each here, as yet
    for layer in formats.folder.quantised_linears(model).values():
        held += qb.nbytes(layer)
    assert plan["weights"] == held
    assert plan["gradients"] == plan["task"] == 2 * trained
    assert plan["optimizer"] == 12 * trained


def test_the_plan_counts_loras_adapters():
    config = preset("course")
    model = lora.apply(course_model.load(), LoRAConfig(4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for method in ("lora", "qlora"):
        assert peqa.trained_values(config, method, rank=4) == trained
    plain = 2 * accounting.parameters(config)
    plan = peqa.memory_plan(config, "lora", rank=4)
    assert plan["weights"] == plain + 2 * trained
    assert peqa.memory_plan(config, "full")["optimizer"] == 6 * plain
    small = peqa.memory_plan(config, "qlora", rank=4)["weights"]
    assert small == peqa.memory_plan(config, "peqa")["weights"] + 2 * trained


def test_llama_65b_takes_33_gb_in_4_bits_as_published():
    config = preset("llama-65b")
    assert round(peqa.memory_plan(config, "full")["weights"] / 1e9) == 131
    assert round(peqa.memory_plan(config, "peqa")["weights"] / 1e9) == 33
    assert peqa.trained_values(config, "peqa") == 80 * (5 * 8192 + 2 * 22016)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method='bitfit' must be one of"):
        peqa.memory_plan(preset("course"), "bitfit")


# What the lesson says of its runs -----------------------------------------------------


def runs_at_the_best_rate(method, bits):
    with peqa.FILE.open(newline="", encoding="utf-8") as file:
        found = [
            run
            for run in csv.DictReader(file)
            if (run["model"], run["method"], run["bits"]) == ("course", method, bits)
        ]
    tried = [run for run in found if run["seed"] == "0"]
    best = min(tried, key=lambda run: float(run["dev"]))["lr"]
    runs = {run["seed"]: run for run in found if run["lr"] == best}
    assert sorted(runs) == ["0", "1", "2"]
    return runs


@pytest.mark.parametrize("bits", ["4", "3", "2"])
def test_the_stored_runs_show_what_the_lesson_says(bits):
    ours = runs_at_the_best_rate("PEQA, groups", bits)
    rows = runs_at_the_best_rate("PEQA, rows", bits)
    lora_all = runs_at_the_best_rate("LoRA, all, r 2", bits)
    lora_qv = runs_at_the_best_rate("LoRA, q and v, r 4", bits)
    for seed in ours:
        for run in (ours[seed], rows[seed]):  # only scales are rounded, to 16 bits
            assert abs(float(run["stored"]) - float(run["loss"])) < 0.002
        assert float(ours[seed]["loss"]) < float(lora_all[seed]["loss"])
        assert float(rows[seed]["loss"]) < float(lora_qv[seed]["loss"])
        lost = float(lora_all[seed]["stored"]) - float(lora_all[seed]["loss"])
        assert lost > {"4": 0.01, "3": 0.07, "2": 0.4}[bits]


def test_fit_takes_a_step_of_adam_for_each_batch():
    torch.manual_seed(0)
    model = peqa.apply(make(), PEQAConfig(GROUPS))
    twin = deepcopy(model)
    batches = [torch.arange(12).reshape(2, 6), torch.arange(12).reshape(2, 6) + 3]
    losses = peqa.fit(model, iter(batches), learning_rate=1e-2)
    parameters = [layer.scale for layer in peqa.layers_of(twin).values()]
    adam = torch.optim.Adam(parameters, lr=1e-2)
    for ids, found in zip(batches, losses, strict=True):
        logits = twin(ids)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert found == pytest.approx(loss.item(), rel=1e-6)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, want in peqa.scales(twin).items():
        torch.testing.assert_close(peqa.scales(model)[name], want)
    before = peqa.scales(model)
    with pytest.raises(ValueError, match="at least one to train on"):
        peqa.fit(model, [])
    with pytest.raises(ValueError, match="after 1 steps: use a smaller learning_rate"):
        peqa.fit(model, batches, learning_rate=1e30)
    for name, want in before.items():
        assert torch.equal(peqa.scales(model)[name], want)
