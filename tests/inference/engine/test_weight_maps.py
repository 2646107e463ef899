"""Weight maps against transformers, definitions where it has none, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llmlab.inference.engine import weight_maps
from llmlab.inference.engine.weight_maps import FAMILIES, Family, Row, split_qkv
from llmlab.models import checkpoint, course_model
from llmlab.models.llama import Llama
from tests.models.hugging_face import make, theirs

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
IDS = torch.tensor([[3, 9, 27, 40, 12, 58, 1], [7, 7, 2, 33, 60, 5, 41]])


def random_model(kind: str, **changes):
    """A tiny model of transformers' class, norms and biases random, too."""
    import transformers

    name = {"qwen2": "Qwen2", "phi3": "Phi3", "mistral": "Mistral"}.get(kind)
    name = name or kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**SHAPE | changes)
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float("norm" in key), std=0.2)
    return model


CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral, a window as long as any text": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2 tied, mqa": (
        "qwen2",
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "phi3": ("phi3", {}),
    "phi3, no groups": ("phi3", {"num_key_value_heads": 4}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite tied, biases": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    kind, changes = CASES[case]
    model = random_model(kind, **changes)
    model.save_pretrained(tmp_path)
    ours = weight_maps.load(tmp_path)
    with torch.no_grad():
        wanted = model(IDS).logits
        torch.testing.assert_close(ours(IDS), wanted, atol=1e-5, rtol=1e-5)


def store(folder, raw: dict, state: dict) -> None:
    """A checkpoint folder of a family that transformers does not have."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def baichuan(model: Llama, vocabulary: int | None = None) -> tuple[dict, dict]:
    """A Llama without groups in Baichuan's names: W_pack is q over k over v."""
    raw = checkpoint.config_to_hf(model.config) | {"model_type": "baichuan"}
    state = dict(model.state_dict())
    for i in range(model.config.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        parts = [state.pop(f"{at}{x}_proj.weight") for x in "qkv"]
        state[f"{at}W_pack.weight"] = torch.cat(parts)
    return raw, state


def test_baichuan_by_its_definition(tmp_path):
    model = make()
    store(tmp_path, *baichuan(model))
    torch.testing.assert_close(
        weight_maps.load(tmp_path)(IDS), theirs(model)(IDS).logits
    )


def test_baichuan_2_has_a_head_with_unit_rows(tmp_path):
    model = make(vocab_size=125696, hidden_size=8, num_attention_heads=2)
    store(tmp_path, *baichuan(model))
    ours = weight_maps.load(tmp_path)
    with torch.no_grad():
        h = ours.model(
            ours.model.embed_tokens(IDS), torch.arange(7)[None], None, None, attend
        )
        head = model.lm_head.weight
        wanted = h @ (head / head.norm(dim=1, keepdim=True)).T
        h = ours.lm_head(h)
    torch.testing.assert_close(h, wanted)


def attend(q, k, v, mask):
    """Causal attention, as a cache-less pass has it."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def internlm2_qkv(x: torch.Tensor, wqkv: torch.Tensor, H: int, K: int):
    """What InternLM2 computes: (h gs d) of each token, gs = 2 + H / K."""
    G = H // K
    states = (x @ wqkv.T).view(len(x), K, G + 2, -1)
    q = states[:, :, :G].flatten(1, 2)  # (tokens, H, D)
    return q, states[:, :, -2], states[:, :, -1]


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_by_its_definition(bias, tmp_path):
    model = make(num_key_value_heads=2, attention_bias=bias)
    raw = checkpoint.config_to_hf(model.config) | {"model_type": "internlm2"}
    raw["bias"] = raw.pop("attention_bias")
    names = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "lm_head": "output",
    }
    state = {}
    source = model.state_dict()
    for name, tensor in source.items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
            continue
        state[name] = tensor
    for i in range(2):
        for kind in ("weight", "bias") if bias else ("weight",):
            q, k, v = (
                source[f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"
            )
            rows = []  # two groups: two query heads of 8 channels, a key, a value
            for g in range(2):
                rows += [q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8]]
                rows += [v[8 * g : 8 * g + 8]]
            state[f"model.layers.{i}.attention.wqkv.{kind}"] = torch.cat(rows)
    store(tmp_path, raw, state)
    torch.testing.assert_close(weight_maps.load(tmp_path)(IDS), model(IDS))
    if not bias:
        x = torch.randn(5, 32)
        packed = state["model.layers.0.attention.wqkv.weight"]
        parts = split_qkv(packed, 4, 2, "grouped")
        for got, wanted in zip(parts, internlm2_qkv(x, packed, 4, 2), strict=True):
            torch.testing.assert_close(x @ got.T, wanted.flatten(1))


def test_a_grouped_layout_with_one_head_a_group_is_neox():
    packed = torch.arange(18.0)  # 3 heads, D = 2: q k v, q k v, q k v
    q, k, v = split_qkv(packed, 3, 3, "grouped")
    assert q.tolist() == [0, 1, 6, 7, 12, 13]
    assert k.tolist() == [2, 3, 8, 9, 14, 15]
    assert v.tolist() == [4, 5, 10, 11, 16, 17]


def test_the_course_model_comes_as_it_is():
    config, state = weight_maps.read(course_model.MODEL)
    model = course_model.load()
    assert config == model.config
    torch.testing.assert_close(weight_maps.as_model(config, state)(IDS), model(IDS))


def test_a_transposed_matrix():
    model = make()
    rows = weight_maps.llama_map({})
    name = "model.layers.{}.mlp.up_proj.weight"
    rows = [replace(r, how="transpose") if r.source == name else r for r in rows]
    state = dict(model.state_dict())
    for i in range(2):
        key = name.replace("{}", str(i))
        state[key] = state[key].T
    _, found = weight_maps.convert(rows, state, model.config)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize(
    ("packed", "heads", "kv_heads", "layout", "message"),
    [
        (torch.zeros(8, 2), 2, 1, "mixed", "layout='mixed'"),
        (torch.zeros(10, 2), 2, 1, "stacked", "packed has 10 rows"),
        (torch.zeros(0, 2), 2, 1, "grouped", "packed has 0 rows"),
        (torch.zeros(8, 2), 3, 2, "grouped", "heads=3 must be a multiple"),
    ],
)
def test_split_refuses(packed, heads, kv_heads, layout, message):
    with pytest.raises(ValueError, match=message):
        split_qkv(packed, heads, kv_heads, layout)


# Refusals ---------------------------------------------------------------------------

RAW = SHAPE | {"hidden_act": "silu", "rms_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma", {}, "model_type='gemma' has no weight map"),
        ("mistral", {"sliding_window": 16}, "sliding_window=16, below max_position"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32},
            "sliding_window=32",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_ty"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ("phi3", {"sliding_window": 63}, "sliding_window=63"),
        ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_that_llama_cannot_express(kind, changes, message):
    raw = RAW | {"model_type": kind} | changes
    with pytest.raises(ValueError, match=message):
        weight_maps.family_of(raw).config(raw)


def test_baichuan_13b_is_refused_by_its_missing_field():
    raw = RAW | {"model_type": "baichuan", "model_max_length": 4096}
    del raw["max_position_embeddings"]
    with pytest.raises(ValueError, match="max_position_embeddings: it uses ALiBi"):
        weight_maps.family_of(raw).config(raw)


def test_a_window_that_is_switched_off_is_none():
    raw = RAW | {"model_type": "qwen2", "use_sliding_window": False}
    raw["sliding_window"] = 8
    assert FAMILIES["qwen2"].config(raw).attention_bias


def spoilt(change) -> str:
    """What is said about Baichuan's checkpoint after `change(rows, state)`."""
    model = make()
    raw, state = baichuan(model)
    rows = weight_maps.baichuan_map(raw)
    rows = change(rows, state) or rows
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError) as error:
        weight_maps.convert(rows, state, model.config)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, before[name])
    return str(error.value)


PACK = "model.layers.{}.self_attn.W_pack.weight"


def cut(rows, state):
    state[PACK.replace("{}", "1")] = torch.zeros(95, 32)


def narrow(rows, state):
    state["model.norm.weight"] = torch.zeros(31)


def integers(rows, state):
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)


