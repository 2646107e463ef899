"""`modules_to_save` and `bias` against `peft`: what trains, gradients, files both ways,
merging, several adapters, and what is refused.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmlab.models import checkpoint as models
from llmlab.peft import bitfit, qlora, walk
from llmlab.peft.lora import copies, files, lora
from llmlab.peft.lora.lora import LoRAConfig
from tests.peft.conftest import make_hf, make_llama
from tests.peft.lora.test_lora import loss_of

QV = ("q_proj", "v_proj")
BIASED = dict(attention_bias=True, mlp_bias=True)
TIED = dict(tie_word_embeddings=True)
ODD = dict(
    hidden_size=27,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=14,
    intermediate_size=31,
    vocab_size=67,
)
# name: (the model's shape, what our config and peft's have under the same name)
CASES = {
    "head": ({}, dict(modules_to_save=("lm_head",))),
    "tied head": (TIED, dict(modules_to_save=("lm_head",))),
    "embedding": ({}, dict(modules_to_save=("embed_tokens",))),
    "tied embedding": (TIED, dict(modules_to_save=("embed_tokens",))),
    "tied, both": (TIED, dict(modules_to_save=("embed_tokens", "lm_head"))),
    "every norm": ({}, dict(modules_to_save=("norm",))),
    "one kind of norm": ({}, dict(modules_to_save=("input_layernorm",))),
    "MLPs": (BIASED, dict(modules_to_save=("mlp",))),
    "a target": (ODD, dict(modules_to_save=("v_proj", "lm_head"))),
    "biases of targets": (BIASED, dict(bias="lora_only")),
    "all biases": (BIASED, dict(bias="all")),
    "biases of attention": (ODD | dict(attention_bias=True), dict(bias="all")),
    "no biases": ({}, dict(bias="all")),
    "all biases and an MLP's linear": (
        BIASED | TIED,
        dict(bias="all", modules_to_save=("down_proj", "lm_head")),
    ),
    "biases of targets, one of them whole": (
        BIASED | ODD,
        dict(bias="lora_only", modules_to_save=("q_proj",)),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def theirs_on(model, **settings):
    import peft

    listed = {n: list(v) if type(v) is tuple else v for n, v in settings.items()}
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=list(QV), task_type="CAUSAL_LM", **listed
    )
    return peft.get_peft_model(model, config).eval()


def ours_on(model, adapter="default", **settings):
    return lora.apply(model, LoRAConfig(r=3, alpha=7, **settings), adapter)


def trained(model, adapter="default"):
    """What trains, ours or peft's, under one name for both."""
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        short = name.removeprefix("base_model.model.")
        for part in (f"modules_to_save.{adapter}.", f"copies.{adapter}."):
            short = short.replace(part, "")
        short = short.replace("base_layer.bias", "bias")
        short = short.replace(f"biases.{adapter}", "bias")
        found[short.replace(f".{adapter}.weight", "").replace(f".{adapter}", "")] = p
    return found


def move(model, seed=1, adapter="default"):
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(trained(model, adapter).items()):
            p.add_(0.1 * torch.randn(p.shape, generator=dice))
    return model


def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


# Against peft -------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_what_trains_and_its_gradients_are_peft_s(make, case, tokens):
    shape, settings = case
    theirs = move(theirs_on(make_hf(**shape), **settings))
    ours = ours_on(make(**shape), **settings)
    close(logits(ours, tokens), logits(make(**shape), tokens), 0)
    peers = trained(theirs)
    mine = trained(ours)
    assert mine.keys() == peers.keys()
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(peers[name])
    close(logits(ours, tokens), theirs(tokens).logits)
    loss_of(logits(ours, tokens), tokens).backward()
    loss_of(theirs(tokens).logits, tokens).backward()
    for name, p in mine.items():
        close(p.grad, peers[name].grad)
    config = LoRAConfig(r=3, alpha=7, **settings)
    assert lora.num_parameters(make(**shape), config) == sum(
        p.numel() for p in peers.values()
    )


