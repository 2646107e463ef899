"""Adapters after training: files exchanged with `peft` both ways, mixtures, one adapter
a row.
"""

import json

import pytest
import torch

from llmlab.peft import walk
from llmlab.peft.lora import files, lora
from llmlab.peft.lora.lora import LoRAConfig
from tests.peft.conftest import make_hf, make_llama, randomise
from tests.peft.lora.test_lora import CASES, peft_model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_peft_opens_what_we_save(case, tokens, tmp_path):
    import peft

    ours = randomise(lora.apply(make_llama(), LoRAConfig(**case, dropout=0.1)))
    files.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_hf(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = files.load(make_llama(), tmp_path / "again")
    assert torch.equal(again(tokens), ours(tokens))


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_we_open_what_peft_saves(case, kind, tokens, tmp_path):
    theirs = randomise(peft_model(make_hf(), **case))
    theirs.save_pretrained(tmp_path)
    ours = files.load(make_llama() if kind == "ours" else make_hf(), tmp_path, "theirs")
    out = ours(tokens)
    torch.testing.assert_close(
        getattr(out, "logits", out), theirs(tokens).logits, rtol=0, atol=1e-5
    )
    assert lora.adapters(ours) == ["theirs"]


def test_the_file_holds_the_names_that_peft_writes(tmp_path):
    from safetensors.torch import load_file

    case = dict(r=2, alpha=4, target_modules=("q_proj", "v_proj"))
    peft_model(make_hf(), **case).save_pretrained(tmp_path / "theirs")
    files.save(lora.apply(make_llama(), LoRAConfig(**case)), tmp_path / "ours")
    ours, theirs = (
        load_file(tmp_path / side / "adapter_model.safetensors")
        for side in ("ours", "theirs")
    )
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items()
    }
    ours, theirs = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    )
    assert ours.keys() <= theirs.keys()
    assert {k: v for k, v in ours.items() if k != "target_modules"} == {
        k: theirs[k] for k in ours if k != "target_modules"
    }
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bias", "boft_only"),
        ("ensure_weight_tying", True),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("layers_pattern", "layers"),
        ("corda_config", {"corda_method": "kpm"}),
        ("a_setting_of_next_year", 0.5),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_a_setting_that_is_not_plain_lora_is_named(setting, value, tmp_path, llama):
    files.save(lora.apply(make_llama(), LoRAConfig()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=setting):
        files.load(llama, tmp_path)


def test_a_wrong_shape_names_the_tensor_and_leaves_the_model_alone(tmp_path, tokens):
    files.save(
        lora.apply(make_llama(hidden_size=36, head_dim=4), LoRAConfig()), tmp_path
    )
    model = make_llama()
    with pytest.raises(
        ValueError,
        match=(
            r"layers\.0\.self_attn\.q_proj\.lora_A\.weight.*\(8, 36\).*needs \(8, 24\)"
        ),
    ):
        files.load(model, tmp_path)
    assert lora.adapters(model) == [] and not walk.installed(model, walk.Wrapper)


@pytest.mark.parametrize(
    ("change", "message"), [(0.0, None), (0.1, "'lm_head.base_layer.weight'.*no place")]
)
def test_base_weights_in_the_file_are_passed_over_only_if_they_are_this_model_s(
    change, message, tmp_path
):
    theirs = peft_model(make_hf(), r=2, alpha=4, target_modules=("lm_head",))
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight += change
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    if message is None:
        assert lora.adapters(files.load(make_llama(), tmp_path)) == ["default"]
        return
    with pytest.raises(ValueError, match=message):
        files.load(make_llama(), tmp_path)


def test_only_an_adapter_that_is_there_is_saved(llama, tmp_path):
    with pytest.raises(ValueError, match="'bible' is not on the model"):
        files.save(llama, tmp_path, "bible")


# Several adapters ---------------------------------------------------------------------


@pytest.fixture
def two(llama):
    randomise(
        lora.apply(
            llama, LoRAConfig(r=2, alpha=6, target_modules=("q_proj", "v_proj")), "a"
        ),
        1,
    )
    with torch.no_grad():
        lora.apply(
            llama,
            LoRAConfig(
                r=3, alpha=3, target_modules=("q_proj", "down_proj"), rslora=True
            ),
            "b",
        )
        dice = torch.Generator().manual_seed(9)
        for name, p in llama.named_parameters():
            if name.endswith(".b"):
                p.copy_(torch.randn(p.shape, generator=dice) * 0.1)
    return llama


def logits_of(model, adapters, tokens):
    lora.set_adapter(model, adapters)
    return model(tokens)


def test_the_newest_adapter_is_active_and_alone_trains(two):
    assert lora.adapters(two) == ["a", "b"]
    assert all(n.endswith(".b") for n, p in two.named_parameters() if p.requires_grad)


def test_disabled_is_the_base_and_gives_the_adapters_back(two, tokens):
    adapted = two(tokens)
    with files.disabled(two):
        torch.testing.assert_close(two(tokens), make_llama()(tokens), rtol=0, atol=0)
    assert torch.equal(two(tokens), adapted)
    with pytest.raises(KeyError), files.disabled(two):
        raise KeyError
    assert torch.equal(two(tokens), adapted)


def test_a_mixture_has_exactly_the_weighted_sum_of_the_changes(two, tokens):
    files.combine(two, {"a": 0.3, "b": -0.7}, "mix")
    for layer in walk.installed(two, lora.LoRALinear).values():
        delta = {
            n: lora.delta_weight(layer.lora_A[n], layer.lora_B[n], layer.scaling[n])
            for n in layer.configs
        }
        expected = 0.3 * delta.get("a", 0) - 0.7 * delta.get("b", 0)
        torch.testing.assert_close(delta["mix"], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(
        logits_of(two, "mix", tokens), logits_of(two, "a", tokens)
    )


def test_a_mixture_of_one_is_that_one_and_can_be_saved(two, tokens, tmp_path):
    files.combine(two, {"b": 1.0}, "twin")
    torch.testing.assert_close(
        logits_of(two, "twin", tokens), logits_of(two, "b", tokens), rtol=0, atol=1e-5
    )
    files.combine(two, {"a": 0.5, "b": 0.5}, "mix")
    files.save(two, tmp_path, "mix")
    loaded = files.load(make_llama(), tmp_path)
    assert torch.equal(loaded(tokens), logits_of(two, "mix", tokens))


def test_a_mixture_is_peft_s_cat(tokens):
    import peft

    theirs = peft_model(make_hf(), r=2, alpha=6, target_modules=("q_proj", "v_proj"))
    theirs.add_adapter(
        "b", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    )
    randomise(theirs)
    ours = make_llama()
    lora.apply(ours, LoRAConfig(r=2, alpha=6))
    lora.apply(ours, LoRAConfig(r=3, alpha=3), "b")
    from tests.peft.lora.test_lora import copy_factors

    copy_factors(theirs, ours)
    theirs.add_weighted_adapter(
        ["default", "b"], [0.3, 0.6], "mix", combination_type="cat"
    )
    theirs.set_adapter("mix")
    files.combine(ours, {"default": 0.3, "b": 0.6}, "mix")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_each_row_goes_through_its_own_adapter(two, tokens):
    expected = torch.stack(
        [logits_of(two, a, tokens)[i] for i, a in enumerate(["b", [], "a"])]
    )
    lora.set_adapter(two, ["a", "b"])
    with files.by_row(two, ["b", None, "a"]):
        torch.testing.assert_close(two(tokens), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        two(tokens), logits_of(two, ["a", "b"], tokens), rtol=0, atol=0
    )


def test_rows_are_peft_s_adapter_names(tokens):
    import peft

    from tests.peft.lora.test_lora import copy_factors

    theirs = peft_model(make_hf(), r=2, alpha=6, target_modules=("q_proj", "v_proj"))
    theirs.add_adapter(
        "b", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    )
    randomise(theirs)
    ours = lora.apply(
        lora.apply(make_llama(), LoRAConfig(r=2, alpha=6)),
        LoRAConfig(r=3, alpha=3),
        "b",
    )
    copy_factors(theirs, ours)
    with files.by_row(ours, ["b", None, "default"]):
        mine = ours(tokens)
    expected = theirs.eval()(tokens, adapter_names=["b", "__base__", "default"]).logits
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def test_rows_must_fit_the_batch_and_name_what_is_there(two, tokens):
    with (
        pytest.raises(ValueError, match="rows names 2 adapters for a batch of 3"),
        files.by_row(two, ["a", "b"]),
    ):
        two(tokens)
    with (
        pytest.raises(ValueError, match="'c' is not on the model"),
        files.by_row(two, ["a", "b", "c"]),
    ):
        pass
    assert all(
        layer.rows is None for layer in walk.installed(two, lora.LoRALinear).values()
    )


def test_merged_adapters_cannot_be_mixed_served_or_disabled(two, llama):
    lora.merge(two)
    for call in (
        lambda: files.combine(two, {"a": 1.0}, "mix"),
        lambda: files.by_row(two, ["a"]).__enter__(),
        lambda: files.disabled(two).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
            call()


def test_a_mixture_of_nothing_is_refused(two):
    with pytest.raises(ValueError, match="no adapter to combine"):
        files.combine(two, {}, "mix")
