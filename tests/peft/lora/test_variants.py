"""DoRA, PiSSA and OLoRA against `peft` and their equations; layers that are left out;
what a folder may lack.
"""

import json

import pytest
import torch
from torch import nn

from llmlab.peft import qlora, walk
from llmlab.peft.lora import files, lora, starts
from llmlab.peft.lora.lora import LoRAConfig
from tests.peft.conftest import make_hf, make_llama
from tests.peft.lora.test_lora import loss_of

ODD = ("q_proj", "v_proj", "down_proj")
CASES = {
    "DoRA": dict(r=3, alpha=7, target_modules=ODD, dora=True),
    "PiSSA": dict(r=3, alpha=7, target_modules=ODD, init="pissa"),
    "PiSSA, √r, patterns": dict(
        r=2,
        alpha=5,
        target_modules=ODD,
        init="pissa",
        rslora=True,
        rank_pattern={"v_proj": 4},
        alpha_pattern={"down_proj": 3},
    ),
    "OLoRA": dict(r=4, alpha=2, target_modules=ODD, init="olora"),
    "DoRA from PiSSA": dict(r=2, alpha=4, target_modules=ODD, dora=True, init="pissa"),
    "without one layer": dict(
        r=2, alpha=8, target_modules=ODD, exclude_modules=("layers.0.self_attn.q_proj",)
    ),
    "without those of an expression": dict(
        r=2, alpha=8, target_modules=ODD, exclude_modules=r".*\.1\.mlp\..*"
    ),
    "one block": dict(r=2, alpha=8, target_modules=ODD, layers_to_transform=(1,)),
}
NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "init": "init_lora_weights",
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def theirs_on(model, **case):
    import peft

    found = {}
    for name, value in case.items():
        found[NAMES.get(name, name)] = list(value) if type(value) is tuple else value
    return peft.get_peft_model(model, peft.LoraConfig(**found, task_type="CAUSAL_LM"))


