"""A wrapper stands for a linear to those that read one instead of calling it, and to
what looks into any model for linears: every wrapper of ours, or it says no.
"""

import copy

import pytest
import torch
from torch import nn

from llmlab.compression import quantization_basics as qb
from llmlab.peft import bitfit, ia3, qlora, walk
from llmlab.peft.adalora import adalora
from llmlab.peft.adapters import adapters, parallel_adapter
from llmlab.peft.lora import lora
from llmlab.peft.mam_and_unipelt import mam, unipelt
from tests.peft.conftest import make_hf, make_llama
from tests.peft.held_out import ours_on
from tests.peft.held_out_methods import METHODS

# a name: how it is put on layers of these names, and merged for good
LINEAR = {
    "LoRA": (lora, lambda t: lora.LoRAConfig(r=2, target_modules=t)),
    "LoRA and biases": (
        lora,
        lambda t: lora.LoRAConfig(r=2, target_modules=t, bias="all"),
    ),
    "DoRA": (lora, lambda t: lora.LoRAConfig(r=2, target_modules=t, dora=True)),
    "PiSSA": (lora, lambda t: lora.LoRAConfig(r=2, target_modules=t, init="pissa")),
    "AdaLoRA": (
        adalora,
        lambda t: adalora.AdaLoRAConfig(9, 1, init_r=2, target_modules=t),
    ),
    "(IA)³": (ia3, lambda t: ia3.IA3Config(t, ())),
    "(IA)³ at the input": (ia3, lambda t: ia3.IA3Config(t, t)),
    "BitFit": (bitfit, lambda t: bitfit.BitFitConfig(t)),
    "copied whole": (
        lora,
        lambda t: lora.LoRAConfig(r=2, target_modules=("aside",), modules_to_save=t),
    ),
}
every_linear = pytest.mark.parametrize("name", LINEAR)


class Attends(nn.Module):
    """A model with an attention that reads its linears, and a linear that it calls."""

    def __init__(self, bias: bool):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)
        self.aside = nn.Linear(6, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=0.5)

    def forward(self, x):
        return self.aside(self.attention(x, x, x, need_weights=False)[0])


def adapted(name, model, *targets):
    module, config = LINEAR[name]
    return move(module.apply(model, config(targets)))


def move(model):
    """All that trains goes a little way."""
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=dice))
    return model


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# Those that read a linear -------------------------------------------------------------


@every_linear
@pytest.mark.parametrize("bias", [True, False])
def test_what_an_attention_reads_of_its_out_proj_is_what_was_trained(name, bias):
    """In peft 0.21.2 an adapter on `out_proj` alone has no effect, and no gradient."""
    x = x_of(3, 5, 6)
    model = Attends(bias)
    plain = model(x)
    model = adapted(name, model, "out_proj")
    out = model(x)
    assert (out - plain).abs().max() > 0.01
    out.square().sum().backward()
    for n, p in model.named_parameters():
        assert not p.requires_grad or p.grad.abs().max() > 0, n
    with torch.no_grad():
        close(model.eval()(x), out)  # PyTorch's fast path
    try:
        LINEAR[name][0].merge_and_unload(model)
    except ValueError as error:
        assert name == "BitFit" and not bias and "no place for a bias" in str(error)
        return
    close(model(x), out)
    assert not walk.installed(model, walk.Wrapper)