@every_case
@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_we_open_what_peft_saves(make, case, tokens, tmp_path):
    shape, settings = case
    theirs = move(theirs_on(make_hf(**shape), **settings))
    theirs.save_pretrained(tmp_path)
    ours = files.load(make(**shape), tmp_path)
    close(logits(ours, tokens), theirs(tokens).logits)
    plain = logits(make(**shape), tokens)
    assert (logits(ours, tokens) - plain).abs().max() > 0.01
    assert {n: p.shape for n, p in trained(ours).items()} == {
        n: p.shape for n, p in trained(theirs).items()
    }


@every_case
def test_peft_and_we_open_what_we_save(case, tokens, tmp_path):
    import peft

    shape, settings = case
    ours = move(ours_on(make_llama(**shape), **settings))
    files.save(ours, tmp_path)
    again = files.load(make_llama(**shape), tmp_path)
    close(again(tokens), ours(tokens), 0)
    theirs = peft.PeftModel.from_pretrained(make_hf(**shape), tmp_path).eval()
    close(theirs(tokens).logits, ours(tokens))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_file(tmp_path / "adapter_model.safetensors")
    peers = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    extra = {n for n in peers if ".modules_to_save." in n or ".original_module." in n}
    assert mine.keys() == peers.keys() - extra
    for name, tensor in mine.items():
        assert torch.equal(tensor, peers[name])


def test_a_bias_may_be_under_its_layers_own_name_as_older_versions_wrote(
    tokens, tmp_path
):
    from safetensors.torch import save_file

    ours = move(ours_on(make_llama(**BIASED), bias="lora_only"))
    files.save(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    old = {n.replace(".base_layer.bias", ".bias"): t for n, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, file)
    close(files.load(make_llama(**BIASED), tmp_path)(tokens), ours(tokens), 0)


def test_a_classifiers_head_comes_and_goes(tokens, tmp_path):
    """peft writes both "classifier" and "score"; a Llama has the second."""
    import peft
    from transformers import LlamaForSequenceClassification

    def base():
        torch.manual_seed(3)
        config = make_hf().config
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    config = peft.LoraConfig(r=3, target_modules=list(QV), task_type="SEQ_CLS")
    theirs = move(peft.get_peft_model(base(), config).eval())
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    ours = files.load(base(), tmp_path)
    close(ours(tokens).logits, theirs(tokens).logits)
    assert (ours(tokens).logits - base()(tokens).logits).abs().max() > 0.01
    files.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    close(again(tokens).logits, theirs(tokens).logits)


# Merging, switching, taking off -------------------------------------------------------


@every_case
@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_merged_unmerged_disabled_and_taken_off(make, case, tokens):
    shape, settings = case
    model = make(**shape)
    plain = logits(model, tokens)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    move(ours_on(model, **settings))
    out = logits(model, tokens)
    with files.disabled(model):
        assert torch.equal(logits(model, tokens), plain)
        assert not trained(model) or all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model, tokens), out)
    lora.merge(model)
    close(logits(model, tokens), out)
    with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
        lora.set_adapter(model, [])
    lora.unmerge(model)
    assert torch.equal(logits(model, tokens), out)
    lora.set_adapter(model, [])
    assert torch.equal(logits(model, tokens), plain)
    assert not trained(model)
    lora.remove(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    if shape.get("tie_word_embeddings"):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@every_case
def test_merged_for_good_is_a_plain_model_that_loads(case, tokens, tmp_path):
    shape, settings = case
    model = move(ours_on(make_llama(**shape), **settings))
    out = model(tokens)
    lora.merge_and_unload(model)
    assert not walk.installed(model, walk.Wrapper)
    assert not any(p.requires_grad for p in model.parameters())
    close(model(tokens), out)
    models.save(model, tmp_path)
    close(models.load(tmp_path)(tokens), out)


def test_the_base_is_another_in_peft_once_biases_have_trained(tokens):
    """The surprise that our copies are for: peft trains the base's own biases."""
    plain = make_hf(**BIASED)(tokens).logits
    theirs = move(theirs_on(make_hf(**BIASED), bias="all"))
    with theirs.disable_adapter(), pytest.warns() if False else torch.no_grad():
        assert (theirs(tokens).logits - plain).abs().max() > 0.1


# Several adapters ---------------------------------------------------------------------

PAIR = {
    "a": dict(modules_to_save=("lm_head", "input_layernorm"), bias="lora_only"),
    "b": dict(modules_to_save=("lm_head", "embed_tokens"), bias="all"),
    "c": dict(),
}


def three(make=make_llama, **shape):
    model = make(**BIASED, **shape)
    for seed, (adapter, settings) in enumerate(PAIR.items()):
        move(ours_on(model, adapter, **settings), seed, adapter)
    return model


@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize("tied", [True, False])
def test_each_adapter_has_its_own_copies(tied, make, tokens, tmp_path):
    shape = dict(tie_word_embeddings=tied)
    model = three(make, **shape)
    plain = logits(make(**BIASED, **shape), tokens)
    outs = {}
    for adapter in PAIR:
        lora.set_adapter(model, adapter)
        files.save(model, tmp_path / adapter, adapter)
        outs[adapter] = logits(model, tokens)
        opened = files.load(make(**BIASED, **shape), tmp_path / adapter)
        close(outs[adapter], logits(opened, tokens))
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trains and all(f".{adapter}" in name for name in trains)
    assert (outs["a"] - outs["b"]).abs().max() > 0.1
    with files.by_row(model, ["b", None, "a"]):
        mixed = logits(model, tokens)
    expected = torch.stack([outs["b"][0], plain[1], outs["a"][2]])
    close(mixed, expected)
    lora.remove(model, "b")
    lora.set_adapter(model, "a")
    close(logits(model, tokens), outs["a"], 0)
    lora.remove(model, "a")
    lora.set_adapter(model, "c")
    close(logits(model, tokens), outs["c"], 0)
    lora.remove(model)
    assert torch.equal(logits(model, tokens), plain)
    assert not walk.installed(model, walk.Wrapper)


def test_a_batch_of_rows_is_peft_s(tokens):
    """Where both adapters have copies of the same modules: else peft has a KeyError."""
    import peft

    settings = dict(modules_to_save=("lm_head", "embed_tokens"))
    theirs = theirs_on(make_hf(), **settings)
    other = dict(modules_to_save=["lm_head", "embed_tokens"], target_modules=list(QV))
    theirs.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=7, **other))
    ours = ours_on(make_llama(), **settings)
    ours_on(ours, "b", **settings)
    for seed, adapter in enumerate(("default", "b")):
        lora.set_adapter(ours, adapter)
        theirs.set_adapter(adapter)
        move(theirs, seed, adapter)
        peers = trained(theirs, adapter)
        with torch.no_grad():
            for name, p in trained(ours, adapter).items():
                p.copy_(peers[name])
        close(ours(tokens), theirs(tokens).logits)
    with files.by_row(ours, ["b", None, "default"]):
        mine = ours(tokens)
    rows = ["b", "__base__", "default"]
    close(mine, theirs(tokens, adapter_names=rows).logits)


