"""Where bitsandbytes, and transformers and peft on top of it, do what one would not
guess. All on a CPU; a GPU has other kernels.
"""

from __future__ import annotations

import inspect

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as bnb_f
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from llmlab.peft.qlora import QLoRAConfig, nf4
from tests.libraries import seen_in

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as transformers saves it."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path


def load(folder, **quantization) -> LlamaForCausalLM:
    """In train mode, in which no 4-bit weight is packed anew."""
    return LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**quantization),
        dtype=torch.float32,
    ).train()


# Four bits -------------------------------------------------------------------------


@seen_in("bitsandbytes", "0.50.2")
def test_four_bits_are_fp4_unless_one_asks_for_nf4():
    """And double quantisation is on in the layer, off in the function. Ours has the
    paper's setting.
    """
    layer = inspect.signature(bnb.nn.Linear4bit.__init__).parameters
    function = inspect.signature(bnb_f.quantize_4bit).parameters
    for signature, double in ((layer, True), (function, False)):
        assert signature["quant_type"].default == "fp4"
        assert signature["compress_statistics"].default is double
    assert (QLoRAConfig().kind, QLoRAConfig().double) == ("nf4", True)


@seen_in("transformers", "5.23.0")
def test_load_in_4bit_alone_is_not_qlora(folder):
    model = load(folder, load_in_4bit=True)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "fp4"
    assert not state.nested
    assert type(model.lm_head) is torch.nn.Linear
    as_floats = LlamaForCausalLM(CONFIG).num_parameters()
    assert model.num_parameters() == as_floats


@seen_in("bitsandbytes", "0.50.2")
def test_fp4_has_a_smallest_level_that_is_a_sixteenth_of_e2m1s():
    state = bnb_f.quantize_4bit(torch.ones(64), quant_type="fp4")[1]
    levels = 12 * state.code.abs().unique()
    torch.testing.assert_close(
        levels, torch.tensor([0, 1 / 16, 2, 3, 4, 6, 8, 12]), rtol=1e-6, atol=1e-6
    )
    e2m1 = (12 * nf4.levels_of("e2m1")).abs().unique()
    torch.testing.assert_close(e2m1, torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 12]))


@seen_in("bitsandbytes", "0.50.2")
def test_double_quantisation_can_turn_the_sign_of_a_whole_block():
    """One large block among small ones: their scale is below 0. Ours is the same, bit
    for bit.
    """
    w = torch.full((64, 64), 0.003)
    w[0, 0] = 10.0
    codes, state = bnb_f.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    scales = bnb_f.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert scales[0] > 9.9
    assert ((scales[1:] < -0.008) & (scales[1:] > -0.009)).all()
    back = bnb_f.dequantize_4bit(codes, state)
    assert (back[1:] < -0.008).all()
    ours = nf4.quantize(w)
    assert torch.equal(nf4.scales_of(ours), scales)
    assert torch.equal(nf4.dequantize(ours), back)
    single = nf4.dequantize(nf4.quantize(w, double=False))
    torch.testing.assert_close(single[1:], w[1:])


# Optimizers ------------------------------------------------------------------------


def moved(
    kind: type[torch.optim.Optimizer], small: float, steps: int, n: int = 4096
) -> torch.Tensor:
    """How far weights went with the gradients 1, small, small, …, at a rate of 1e-3."""
    weight = torch.nn.Parameter(torch.zeros(n))
    gradient = torch.full((n,), small)
    gradient[0] = 1.0
    optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = gradient.clone()
        optimizer.step()
    return -weight.detach()


@pytest.mark.parametrize(
    ("small", "share"), [(1e-2, 1.0), (1e-3, 0.26), (1e-4, 0.028)], ids=str
)
@seen_in("bitsandbytes", "0.50.2")
def test_one_large_gradient_holds_its_block_back_in_8_bits(small, share):
    """The 255 others of its block; the next block moves as in 32 bits."""
    full = moved(torch.optim.AdamW, small, steps=100)
    eight = moved(bnb.optim.AdamW8bit, small, steps=100)
    assert eight[1] / full[1] == pytest.approx(share, rel=0.05)
    assert eight[255] == eight[1]
    for i in (0, 256, 4095):
        assert eight[i] / full[i] == pytest.approx(1, rel=0.02)


