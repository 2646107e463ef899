"""Compressed folders: written, opened, and refused with nothing half done."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlab.compression import formats
from llmlab.compression import quantization_basics as qb
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models import checkpoint
from tests.models.hugging_face import make

TOKENS = torch.arange(2 * 7).reshape(2, 7)


def quantised(bits=4, per="group", symmetric=True, dtype=torch.float16, **shape):
    model = make(**shape)
    config = QuantConfig(
        bits, symmetric=symmetric, per=per, group_size=16, scale_dtype=dtype
    )
    return qb.apply(model, config)


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["group", "row"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12, "num_key_value_heads": 2},
    ],
)
def test_a_model_comes_back_with_the_same_outputs(
    tmp_path, format, symmetric, per, shape
):
    model = quantised(per=per, symmetric=symmetric, **shape)
    back = formats.load(formats.save(model, tmp_path / "out", format))
    assert torch.equal(back(TOKENS), model(TOKENS))
    assert back.config == model.config
    # packed in memory, too: not a float per weight
    assert qb.nbytes(back) < 1.1 * qb.nbytes(model)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_bits_in_compressed_tensors(tmp_path, bits):
    model = quantised(bits, num_key_value_heads=2)
    back = formats.load(formats.save(model, tmp_path, "compressed-tensors"))
    assert torch.equal(back(TOKENS), model(TOKENS))


def test_scales_and_floats_keep_their_dtype_unless_told(tmp_path):
    model = quantised(dtype=torch.bfloat16)
    formats.save(model, tmp_path, dtype=torch.float16)
    state = load_file(tmp_path / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    assert state[scale].dtype == torch.bfloat16
    assert state["model.embed_tokens.weight"].dtype == torch.float16
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == "float16"


def test_symmetric_codes_of_other_libraries_begin_at_minus_eight(tmp_path):
    model = quantised()
    formats.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.down_proj"
    state[f"{name}.weight_packed"][:] = 0  # code 0 is −8
    save_file(state, file, metadata={"format": "pt"})
    found = formats.load(tmp_path).get_submodule(name)
    scale = found.scale.reshape(found.shape[0], -1)
    want = (-8 * scale.float()).repeat_interleave(16, dim=1)
    assert torch.equal(found.weight, want)


def test_a_folder_of_floats_is_opened_as_before(tmp_path):
    model = make()
    checkpoint.save(model, tmp_path)
    assert torch.equal(formats.load(tmp_path)(TOKENS), model(TOKENS))


def test_what_cannot_be_written_leaves_no_folder(tmp_path):
    folder = tmp_path / "out"
    half = quantised()
    half.model.layers[1].mlp.up_proj = make().model.layers[1].mlp.up_proj
    cases = [
        (make(), "compressed-tensors", "no QuantLinear"),
        (quantised(), "gguf", "format='gguf' must be one of"),
        (quantised(8), "awq", "bits=8 must be one of"),
        (quantised(per="tensor"), "gptq", "per='tensor' must be"),
        (half, "gptq", r"layers\.1\.mlp\.up_proj is a Linear and others are"),
    ]
    for model, format, words in cases:
        with pytest.raises(ValueError, match=words):
            formats.save(model, folder, format)
        assert not folder.exists()


def described(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= changes
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("format", "changes", "words"),
    [
        ("gptq", {"quant_method": "hqq"}, "quant_method='hqq' is not supported"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported"),
        ("compressed-tensors", {"format": "nvfp4"}, "format='nvfp4' with 1"),
        ("compressed-tensors", {"config_groups": {}}, "with 0 config_groups"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, format, changes, words):
    formats.save(quantised(), tmp_path, format)
    described(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        formats.load(tmp_path)


def test_a_tensor_that_is_missing_or_does_not_fit_is_named(tmp_path):
    formats.save(quantised(), tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj.qweight"
    without = {key: t for key, t in whole.items() if key != name}
    save_file(without, file)
    with pytest.raises(ValueError, match="up_proj lacks 'qweight'; the file holds"):
        formats.load(tmp_path)
    save_file(whole | {name: whole[name][:, :-1].contiguous()}, file)
    with pytest.raises(ValueError, match="up_proj has codes of shape"):
        formats.load(tmp_path)


def test_the_tokenizer_goes_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    formats.save(quantised(), tmp_path / "out", tokenizer_from=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