def test_a_change_of_bias_adds_up_and_two_copies_of_a_module_do_not(tokens):
    model = make_llama(**BIASED)
    biases = dict(bias="all")
    move(ours_on(model, "a", **biases), 1, "a")
    move(ours_on(model, "b", **biases), 2, "b")
    lora.set_adapter(model, ["a", "b"])
    layer = model.model.layers[0].mlp.up_proj
    b = layer.base.bias
    expected = layer.biases["a"] + layer.biases["b"] - b
    close(layer.bias, expected)
    out = model(tokens)
    lora.merge(model)
    close(model(tokens), out)
    model = three()
    with pytest.raises(ValueError, match=r"each has a copy of 'lm_head'"):
        lora.set_adapter(model, ["a", "b"])
    lora.set_adapter(model, ["a", "c"])
    with pytest.raises(ValueError, match=r"adapter='a' trains more than low-rank"):
        files.combine(model, {"a": 1.0, "c": 1.0}, "mix")


def test_an_adapter_with_biases_where_another_has_a_low_rank_change(tokens):
    """The same layer holds A and B of one and only a bias of the other."""
    for first, second in (("a", "b"), ("b", "a")):
        model = make_llama(**BIASED)
        settings = {
            "a": dict(target_modules=("o_proj",), bias="all"),
            "b": dict(target_modules=("q_proj",)),
        }
        outs = {}
        for seed, adapter in enumerate((first, second)):
            move(ours_on(model, adapter, **settings[adapter]), seed, adapter)
            outs[adapter] = model(tokens)
        lora.set_adapter(model, first)
        close(model(tokens), outs[first], 0)
        lora.set_adapter(model, ["a", "b"])
        out = model(tokens)
        lora.merge(model)
        close(model(tokens), out)


