"""(IA)³ against its equations and against `peft`: forward, gradients, counts, files,
merging.
"""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import ia3, vectors, walk
from llmlab.peft.ia3 import IA3Config
from llmlab.peft.lora import lora
from tests.peft.conftest import make_hf, make_llama

CASES = {
    "as published, under GQA": dict(),
    "nothing at the input": dict(feedforward_modules=()),
    "all at the input": dict(
        target_modules=("q_proj", "down_proj"),
        feedforward_modules=("q_proj", "down_proj"),
    ),
    "regular expressions": dict(
        target_modules=r".*layers\.1\..*(k|v|down)_proj",
        feedforward_modules=r".*\.down_proj",
    ),
    "every linear": dict(
        target_modules="all-linear", feedforward_modules=("down_proj", "o_proj")
    ),
    "the head": dict(target_modules=("lm_head", "v_proj"), feedforward_modules=()),
}
SHAPES = {
    "biases": dict(attention_bias=True, mlp_bias=True),
    "odd widths, tied": dict(
        hidden_size=30,
        intermediate_size=37,
        head_dim=10,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
}


def peft_model(model, **case):
    import peft

    case = {k: list(v) if isinstance(v, tuple) else v for k, v in case.items()}
    defaults = dict(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    return peft.get_peft_model(
        model, peft.IA3Config(**{**defaults, **case}, task_type="CAUSAL_LM")
    )


def scales(theirs):
    """peft's vectors by the name of the layer."""
    named = {n: p for n, p in theirs.named_parameters() if "ia3_l" in n}
    return {
        n.removeprefix("base_model.model.").partition(".ia3_l")[0]: p
        for n, p in named.items()
    }


def both(kind, case, **shape):
    """Ours and peft's, with the same random scales."""
    theirs = peft_model(make_hf(**shape), **case)
    ours = ia3.apply(
        make_llama(**shape) if kind == "ours" else make_hf(**shape), IA3Config(**case)
    )
    layers, dice = walk.installed(ours, ia3.IA3Linear), torch.Generator().manual_seed(1)
    assert layers.keys() == scales(theirs).keys()
    with torch.no_grad():
        for name, p in scales(theirs).items():
            p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
            layers[name].vectors["default"].copy_(p.flatten())
    return ours, theirs


def randomise(model, seed=1):
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".vectors." in name:
                p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
    return model


def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


# The equations ------------------------------------------------------------------------


def test_numbers_worked_by_hand():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([1.0, -1.0]))
    x, l = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 0.5])  # noqa: E741
    for feedforward, expected in [(False, [40.0, 3.0]), (True, [12.0, 31.0])]:
        model = nn.ModuleDict({"k_proj": copy.deepcopy(linear)})
        ia3.apply(model, IA3Config(("k_proj",), ("k_proj",) if feedforward else ()))
        with torch.no_grad():
            model["k_proj"].vectors["default"].copy_(l)
        assert model["k_proj"](x).tolist() == expected
        ia3.merge(model)
        assert model["k_proj"](x).tolist() == expected


@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.lists(st.integers(1, 3), max_size=3),
    bias=st.booleans(),
    feedforward=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_folded_linear_is_the_scaled_one(out, width, batch, bias, feedforward):
    torch.manual_seed(out * 10 + width)
    model = nn.ModuleDict(
        {"k_proj": nn.Linear(width, out, bias=bias, dtype=torch.float64)}
    )
    randomise(
        ia3.apply(model, IA3Config(("k_proj",), ("k_proj",) if feedforward else ()))
    )
    x = torch.randn(*batch, width, dtype=torch.float64)
    scaled = model["k_proj"](x)
    ia3.merge(model)
    torch.testing.assert_close(model["k_proj"](x), scaled, rtol=1e-10, atol=1e-10)


