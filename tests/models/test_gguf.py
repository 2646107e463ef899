"""GGUF files: what a header may say or leave out, every tensor that a Llama has, and
errors with the file and the key.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.models import checkpoint, gguf_import
from llmlab.models.llama import LlamaConfig, rope_frequencies
from tests.models import gguf_files
from tests.models.hugging_face import VARIANTS, make

IDS = torch.randint(8, (2, 40), generator=torch.Generator().manual_seed(0))
SHAPE = {"vocab_size": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}


def small(**changes):
    return make(**SHAPE | changes)


def convert(tmp_path, model, *args, **kwargs):
    """The model that comes back from a GGUF file of `model`."""
    file = gguf_files.write(model, tmp_path / "a.gguf", *args, **kwargs)
    return checkpoint.load(gguf_import.convert(file, tmp_path / "out"))


def gap(a, b) -> float:
    """How far two models' logits are apart; theirs may be a transformers model."""
    with torch.no_grad():
        a, b = (getattr(m(IDS), "logits", m(IDS)) for m in (a, b))
    return (a - b).abs().max().item()


def opened_by_transformers(folder, **how):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **how
    ).eval()


def factors(config: LlamaConfig) -> np.ndarray:
    """What convert_hf_to_gguf writes as rope_freqs: plain frequency over slowed one."""
    plain = LlamaConfig(**{**vars(config), "rope_scaling": {}})
    return (rope_frequencies(plain) / rope_frequencies(config)).numpy()