# Rows that train ----------------------------------------------------------------------

ROWS = ["b", "a", None]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(dora=True),
        dict(init="pissa"),
        dict(bias="all", modules_to_save=("lm_head", "embed_tokens", "norm")),
        dict(modules_to_save=("mlp",)),
    ],
    ids=["plain", "DoRA", "PiSSA", "biases, head, embedding, norms", "MLPs"],
)
@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_rows_train_every_adapter_that_they_name(make, settings, tokens):
    model = make(**BIASED)
    for seed, adapter in enumerate("ab"):
        move(ours_on(model, adapter, **settings), seed, adapter)

    def gradients(adapter, rows):
        model.zero_grad()
        if adapter is not None:
            lora.set_adapter(model, adapter)
        out = logits(model, tokens)
        sum(out[i].square().mean() for i in rows).backward()
        return {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    expected = gradients("a", [1]) | gradients("b", [0])
    with files.by_row(model, ROWS):
        found = gradients(None, [0, 1, 2])
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("settings", [dict(), dict(modules_to_save=("lm_head",))])
def test_backward_outside_would_lose_gradients_and_is_refused(settings, tokens):
    model = make_llama()
    for adapter in "ab":
        ours_on(model, adapter, **settings)
    with files.by_row(model, ROWS):
        loss = model(tokens).square().mean()
    with pytest.raises(ValueError, match="call backward inside `with by_row"):
        loss.backward()
    lora.set_adapter(model, "b")
    with files.by_row(model, ["b", None, "b"]):
        loss = model(tokens).square().mean()
    loss.backward()  # b trains outside, too


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(modules_to_save=("score",)), "no module's name ends with 'score'"),
        (dict(modules_to_save=("lm_head", "head2")), "ends with 'head2'"),
        (dict(modules_to_save="lm_head"), "'lm_head' must be a list of names"),
        (dict(modules_to_save=("proj",)), "both mean .*: write its last name in full"),
        (dict(modules_to_save=QV), "leaves no layer of target_modules"),
        (dict(modules_to_save=("mlp", "up_proj")), "is a part of another one"),
        (dict(bias="some"), "bias='some' is not one of none, lora_only, all"),
    ],
)
def test_a_setting_that_cannot_be_is_named_and_changes_nothing(settings, says):
    model = make_llama()
    with pytest.raises(ValueError, match=says):
        ours_on(model, **settings)
    assert not walk.installed(model, walk.Wrapper)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            dict(modules_to_save=("mlp",)),
            dict(target_modules=("layers.1.mlp.up_proj",)),
            "",
        ),
        (
            dict(modules_to_save=("layers.0.mlp",)),
            dict(target_modules=("up_proj",)),
            r"'model\.layers\.0\.mlp\.up_proj' is a part of what trains whole",
        ),
        (
            dict(modules_to_save=("layers.0.mlp",)),
            dict(modules_to_save=("up_proj",)),
            r"'model\.layers\.0\.mlp\.up_proj' is a part of what trains whole",
        ),
        (
            dict(modules_to_save=("mlp",)),
            dict(bias="all"),
            "'model.layers.0.mlp', which",
        ),
        (
            dict(modules_to_save=("o_proj",)),
            dict(bias="all"),
            "self_attn.o_proj', which",
        ),
        (
            dict(modules_to_save=("lm_head",)),
            dict(target_modules=("lm_head",)),
            "'lm_head' trains whole in another adapter",
        ),
        (
            dict(target_modules=("up_proj",)),
            dict(modules_to_save=("mlp",)),
            r"mlp' has parts with adapters already",
        ),
        (
            dict(target_modules=("lm_head",)),
            dict(modules_to_save=("lm_head",)),
            "'lm_head' carries a LoRALinear already",
        ),
    ],
)
def test_two_adapters_that_cannot_share_a_module_are_refused(first, second, says):
    model = make_llama(**BIASED)
    ours_on(model, "first", **first)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=says):
        ours_on(model, "second", **second)
    assert set(model.state_dict()) == before and lora.adapters(model) == ["first"]