@every_linear
def test_an_encoder_layer_in_evaluation_is_the_one_that_was_trained(name):
    """There PyTorch reads `linear1.weight` and calls nothing."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layer": layer, "aside": nn.Linear(6, 6)})
    adapted(name, model, "linear1", "linear2", "out_proj")
    x = x_of(3, 5, 6)
    out = layer.train()(x)
    with torch.no_grad():
        close(layer.eval()(x), out)


@every_linear
@pytest.mark.parametrize("kind", ["floats", "bf16", "4 bits"])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_those_of_the_linear_that_computes_the_same(
    name, kind, bias
):
    torch.manual_seed(0)
    linears = {"here": nn.Linear(7, 5, bias=bias), "aside": nn.Linear(4, 4)}
    model = nn.ModuleDict(linears)
    if kind == "bf16":
        model.bfloat16()
    if kind == "4 bits":
        if name == "copied whole":
            pytest.skip("codes cannot train")
        config = qlora.QLoRAConfig(quantize_modules=("here",))
        qlora.quantize(model, config)
    adapted(name, model, "here")
    layer = model["here"]
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.weight.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
    x = x_of(3, 7).to(layer.weight.dtype)
    read = nn.functional.linear(x, layer.weight, layer.bias)
    close(read, layer(x), 0.1 if kind == "bf16" else 1e-5)
    if name == "AdaLoRA":
        adalora.remove(model)
    else:
        LINEAR[name][0].set_adapter(model, [])
    layer = model["here"]
    plain = walk.base_of(layer)
    assert torch.equal(walk.weight_of(layer), walk.weight_of(plain))
    assert layer.bias is plain.bias


def test_wrappers_over_wrappers_are_read_as_they_compute():
    torch.manual_seed(0)
    model = nn.ModuleDict({"here": nn.Linear(7, 5), "aside": nn.Linear(4, 4)})
    x = x_of(3, 7)
    for name in ("LoRA", "(IA)³", "BitFit", "AdaLoRA", "(IA)³ at the input"):
        if name.endswith("input"):
            continue  # one side per layer
        adapted(name, model, "here")
        layer = model["here"]
        close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))


def test_dropout_on_what_is_never_called_is_refused():
    for module, config in (
        (lora, lora.LoRAConfig(dropout=0.1, target_modules=("out_proj",))),
        (adalora, adalora.AdaLoRAConfig(9, dropout=0.1, target_modules=("out_proj",))),
    ):
        model = Attends(bias=True)
        with pytest.raises(ValueError, match=r"dropout=0\.1: 'attention\.out_proj'"):
            module.apply(model, config)
        assert not walk.installed(model, walk.Wrapper)


def test_rows_of_what_is_never_called_are_refused():
    from llmlab.peft.lora import files

    model = adapted("LoRA", Attends(bias=True), "out_proj")
    with (
        files.by_row(model, ["default", None, None]),
        pytest.raises(ValueError, match="reads the weight of one of its linears"),
    ):
        model(x_of(3, 5, 6))


def test_a_gate_that_depends_on_the_input_has_no_weight(tokens):
    model = make_llama()
    unipelt.apply(model, unipelt.UniPELTConfig(hidden=8))
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="gated LoRA has no weight"):
        layer.weight
    unipelt.set_adapter(model, None)
    assert layer.weight is layer.base.weight


# T5, whose `wo` is read ---------------------------------------------------------------


def t5(**other):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=37, d_model=12, d_kv=5, d_ff=20, num_layers=2, num_heads=3)
    config = T5Config(**sizes, decoder_start_token_id=0, **other)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
every_t5 = pytest.mark.parametrize("shape", [{}, GATED], ids=["relu", "gated, untied"])


def run(model):
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits


@every_linear
@every_t5
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_on_t5_s_wo(name, shape, dtype):
    model = t5(**shape).to(dtype)
    model.aside = nn.Linear(3, 3)
    plain = run(model)
    if name in ("(IA)³", "(IA)³ at the input") and dtype == torch.bfloat16:
        pytest.skip("a tenth of 1 is lost in bf16")
    adapted(name, model, "wo")
    out = run(model)
    assert (out - plain).abs().max() > 0.01 and out.dtype == dtype
    out.float().square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad and "aside" not in n:
            assert p.grad.abs().max() > 0, n
    if name == "BitFit" or dtype == torch.bfloat16:
        return
    LINEAR[name][0].merge_and_unload(model)
    close(run(model), out, 1e-4)


@every_t5
@pytest.mark.parametrize("name", ["LoRA", "AdaLoRA", "(IA)³ at the input"])
def test_on_t5_files_go_to_peft_and_back(name, shape, tmp_path):
    import peft

    from llmlab.peft.adalora import files as adalora_files
    from llmlab.peft.lora import files as lora_files

    module = {"LoRA": lora_files, "AdaLoRA": adalora_files}.get(name, ia3)
    ours = adapted(name, t5(**shape), "wo", "q")
    module.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(t5(**shape), tmp_path).eval()
    close(run(theirs), run(ours), 1e-4)
    theirs.save_pretrained(tmp_path / "again")
    close(run(module.load(t5(**shape), tmp_path / "again")), run(ours), 1e-4)


@every_t5
def test_four_bits_pass_over_what_t5_reads(shape):
    from llmlab.peft.qlora import qlora as qlora_files

    model = t5(**shape)
    config = qlora.QLoRAConfig(r=2)
    move(qlora.apply(model, config))
    kinds = {n.split(".")[-1] for n, _ in qlora_files.installed(model)}
    assert "wo" not in kinds and kinds & {"wi", "wi_0"}
    assert run(model).isfinite().all()
    named = qlora.QLoRAConfig(r=2, quantize_modules=("wo",))
    model = t5(**shape)
    with pytest.raises(ValueError, match=r"wo' must stay in floats"):
        qlora.apply(model, named)
    assert not walk.installed(model, walk.Wrapper)
    attends = qlora.QLoRAConfig(quantize_modules=("out_proj",))
    with pytest.raises(ValueError, match=r"out_proj' must stay in floats"):
        qlora.quantize(Attends(bias=True), attends)


# What looks for linears in any model --------------------------------------------------

MORE = {
    "Houlsby's adapters": (adapters, adapters.AdapterConfig(bottleneck=3)),
    "parallel adapters": (
        parallel_adapter,
        parallel_adapter.ParallelAdapterConfig(bottleneck=3),
    ),
    "MAM": (mam, mam.MAMConfig(num_virtual_tokens=3, hidden=8, bottleneck=3)),
    "UniPELT": (unipelt, unipelt.UniPELTConfig(num_virtual_tokens=3, hidden=8)),
    "LoRA and its head": (
        lora,
        lora.LoRAConfig(r=2, target_modules=("lm_head", "q_proj")),
    ),
    "LoRA, a head copied": (
        lora,
        lora.LoRAConfig(r=2, modules_to_save=("lm_head", "up_proj")),
    ),
}
ALL = [*(name for name in METHODS if name != "QLoRA"), *MORE]
FOUR = qb.QuantConfig(4, per="row")


def on(name, model):
    if name in METHODS:
        return ours_on(name, model)
    module, config = MORE[name]
    return module.apply(model, config)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_quantising_under_a_method_is_the_method_on_what_was_quantised(
    name, make, tokens
):
    shape = dict(tie_word_embeddings=True, intermediate_size=31)
    model = move(on(name, make(**shape)))
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    small = qb.apply(copy.deepcopy(model), FOUR)
    rounded = qb.round_weights(copy.deepcopy(model), FOUR)
    for other in (small, rounded):
        after = {n: p for n, p in other.named_parameters() if p.requires_grad}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], p) for n, p in before.items())
    assert sum(isinstance(m, qb.QuantLinear) for m in small.modules()) == 14
    head = walk.base_of(small.lm_head)
    assert torch.equal(head.weight, walk.base_of(model.lm_head).weight)

    first = move(on(name, qb.round_weights(make(**shape), FOUR)))
    values = dict(model.named_parameters())
    with torch.no_grad():  # the same numbers: some methods draw them
        for n, p in first.named_parameters():
            if p.requires_grad:
                p.copy_(values[n])
        sides = (small, rounded, first)
        outs = [getattr(m(tokens), "logits", m(tokens)) for m in sides]
        plain = getattr(model(tokens), "logits", model(tokens))
    close(outs[0], outs[1])
    if "copied" not in name:  # a copy of a weight is made before it is rounded
        close(outs[1], outs[2], 1e-4)
    assert (outs[1] - plain).abs().max() > 0.01


def test_inputs_are_quantised_where_the_base_reads_them(tokens):
    model = move(on("LoRA and its head", make_llama()))
    plain = model(tokens)
    hooks = qb.quantize_inputs(model, qb.QuantConfig(3, per="row"))
    assert len(hooks) == 14
    assert (model(tokens) - plain).abs().max() > 0.01
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(tokens), plain)


def test_four_bits_are_not_quantised_again():
    model = ours_on("QLoRA", make_llama())
    for function in (qb.apply, qb.round_weights):
        with pytest.raises(ValueError, match=r"is a Linear4bit in torch\.uint8"):
            function(model, FOUR)


@every_linear
def test_what_is_quantised_under_a_wrapper_takes_in_nothing(name):
    if name == "copied whole":
        return
    module = LINEAR[name][0]
    model = adapted(name, make_llama(), "q_proj")
    qb.apply(model, FOUR)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="QuantLinear"):
        module.merge(model)
    assert set(model.state_dict()) == before
    with pytest.raises(ValueError, match="QuantLinear"):
        module.merge_and_unload(model)


def test_a_change_above_a_scale_is_not_merged_below_it():
    """l ⊙ (W + ΔW) x is not l ⊙ W x + ΔW x."""
    for name in ("LoRA", "AdaLoRA"):
        model = adapted("(IA)³", make_llama(), "q_proj")
        adapted(name, model, "q_proj")
        with pytest.raises(ValueError, match="is a IA3Linear; only a plain float"):
            LINEAR[name][0].merge(model)


@pytest.mark.parametrize("below", ["BitFit", "LoRA"])
def test_a_change_above_one_that_adds_is_merged_and_comes_out_again(below, tokens):
    model = adapted(below, make_llama(), "q_proj", "v_proj")
    first = model(tokens)
    adapted("AdaLoRA", model, "q_proj")
    out = model(tokens)
    assert (out - first).abs().max() > 0.01
    adalora.merge(model)
    close(model(tokens), out)
    adalora.unmerge(model)
    assert torch.equal(model(tokens), out)
    adalora.remove(model)
    assert torch.equal(model(tokens), first)


def test_what_was_merged_below_does_not_take_the_change_above_with_it(tokens):
    model = adapted("LoRA", make_llama(), "q_proj")
    lora.merge(model)
    adalora.merge_and_unload(adapted("AdaLoRA", model, "q_proj"))
    out = model(tokens)
    with pytest.raises(ValueError, match="the weight has changed since"):
        lora.unmerge(model)
    assert torch.equal(model(tokens), out)