@seen_in("bitsandbytes", "0.50.2")
def test_the_average_of_squares_is_rounded_up_to_a_64000th_of_the_largest():
    """So gradients below 1/√64,000 of it, about 1/250, are held back."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    weight.grad = torch.full((4096,), 1e-6)
    weight.grad[0] = 1.0
    optimizer = bnb.optim.AdamW8bit([weight])
    optimizer.step()
    state = optimizer.state[weight]
    levels = state["qmap2"][state["state2"].int()]
    assert levels[0] == 1
    assert levels[1].item() == pytest.approx(1 / 64000, rel=1e-4)
    torch.testing.assert_close(state["absmax2"][0].item(), 0.001, rtol=1e-4, atol=0)


@seen_in("bitsandbytes", "0.50.2")
def test_the_first_step_is_right_and_so_are_tensors_below_4096():
    """Before the second step nothing has been rounded; a small tensor never is."""
    for settings in ({"steps": 1}, {"steps": 100, "n": 4095}):
        full = moved(torch.optim.AdamW, 1e-6, **settings)
        eight = moved(bnb.optim.AdamW8bit, 1e-6, **settings)
        torch.testing.assert_close(eight, full, rtol=1e-4, atol=0)


# Eight bits ------------------------------------------------------------------------


def outlier_and_layer(**settings):
    """An input with a 60 in it, the layer in 8 bits, and the output in floats."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(4, 64)
    x[0, 3] = 60.0
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, **settings)
    layer.load_state_dict(linear.state_dict())
    return x, layer.to("cpu"), linear(x).detach()


@torch.no_grad()
@seen_in("bitsandbytes", "0.50.2")
def test_an_8_bit_layer_rounds_only_weights_in_train_mode():
    """In which every layer is made. LLM.int8, with its outliers, needs eval()."""
    x, plain, y = outlier_and_layer(has_fp16_weights=False)
    _, apart, _ = outlier_and_layer(has_fp16_weights=False, threshold=6.0)
    assert plain.training
    out = plain(x)
    codes, scales = plain.weight.data, plain.state.SCB
    torch.testing.assert_close(out, x @ (codes.float() * scales[:, None] / 127).T)
    assert torch.equal(apart(x), plain(x))  # no threshold
    train = (out - y).abs().max()
    eval_ = (plain.eval()(x) - y).abs().max()
    assert eval_ > 2 * train
    assert (apart.eval()(x) - y).abs().max() < 0.3 * eval_


@torch.no_grad()
@seen_in("bitsandbytes", "0.50.2")
def test_an_8_bit_layer_as_it_is_made_cannot_evaluate_on_a_cpu():
    """has_fp16_weights is True by default; transformers sets it to False."""
    x, layer, _ = outlier_and_layer()
    assert layer(x).isfinite().all()
    with pytest.raises(NotImplementedError, match="int8_double_quant"):
        layer.eval()(x)


@seen_in("transformers", "5.23.0")
def test_transformers_sets_a_threshold_that_the_layer_does_not(folder):
    layer = load(folder, load_in_8bit=True).model.layers[0].mlp.up_proj
    assert (layer.state.threshold, layer.state.has_fp16_weights) == (6.0, False)
    alone = inspect.signature(bnb.nn.Linear8bitLt.__init__).parameters
    assert alone["threshold"].default == 0.0
    assert alone["has_fp16_weights"].default is True


# peft on top -----------------------------------------------------------------------


def wrapped(model: torch.nn.Module, **settings) -> set[str]:
    """The names of the linears that get an adapter."""
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    names = [n for n, _ in get_peft_model(model, config).named_parameters()]
    return {n.split(".lora_A")[0].split(".")[-1] for n in names if ".lora_A" in n}


@seen_in("peft", "0.21.2")
def test_lora_left_to_itself_takes_two_linears_of_seven():
    """With rank 8 and alpha 8, so a factor of 1; all-linear is all but the head."""
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
    assert wrapped(LlamaForCausalLM(CONFIG)) == {"q_proj", "v_proj"}
    every = wrapped(LlamaForCausalLM(CONFIG), target_modules="all-linear")
    assert len(every) == 7
    assert "lm_head" not in every


@seen_in("peft", "0.21.2")
def test_adapters_are_fp32_on_a_bf16_base():
    model = LlamaForCausalLM(CONFIG).bfloat16()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    dtypes = {"lora_" in n: p.dtype for n, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@seen_in("peft", "0.21.2")
def test_merging_into_four_bits_rounds_to_four_bits_again(folder):
    model = load(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    )
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    base = layer.base_layer.weight
    change = layer.get_delta_weight("default").detach()
    wanted = bnb_f.dequantize_4bit(base.data, base.quant_state) + change
    merged = model.merge_and_unload().get_submodule(name)
    assert type(merged) is bnb.nn.Linear4bit
    found = bnb_f.dequantize_4bit(merged.weight.data, merged.weight.quant_state)
    assert 0.02 < (found - wanted).norm() / wanted.norm() < 0.2