def move(model, seed=1):
    """Trains: every trained number goes a little way, the same in ours and theirs."""
    dice = torch.Generator().manual_seed(seed)
    trained = {short(n): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in sorted(trained):
            p = trained[name]
            p.add_(0.1 * torch.randn(p.shape, generator=dice))
    return model


def short(name):
    """'0.self_attn.q_proj.lora_A', in our words, of a trained parameter's name."""
    for theirs, ours in {
        "lora_magnitude_vector": "magnitude",
        ".default.weight": "",
        ".default": "",
        "base_model.model.": "",
    }.items():
        name = name.replace(theirs, ours)
    return name


def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@every_case
def test_forward_and_gradients_are_peft_s(case, tokens):
    theirs = move(theirs_on(make_hf(), **case))
    ours = move(lora.apply(make_llama(), LoRAConfig(**case)))
    copied = {short(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    trained = {short(n): p for n, p in ours.named_parameters() if p.requires_grad}
    assert copied.keys() == trained.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(copied[name])
    close(ours(tokens), theirs(tokens).logits)
    loss_of(ours(tokens), tokens).backward()
    loss_of(theirs(tokens).logits, tokens).backward()
    for name, p in trained.items():
        close(p.grad, copied[name].grad)
    number = lora.num_parameters(make_llama(), LoRAConfig(**case))
    assert number == theirs.get_nb_trainable_parameters()[0]


@every_case
def test_we_open_what_peft_saves(case, tokens, tmp_path):
    theirs = move(theirs_on(make_hf(), **case))
    theirs.save_pretrained(tmp_path)
    for base in (make_llama(), make_hf()):
        plain = logits(base, tokens)
        ours = files.load(base, tmp_path)
        close(logits(ours, tokens), theirs(tokens).logits)
        assert (logits(ours, tokens) - plain).abs().max() > 0.01


@every_case
def test_peft_and_we_open_what_we_save(case, tokens, tmp_path):
    import peft

    ours = move(lora.apply(make_llama(), LoRAConfig(**case)))
    files.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_hf(), tmp_path).eval()
    close(theirs(tokens).logits, ours(tokens))
    close(files.load(make_llama(), tmp_path)(tokens), ours(tokens))


@every_case
def test_the_start_merging_and_taking_off(case, tokens):
    model = make_llama()
    plain = model(tokens)
    lora.apply(model, LoRAConfig(**case))
    close(model(tokens), plain)
    move(model)
    out = model(tokens)
    assert (out - plain).abs().max() > 0.01
    lora.merge(model)
    close(model(tokens), out)
    lora.unmerge(model)
    assert torch.equal(model(tokens), out)
    assert torch.equal(lora.remove(model)(tokens), plain)


@pytest.mark.parametrize("name", ["DoRA", "PiSSA", "DoRA from PiSSA"])
def test_dropout_falls_on_the_trained_path(name, tokens):
    case = CASES[name] | {"dropout": 0.4}
    theirs = move(theirs_on(make_hf(), **case)).train()
    ours = lora.apply(make_llama(), LoRAConfig(**case)).train()
    copied = {short(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if p.requires_grad:
                p.copy_(copied[short(n)])
    torch.manual_seed(5)
    mine = ours(tokens)
    torch.manual_seed(5)
    close(mine, theirs(tokens).logits)


def test_pissa_takes_out_the_best_approximation():
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    A, B = starts.pissa(W, 2, scaling=3.0)
    S = torch.linalg.svdvals(W)
    close((W - 3 * B @ A).norm(), S[2:].norm())
    # A and B share the singular values evenly
    close(A.norm(dim=1), B.norm(dim=0))


def test_dora_keeps_directions_and_lengths_apart():
    """Twice the lengths, and W₀ + ΔW in the same direction: h is doubled."""
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 5, bias=False)})
    x = torch.randn(3, 6)
    plain = model["q_proj"](x)
    lora.apply(model, LoRAConfig(r=2, target_modules=("q_proj",), dora=True))
    with torch.no_grad():
        model["q_proj"].magnitude["default"].mul_(2)
    close(model["q_proj"](x), 2 * plain)


def test_dora_on_our_four_bits_equals_dora_on_what_they_stand_for(tokens):
    case = dict(r=2, target_modules=("q_proj",), dora=True, init="pissa")
    coded = qlora.quantize(make_llama(), qlora.QLoRAConfig(r=2, block=32))
    plain = make_llama()
    for name, layer in walk.places(coded):
        if hasattr(layer, "dequantized"):
            walk.replace(plain, name, layer.dequantized())
    ours = move(lora.apply(coded, LoRAConfig(**case)))
    close(ours(tokens), move(lora.apply(plain, LoRAConfig(**case)))(tokens))


def test_several_adapters_of_several_kinds(tokens):
    model = make_llama()
    base = model(tokens)
    outs = {}
    for name in ("DoRA", "PiSSA"):
        move(lora.apply(model, LoRAConfig(**CASES[name]), name))
        outs[name] = model(tokens)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".PiSSA" in name for name in trained)
    lora.set_adapter(model, "DoRA")
    close(model(tokens), outs["DoRA"])
    assert all(".DoRA" in name for name in training(model))
    assert any(".magnitude.DoRA" in name for name in training(model))
    with files.by_row(model, ["PiSSA", None, "DoRA"]):
        rows = model(tokens)
    for i, want in enumerate((outs["PiSSA"], base, outs["DoRA"])):
        close(rows[i], want[i])
    with pytest.raises(ValueError, match="DoRA sets the lengths"):
        lora.set_adapter(model, ["DoRA", "PiSSA"])
    with pytest.raises(ValueError, match="'DoRA' trains with DoRA"):
        files.combine(model, {"DoRA": 1.0}, "mixed")
    files.combine(model, {"PiSSA": 1.0}, "mixed")
    close(model(tokens), outs["PiSSA"])


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_contexts_put_back_what_was_before(tokens):
    model = make_llama()
    for name in ("a", "b", "c"):
        move(lora.apply(model, LoRAConfig(r=2), name), seed=ord(name))
    lora.set_adapter(model, ["a", "b"])
    out, trains = model(tokens), training(model)
    with files.by_row(model, ["a", "b", "c"]):
        rows = model(tokens)
        with files.by_row(model, [None, None, "a"]), files.disabled(model):
            lora.set_adapter(model, "c")
        assert torch.equal(model(tokens), rows)
    assert torch.equal(model(tokens), out) and training(model) == trains
    with files.disabled(model):
        lora.set_adapter(model, "c")
    assert torch.equal(model(tokens), out) and training(model) == trains