def test_the_input_of_down_and_the_output_of_up_are_the_same_place(tokens):
    """(l ⊙ up) · silu(gate) = l ⊙ (up · silu(gate)): why mT5 in peft scales `wi_1` and
    others scale `wo`.
    """
    before = randomise(
        ia3.apply(make_llama(), IA3Config(("down_proj",), ("down_proj",)))
    )
    after = randomise(ia3.apply(make_llama(), IA3Config(("up_proj",), ())))
    torch.testing.assert_close(before(tokens), after(tokens), rtol=0, atol=1e-5)


def test_keys_are_scaled_before_rope_and_every_head_sees_its_own_channels(tokens):
    """l on k_proj is l on the keys: under GQA, 2 heads of 4 channels serve 6 query
    heads.
    """
    model = ia3.apply(make_llama(), IA3Config())
    assert model.model.layers[0].self_attn.k_proj.vectors["default"].shape == (8,)
    assert model.model.layers[0].mlp.down_proj.vectors["default"].shape == (40,)


# Against peft -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_gradients_and_count_are_peft_s(case, shape, kind, tokens):
    ours, theirs = both(kind, case, **shape)
    torch.testing.assert_close(
        logits(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-5
    )
    next_token_loss(logits(ours, tokens), tokens).backward()
    next_token_loss(theirs(tokens).logits, tokens).backward()
    layers = walk.installed(ours, ia3.IA3Linear)
    for name, p in scales(theirs).items():
        torch.testing.assert_close(
            layers[name].vectors["default"].grad, p.grad.flatten(), rtol=0, atol=1e-5
        )
    assert max(p.grad.abs().max() for p in scales(theirs).values()) > 1e-4
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        f"{name}.vectors.default" for name in layers
    }
    assert walk.trainable(ours) == theirs.get_nb_trainable_parameters()
    assert walk.trainable(ours)[0] == ia3.num_parameters(
        make_llama(**shape), IA3Config(**case)
    )


