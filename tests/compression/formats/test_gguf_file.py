"""GGUF files: read back here and by transformers."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from llmlab.compression import formats
from llmlab.compression import quantization_basics as qb
from llmlab.compression.formats import gguf_file
from llmlab.models import checkpoint, course_model, gguf_import
from llmlab.models.llama import Llama
from tests.models.hugging_face import make

TOKENS = torch.arange(2 * 7).reshape(2, 7)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}


def read(file) -> Llama:
    """A GGUF file without a tokenizer, as our Llama."""
    reader = gguf_import._open(file)
    config = gguf_import.read_config(reader)
    model = Llama(config)
    state = gguf_import._state(reader, config, lambda done, total: None)
    checkpoint.check(model, state)
    return checkpoint.fill(model, state).eval()


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12, "num_key_value_heads": 2},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ],
)
def test_floats_come_back_as_they_were(tmp_path, shape):
    model = make(**shape)
    file = formats.save_gguf(model, tmp_path / "m.gguf", "F32", embedding="F32")
    assert torch.equal(read(file)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0"])
def test_linears_hold_what_the_package_makes_of_them(tmp_path, kind):
    model = make(**WIDE)
    back = read(formats.save_gguf(model, tmp_path / "m.gguf", kind))
    stored_as = gguf.GGMLQuantizationType[kind]
    for name in ("mlp.up_proj", "self_attn.o_proj"):
        ours = model.model.layers[1].get_submodule(name).weight.detach().numpy()
        want = gguf.dequantize(gguf.quantize(ours, stored_as), stored_as)
        found = back.model.layers[1].get_submodule(name).weight.detach().numpy()
        np.testing.assert_array_equal(found, want)
    assert torch.equal(back.model.norm.weight, model.model.norm.weight)


def test_packed_linears_are_decoded_first(tmp_path):
    model = qb.apply(make(), qb.QuantConfig(per="row"))
    back = read(formats.save_gguf(model, tmp_path / "m.gguf", "F32", embedding="F32"))
    torch.testing.assert_close(back(TOKENS), model(TOKENS))


def test_rows_for_rope_go_there_and_back():
    weight = np.arange(24 * 5.0).reshape(24, 5)
    there = gguf_file.neighbours(weight, 2)
    # head 0: rows 0 and 6 turn together, and are neighbours in GGUF
    np.testing.assert_array_equal(there[:2], weight[[0, 6]])
    np.testing.assert_array_equal(gguf_import.half_split(there, 2), weight)


def test_transformers_opens_it_with_the_same_numbers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = course_model.load()
    formats.save_gguf(model, tmp_path / "m.gguf", "Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    tokens = torch.arange(2 * 9).reshape(2, 9)
    ours = read(tmp_path / "m.gguf")(tokens).detach()
    found = theirs(tokens).logits.detach()
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    raw = json.loads(course_model.load_tokenizer().to_str())
    raw["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenizer.json").write_text(json.dumps(raw))
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"splits text by \['Whitespace'\]"):
        formats.save_gguf(make(), folder / "m.gguf", "F32", tokenizer_from=source)
    raw["model"]["type"] = "Unigram"
    (source / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="holds a Unigram tokenizer"):
        formats.save_gguf(make(), folder / "m.gguf", "F32", tokenizer_from=source)
    assert not folder.exists()


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    file = tmp_path / "m.gguf"
    slowed = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    cases = [
        (make(), {"kind": "Q3_K"}, "kind='Q3_K' must be one of"),
        (make(), {"embedding": "Q2"}, "embedding='Q2' must be one of"),
        (make(intermediate_size=40), {}, "has rows of 40 weights; Q4_0 needs"),
        (make(rope_scaling=slowed), {"kind": "F32"}, "rope_type='llama3' is not"),
    ]
    for model, settings, words in cases:
        with pytest.raises(ValueError, match=words):
            formats.save_gguf(model, file, **settings)
        assert not list(tmp_path.iterdir())