def test_rows_train_every_adapter_that_they_name(tokens):
    model = make_llama()
    for name in ("a", "b", "c"):
        move(lora.apply(model, LoRAConfig(r=2), name), seed=ord(name))
    with files.by_row(model, ["a", None, "b"]):
        loss_of(model(tokens), tokens).backward()
    found = [n for n, p in model.named_parameters() if p.grad is not None]
    assert {name.rsplit(".", 1)[1] for name in found} == {"a", "b"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (dict(init="pisa"), "init='pisa' is not one of"),
        (dict(r=9, init="pissa", target_modules=("k_proj",)), "has 8 directions"),
        (dict(exclude_modules=("q_proj", "v_proj")), "leave no layer"),
        (dict(layers_to_transform=(7,)), "leave no layer"),
        (dict(layers_to_transform=(0,), target_modules=("z",)), "no layer is called"),
    ],
)
def test_what_cannot_be_is_named_and_changes_nothing(case, message, llama):
    with pytest.raises(ValueError, match=message):
        lora.apply(llama, LoRAConfig(**case))
    assert not walk.installed(llama, walk.Wrapper)
    assert all(p.requires_grad for p in llama.parameters())


# Folders ------------------------------------------------------------------------------


def test_a_folder_of_2023(tokens, tmp_path):
    theirs = move(theirs_on(make_hf(), r=2, target_modules=ODD))
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    close(files.load(make_llama(), tmp_path)(tokens), theirs(tokens).logits)


def change(folder, **settings):
    file = folder / "adapter_config.json"
    found = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))


@pytest.mark.parametrize("nothing", ["gone", None])
def test_what_is_missing_is_as_peft_has_it(nothing, tokens, tmp_path):
    import peft

    theirs = move(theirs_on(make_hf(), r=8, alpha=8, target_modules=ODD))
    theirs.save_pretrained(tmp_path)
    missing = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "init_lora_weights")
    change(tmp_path, **dict.fromkeys(missing, nothing))
    close(files.load(make_llama(), tmp_path)(tokens), theirs(tokens).logits)
    if nothing == "gone":
        theirs = peft.PeftModel.from_pretrained(make_hf(), tmp_path)
        close(files.load(make_llama(), tmp_path)(tokens), theirs(tokens).logits)
    change(tmp_path, target_modules=nothing)
    with pytest.raises(
        ValueError, match=r"adapter_config\.json has no 'target_modules'"
    ):
        files.load(make_llama(), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adapter_config.json", "[1]", "adapter_config.json holds a list"),
        ("adapter_config.json", "{", "adapter_config.json is not JSON"),
        ("adapter_model.safetensors", "x", "adapter_model.safetensors is not a"),
        ("adapter_model.bin", "x", "adapter_model.bin cannot be read"),
    ],
)
def test_a_broken_file_is_named(name, text, message, tmp_path, llama):
    files.save(lora.apply(make_llama(), LoRAConfig()), tmp_path)
    if name.endswith(".bin"):
        (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        files.load(llama, tmp_path)


def test_a_bin_of_other_things_than_tensors_is_refused(tmp_path, llama):
    files.save(lora.apply(make_llama(), LoRAConfig()), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": [1, 2]}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds other things than tensors"):
        files.load(llama, tmp_path)