def test_several_active_adapters_multiply_as_in_peft(tokens):
    import peft

    ours, theirs = both("ours", {})
    theirs.add_adapter(
        "b", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    ia3.apply(ours, IA3Config(("k_proj",), ()), "b")
    with torch.no_grad():
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                if name.endswith(".b"):
                    p.fill_(-0.5)
    theirs.base_model.set_adapter(["default", "b"])
    ia3.set_adapter(ours, ["default", "b"])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_a_half_precision_base_keeps_its_scales_in_fp32(tokens):
    theirs = peft_model(make_hf().bfloat16())
    ours = randomise(ia3.apply(make_hf().bfloat16(), IA3Config()))
    with torch.no_grad():
        for name, p in scales(theirs).items():
            p.copy_(ours.get_submodule(name).vectors["default"].view_as(p))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    out = ours(tokens).logits
    assert out.dtype == torch.bfloat16 and torch.equal(out, theirs(tokens).logits)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_files_go_both_ways(case, kind, tokens, tmp_path):
    import peft

    ours, theirs = both(kind, case, **SHAPES["biases"])
    theirs.save_pretrained(tmp_path / "theirs")
    ia3.save(ours, tmp_path / "ours")
    loaded = ia3.load(make_llama(**SHAPES["biases"]), tmp_path / "theirs", "new")
    assert ia3.adapters(loaded) == ["new"]
    torch.testing.assert_close(loaded(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    opened = peft.PeftModel.from_pretrained(
        make_hf(**SHAPES["biases"]), tmp_path / "ours"
    ).eval()
    assert torch.equal(opened(tokens).logits, theirs(tokens).logits)


def test_the_file_holds_what_peft_writes(tmp_path):
    from safetensors.torch import load_file

    ours, theirs = both("ours", {})
    theirs.save_pretrained(tmp_path / "theirs")
    ia3.save(ours, tmp_path / "ours")
    mine, peers = (
        load_file(tmp_path / side / "adapter_model.safetensors")
        for side in ("ours", "theirs")
    )
    assert mine.keys() == peers.keys() and all(
        torch.equal(mine[k], peers[k]) for k in mine
    )
    mine, peers = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    )
    for name in ("target_modules", "feedforward_modules"):
        assert sorted(mine.pop(name)) == sorted(peers.pop(name))
    assert mine.items() <= peers.items()


# The start, and what trains -----------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_it_starts_as_the_base_and_comes_off_bit_for_bit(make, tokens):
    model = make(tie_word_embeddings=True)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    plain = logits(model, tokens)
    ia3.apply(model, IA3Config())
    assert torch.equal(logits(model, tokens), plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(2):
        next_token_loss(logits(model, tokens), tokens).backward()
        optimizer.step()
    assert not torch.equal(logits(model, tokens), plain)
    ia3.remove(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(logits(model, tokens), plain) and ia3.adapters(model) == []


def test_three_vectors_a_layer_are_0_009_percent_of_a_7b():
    with torch.device("meta"):
        model = Llama(preset("llama-7b"))
    ia3.apply(model, IA3Config())
    assert walk.trainable(model) == (
        32 * (4096 + 4096 + 11008),
        6_738_415_616 + 614_400,
    )


# Merging ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_merged_equals_unmerged_and_unmerging_returns_the_same_bits(case, make, tokens):
    model = make(**SHAPES["biases"])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    randomise(ia3.apply(model, IA3Config(**case)))
    scaled = logits(model, tokens)
    ia3.merge(model)
    torch.testing.assert_close(logits(model, tokens), scaled, rtol=0, atol=1e-5)
    ia3.unmerge(model)
    assert torch.equal(logits(model, tokens), scaled)
    ia3.remove(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_scale_of_zero_is_unmerged_too(llama, tokens):
    """Dividing by the scale would give 0 / 0; peft divides by l + 1e-8 and returns a
    row of zeros.
    """
    weight = llama.model.layers[0].self_attn.v_proj.weight.clone()
    ia3.apply(llama, IA3Config())
    with torch.no_grad():
        llama.model.layers[0].self_attn.v_proj.vectors["default"][3] = 0.0
    ia3.merge(llama)
    assert not llama.model.layers[0].self_attn.v_proj.base.weight[3].any()
    ia3.unmerge(llama)
    ia3.remove(llama)
    assert torch.equal(llama.model.layers[0].self_attn.v_proj.weight, weight)


def test_merged_for_good_is_a_plain_model(llama, tokens):
    keys = llama.state_dict().keys()
    scaled = randomise(ia3.apply(llama, IA3Config()))(tokens)
    ia3.merge(llama)
    ia3.merge_and_unload(llama)  # merges once
    torch.testing.assert_close(llama(tokens), scaled, rtol=0, atol=1e-5)
    assert llama.state_dict().keys() == keys and not walk.installed(llama, walk.Wrapper)


def test_two_adapters_are_merged_and_rounded_once():
    """1 · 1.00390625 · 0.99609375 in bf16: each product alone would round to 1 or
    0.996, both together to 1.
    """
    model = nn.ModuleDict({"k_proj": nn.Linear(1, 1, bias=False)}).bfloat16()
    nn.init.ones_(model["k_proj"].weight)
    for adapter, value in (("a", 1 + 2.0**-8), ("b", 1 - 2.0**-8)):
        ia3.apply(model, IA3Config(("k_proj",), ()), adapter)
        nn.init.constant_(model["k_proj"].vectors[adapter], value)
    ia3.set_adapter(model, ["a", "b"])
    ia3.merge_and_unload(model)
    assert (
        model["k_proj"].weight.item() == 1.0
        and model["k_proj"].weight.dtype == torch.bfloat16
    )


def test_what_cannot_be_merged_is_named_and_nothing_is_half_merged(llama, tokens):
    ia3.apply(llama, IA3Config())
    layer = llama.model.layers[1].mlp.down_proj
    layer.base.weight = nn.Parameter(
        torch.zeros(24, 40, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"Linear in torch.uint8; only a plain float"):
        ia3.merge(llama)
    assert all(not layer.merged for layer in vectors.layers_of(llama, ia3.IA3Linear))
    other = make_llama()
    lora.apply(other, lora.LoRAConfig())
    ia3.apply(other, IA3Config())
    with pytest.raises(ValueError, match=r"the layer under .* is a LoRALinear"):
        ia3.merge(other)


# Misuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(target_modules=("k_proj", "query"), feedforward_modules=()), "'query'"),
        (dict(target_modules=("embed_tokens",), feedforward_modules=()), "only Linear"),
        (
            dict(target_modules=r".*k_proj", feedforward_modules=("down_proj",)),
            "'down_proj'. means none of the target",
        ),
        (
            dict(feedforward_modules=("down_proj", "up_proj")),
            "'up_proj'. means none of the target layers",
        ),
        (dict(feedforward_modules=r".*\.mlp"), "means none of the target layers"),
    ],
)
def test_a_bad_target_leaves_the_model_as_it_was(config, message, llama):
    with pytest.raises(ValueError, match=message):
        ia3.apply(llama, IA3Config(**config))
    assert (
        all(p.requires_grad for p in llama.parameters()) and ia3.adapters(llama) == []
    )


def test_one_layer_is_not_scaled_at_both_sides(llama):
    ia3.apply(llama, IA3Config())
    with pytest.raises(
        ValueError,
        match=r"another adapter scales 'model.layers.0.mlp.down_proj' at its input",
    ):
        ia3.apply(llama, IA3Config(("down_proj",), ()), "b")
    assert ia3.adapters(llama) == ["default"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("default", "exists already"), ("a.b", "dots"), ("keys", "torch")],
)
def test_a_bad_name_is_refused(llama, name, message):
    ia3.apply(llama, IA3Config())
    with pytest.raises(ValueError, match=f"adapter='{name}'.*{message}"):
        ia3.apply(llama, IA3Config(), name)


def test_what_is_not_there_or_merged_is_refused(llama):
    for call in (ia3.merge, ia3.unmerge, ia3.merge_and_unload):
        with pytest.raises(ValueError, match=r"no \(IA\)³ adapter"):
            call(llama)
    with pytest.raises(ValueError, match="'bible' is not on the model; it has none"):
        ia3.set_adapter(llama, "bible")
    ia3.apply(llama, IA3Config())
    ia3.merge(llama)
    for call in (
        ia3.merge,
        ia3.remove,
        lambda m: ia3.set_adapter(m, []),
        lambda m: ia3.apply(m, IA3Config(), "b"),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
            call(llama)


def test_a_file_that_does_not_fit_is_named_and_the_model_left_alone(tmp_path, llama):
    ia3.save(ia3.apply(make_llama(intermediate_size=44), IA3Config()), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mlp\.down_proj\.ia3_l' has shape \(1, 44\).*needs \(1, 40\)",
    ):
        ia3.load(llama, tmp_path)
    assert all(p.requires_grad for p in llama.parameters()) and not walk.installed(
        llama, walk.Wrapper
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["lm_head"]})
    )
    with pytest.raises(ValueError, match="modules_to_save"):
        ia3.load(llama, tmp_path)


def test_the_last_adapter_gone_the_others_stay(llama, tokens):
    a = randomise(ia3.apply(llama, IA3Config(), "a"))(tokens)
    ia3.apply(llama, IA3Config(("v_proj",), ()), "b")
    assert all(n.endswith(".b") for n, p in llama.named_parameters() if p.requires_grad)
    ia3.set_adapter(llama, ["a", "b"])
    ia3.remove(llama, "b")
    assert ia3.adapters(llama) == ["a"] and torch.equal(llama(tokens), a)
    ia3.set_adapter(llama, [])
    assert (
        torch.equal(llama(tokens), make_llama()(tokens))
        and walk.trainable(llama)[0] == 0
    )