def test_a_module_under_another_method_is_refused():
    model = make_llama()
    bitfit.apply(model, bitfit.BitFitConfig(("lm_head",)))
    with pytest.raises(ValueError, match="'lm_head' carries a BiasLayer already"):
        ours_on(model, modules_to_save=("lm_head",))


def test_four_bits_are_no_floats_to_train_and_a_copy_of_floats_stays():
    config = dict(r=2, quantize_modules=("q_proj", "lm_head"))
    whole = qlora.QLoRAConfig(**config, modules_to_save=("lm_head",))
    model = make_llama()
    x = torch.arange(10)[None]
    plain = model(x)
    qlora.apply(model, whole)
    head = model.lm_head
    assert head.base.weight.dtype == torch.uint8
    assert head.copies["default"].weight.dtype == torch.float32
    assert (model(x) - plain).abs().max() > 0
    qlora.remove(model)
    assert torch.equal(model(x), plain)
    qlora.quantize(model, qlora.QLoRAConfig(**config))
    with pytest.raises(ValueError, match="'lm_head' is a Linear4bit whose weights"):
        ours_on(model, modules_to_save=("lm_head",))


def test_a_file_without_a_module_that_the_model_has_is_refused(tmp_path):
    ours = ours_on(make_llama())
    files.save(ours, tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    model = make_llama()
    with pytest.raises(ValueError, match=r"file lacks 'lm_head\.weight'"):
        files.load(model, tmp_path)
    assert not walk.installed(model, walk.Wrapper)
    file.write_text(json.dumps(settings | {"ensure_weight_tying": True}))
    with pytest.raises(ValueError, match="ensure_weight_tying=True is not supported"):
        files.load(model, tmp_path)


def test_half_precision_copies_are_of_the_base_s_kind_and_biases_train_in_fp32(tokens):
    settings = dict(modules_to_save=("lm_head",), bias="all")
    theirs = move(theirs_on(make_hf(**BIASED).bfloat16(), **settings))
    ours = ours_on(make_hf(**BIASED).bfloat16(), **settings)
    peers = trained(theirs)
    with torch.no_grad():
        for name, p in trained(ours).items():
            p.copy_(peers[name])
    assert ours.lm_head.copies["default"].weight.dtype == torch.bfloat16
    assert ours.model.layers[0].mlp.up_proj.biases["default"].dtype == torch.float32
    out = ours(tokens).logits
    assert out.dtype == torch.bfloat16
    close(out, theirs(tokens).logits, 0)
    lora.merge_and_unload(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_a_copy_answers_for_the_module_that_it_stands_for():
    model = ours_on(make_hf(), modules_to_save=("embed_tokens", "input_layernorm"))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, copies.WholeModule)
    assert embedding.weight is embedding.copies["default"].weight
    assert embedding.embedding_dim == 24
    norm = model.model.layers[0].input_layernorm
    assert norm.variance_epsilon == norm.base.variance_epsilon
    with pytest.raises(AttributeError, match="nonsense"):
        norm.nonsense
    lora.set_adapter(model, [])
    assert embedding.weight is embedding.base.weight


def test_rows_of_a_module_with_two_inputs_are_refused(tokens):
    model = make_llama()
    ours_on(
        model, "a", modules_to_save=("layers.0.self_attn",), target_modules=("up_proj",)
    )
    with (
        files.by_row(model, ["a", None, "a"]),
        pytest.raises(ValueError, match="called with more than one tensor"),
    ):
        model(tokens)


def test_a_copy_of_a_layer_in_another_layer_s_wrapper_is_a_layer(tokens):
    """BitFit on top of a trained copy: the change of bias is added to its output."""
    model = move(ours_on(make_llama(), modules_to_save=("lm_head",)))
    out = model(tokens)
    bitfit.apply(model, bitfit.BitFitConfig(("lm_head",)))
    nn.init.ones_(model.lm_head.vectors["default"])
    close(model(tokens), out + 1)