LLAMA31 = VARIANTS["llama3 rope"]
LINEAR = {"rope_type": "linear", "factor": 4.0}
SAID = {  # (the model, its header, more tensors)
    "plain": ({}, {}, {}),
    "tied": ({"tie_word_embeddings": True}, {}, {}),
    "nothing that llama.cpp does not need": (
        {"num_key_value_heads": 4},
        {
            "llama.vocab_size": None,
            "llama.attention.head_count_kv": None,
            "llama.rope.freq_base": None,
            "llama.rope.dimension_count": None,
            "tokenizer.ggml.unknown_token_id": None,
            "tokenizer.ggml.padding_token_id": None,
            "tokenizer.ggml.token_type": None,
            "tokenizer.chat_template": None,
        },
        {},
    ),
    "key_length": (
        {"head_dim": 12},
        {
            "llama.attention.key_length": 12,
            "llama.attention.value_length": 12,
            "llama.rope.dimension_count": None,
        },
        {},
    ),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}, {}),
    "linear": (
        {"rope_scaling": LINEAR},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "linear, as older files say it": (
        {"rope_scaling": LINEAR},
        {"llama.rope.scale_linear": 4.0},
        {},
    ),
    "a factor that is not used": (
        {},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "an old table of angles": ({}, {}, {"blk.0.attn_rot_embd.weight": np.ones(4, "f")}),
}


@pytest.mark.parametrize(("shape", "keys", "more"), SAID.values(), ids=SAID)
def test_what_a_file_may_say(shape, keys, more, tmp_path):
    model = small(**shape)
    ours = convert(tmp_path, model, keys, more)
    assert gap(ours, model) == 0
    assert gap(opened_by_transformers(tmp_path / "out"), model) < 1e-5
    assert ours.config.rope_scaling == model.config.rope_scaling


@pytest.mark.parametrize("linear", [1.0, 4.0])
def test_a_factor_for_each_frequency(linear, tmp_path):
    """Llama 3.1's rope_freqs; with a factor for all of them, both count."""
    model = small(**LLAMA31)
    more = {"rope_freqs.weight": factors(model.config)}
    keys = {"llama.rope.scaling.factor": linear} if linear > 1 else {}
    ours = convert(tmp_path, model, keys, more)
    model.model.theta /= linear
    assert gap(ours, model) < 1e-5
    assert gap(opened_by_transformers(tmp_path / "out"), model) < 1e-5
    assert ours.config.rope_scaling["rope_type"] == "longrope"


@pytest.mark.parametrize("shape", [{}, {"head_dim": 24}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("kind", [None, "F16", "Q8_0", "Q4_0", "Q5_1"])
def test_transformers_reads_the_same_file_alike(shape, kind, tmp_path):
    # rows are blocks of 32
    model = small(**{"hidden_size": 64, "intermediate_size": 96} | shape)
    keys = {}
    if "head_dim" in shape:
        keys = dict.fromkeys(
            ("llama.attention.key_length", "llama.attention.value_length"), 24
        )
    stored = kind and GGMLQuantizationType[kind]
    ours = convert(tmp_path, model, keys, kind=stored)
    theirs = opened_by_transformers(tmp_path, gguf_file="a.gguf")
    assert gap(ours, theirs) < 1e-5
    assert (gap(ours, model) == 0) == (kind is None)


def test_one_bias_of_four(tmp_path):
    """config.json has one flag for the four linears of attention."""
    model = small()
    bias = np.arange(32, dtype="f")
    more = {"blk.1.attn_q.bias": gguf_files.neighbours(bias, 4)}
    ours = convert(tmp_path, model, {}, more)
    for name, p in ours.named_parameters():
        if name == "model.layers.1.self_attn.q_proj.bias":
            assert p.tolist() == bias.tolist()
        elif name.endswith("bias"):
            assert not p.any(), name
    opened_by_transformers(tmp_path / "out")


WRONG_KEYS = [
    ({"general.architecture": None}, "general.architecture"),
    ({"llama.embedding_length": None}, "lacks 'llama.embedding_length'"),
    ({"llama.attention.head_count": [4, 2]}, r"head_count=\[4, 2\] must be one number"),
    ({"llama.block_count": "two"}, "llama.block_count=two must be one number"),
    ({"llama.context_length": True}, "llama.context_length=True must be one"),
    ({"llama.attention.key_length": 12}, "value_length=8 .* the 12 of .*key_length"),
    ({"llama.rope.dimension_count": 4}, "dimension_count=4 .* must be the 8"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor=2.0 must be 1"),
    ({"split.count": 3}, "split.count"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
    ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre='qwen2'"),
    ({"tokenizer.ggml.merges": None}, "lacks 'tokenizer.ggml.merges'"),
    ({"tokenizer.ggml.merges": ["a x"]}, "tokenizer.ggml.merges cannot be used.*x"),
    ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges cannot be used"),
    ({"tokenizer.ggml.eos_token_id": 8}, "eos_token_id=8, but there are 8 tokens"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries for 8"),
    ({"llama.feed_forward_length": 64}, "do not fit the header; wrong shape: .*mlp"),
    ({"llama.vocab_size": 9}, r"embed_tokens.weight is \(8, 32\), not \(9, 32\)"),
    ({"llama.block_count": 3}, "missing: model.layers.2"),
    ({"llama.block_count": 1}, "not part of this model: model.layers.1"),
    ({"llama.attention.head_count": 3}, "dimension_count=8 .* must be the 10"),
]


@pytest.mark.parametrize(("keys", "says"), WRONG_KEYS)
def test_what_is_wrong_with_a_header_is_named(keys, says, tmp_path):
    arch = "llama"
    if "general.architecture" in keys:
        arch, keys = "mamba", {}
    file = gguf_files.write(small(), tmp_path / "a.gguf", keys, arch=arch)
    with pytest.raises(ValueError, match=rf"a\.gguf: .*({says})"):
        gguf_import.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"blk.0.ffn_gate_inp.weight": np.ones((2, 32), "f")}, "ffn_gate_inp"),
        ({"odd": np.ones(2, "f")}, "not part of a Llama: odd"),
        ({"blk.0.attn_norm.weight": None}, "missing: .*0.input_layernorm"),
        ({"blk.0.attn_v.weight": np.ones((3, 32), "f")}, r"v_proj.weight is \(3, 32\)"),
        ({"blk.0.attn_q.weight": np.ones((3, 32), "f")}, "attn_q.weight has 3 rows"),
        ({"rope_freqs.weight": np.ones(3, "f")}, "must be 4 positive numbers"),
        ({"rope_freqs.weight": np.zeros(4, "f")}, "must be 4 positive numbers"),
        ({"output_norm.weight": np.ones(32, "i4")}, "output_norm.weight is stored as"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(more, says, tmp_path):
    file = gguf_files.write(small(), tmp_path / "a.gguf", more=more)
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{says}"):
        gguf_import.convert(file, tmp_path / "out")


def test_part_of_a_file_is_named(tmp_path):
    data = gguf_files.write(small(), tmp_path / "a.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for length in [*range(0, 1500, 25), *range(1500, len(data), 4001), len(data) - 1]:
        broken.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"broken\.gguf"):
            gguf_import.convert(broken, tmp_path / "out")
    broken.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(ValueError, match=r"broken\.gguf is not a GGUF file"):
        gguf_import.convert(broken, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        gguf_import.convert(tmp_path / "none.gguf", tmp_path / "out")


def test_big_endian_is_named(tmp_path):
    from gguf import GGUFEndian, GGUFWriter

    file = tmp_path / "a.gguf"
    writer = GGUFWriter(str(file), "llama", endianess=GGUFEndian.BIG)
    writer.add_key_value("llama.block_count", 1, GGUFValueType.UINT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"a\.gguf: .*big-endian"):
        gguf_import.convert(file, tmp_path / "out")


def test_llama_3s_text(tmp_path):
    """Three digits a piece, a word of the vocabulary taken whole, the first token; a
    token that a user added is found inside a word.
    """
    pieces = [*"abcdeits0123456789.,'", "Ġ", "Ċ", "'s", "ed"]
    words = ["Ġabc", "12", "123", "<tool>"]
    tokens = ["<|begin|>", *pieces, *words]
    types = [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 2)
    keys = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*types, TokenType.USER_DEFINED],
        "tokenizer.ggml.merges": ["1 2", "' s", "e d"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": None,
        "tokenizer.ggml.padding_token_id": None,
        "llama.vocab_size": None,
    }
    convert(tmp_path, small(vocab_size=len(tokens)), keys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    def split(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:]

    assert split("123412") == ["123", "4", "12"]
    assert split("it's abc") == ["i", "t", "'s", "Ġabc"]
    assert split("ed<tool>ed.\n\n") == ["ed", "<tool>", "ed", ".", "Ċ", "Ċ"]
    for text in ("it's abc, 12345.\n ed", "<tool>"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0 and tokenizer.decode(ids[1:]) == text
    assert tokenizer.bos_token == "<|begin|>" and tokenizer.pad_token is None