REFUSED = [
    (lambda r, s: s.update({"model.extra": torch.zeros(2)}), "in no row: model.extra"),
    (lambda r, s: s.pop("model.norm.weight"), "missing in the checkpoint: model.norm"),
    (
        lambda r, s: [x for x in r if x.source != PACK],
        "not written by any row: model.la",
    ),
    (
        lambda r, s: [*r, Row("lm_head.weight", ("lm_head.weight",))],
        "written twice: lm",
    ),
    (
        lambda r, s: [*r, Row("lm_head.weight", ("head",))],
        "not part of our Llama: head",
    ),
    (lambda r, s: [replace(x, how="fold") for x in r], "no function is called: fold"),
    (
        lambda r, s: [replace(x, how="halves") if x.source == PACK else x for x in r],
        "2 parts, 3 names",
    ),
    (cut, "layers.1.self_attn.W_pack.weight, stacked: packed has 95 rows"),
    (narrow, r"model.norm.weight gives model.norm.weight \(31,\), not \(32,\)"),
    (integers, "lm_head.weight, copy: its numbers are torch.int8"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_named(change, message):
    import re

    assert re.search(message, spoilt(lambda r, s: as_rows(change(r, s))))


def as_rows(value):
    """What a change returned, if it is a map."""
    return value if isinstance(value, list) else None


def test_the_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        weight_maps.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=f"{tmp_path.name}: model_type='bert'"):
        weight_maps.read(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="model_type=None"):
        weight_maps.read(tmp_path)


def test_a_family_of_ones_own(tmp_path):
    """A model is added without a change to the package: Llama with other names."""
    model = make(num_key_value_heads=2)
    raw = checkpoint.config_to_hf(model.config) | {"model_type": "mine"}
    state = {f"x.{name}": tensor for name, tensor in model.state_dict().items()}
    store(tmp_path, raw, state)

    def rows(raw):
        return [replace(r, source=f"x.{r.source}") for r in weight_maps.llama_map(raw)]

    families = {"mine": Family(rows)}
    torch.testing.assert_close(weight_maps.load(tmp_path, families)(IDS), model(IDS))


def test_bf16_stays_and_copies_are_not_made():
    model = make(attention_bias=True)
    state = {name: t.bfloat16() for name, t in model.state_dict().items()}
    for i in range(2):
        del state[f"model.layers.{i}.self_attn.o_proj.bias"]
    config = replace(model.config, attention_bias=True)
    _, found = weight_maps.convert(weight_maps.qwen2_map({}), state, config)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].data_ptr() == state[name].data_ptr()
    assert not found["model.layers.0.self_attn.o_proj.bias"].any()


def test_the_table_shows_each_row():
    text = weight_maps.table(weight_maps.baichuan_map({}))
    assert "W_pack.weight" in text and "stacked" in text
    assert len(text.splitlines()) == len(weight_maps.baichuan_map({}))
