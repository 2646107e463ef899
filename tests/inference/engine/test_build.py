"""Engine folders: chosen, planned, written; and what is refused when opened."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmlab.inference.engine import Engine, EngineConfig, SamplingParams, building
from llmlab.inference.engine.building import BuildConfig, build, open_engine
from llmlab.inference.engine.fused import fuse
from llmlab.inference.engine.memory import (
    Memory,
    block_bytes,
    blocks_that_fit,
    peak_bytes,
    planned,
)
from llmlab.inference.engine.plugins import TORCH, Plugin, PluginLinear, measured
from llmlab.models import checkpoint
from llmlab.models.llama import LlamaConfig
from llmlab.models.presets import preset
from tests.models.hugging_face import make

SMALL = BuildConfig(max_sequences=3, max_tokens=12, block_size=4, num_blocks=20)
IDS = torch.tensor([[3, 9, 27, 40, 12], [7, 7, 2, 33, 60]])
PROMPTS = [[3, 9, 27, 40, 12], [7, 7], list(range(20))]
# y = x Wᵀ from Wᵀ: another layout, the same numbers
TURNED = Plugin(
    pack=lambda weight: {"turned": weight.T.contiguous()},
    product=lambda x, tensors: x @ tensors["turned"],
    weight=lambda tensors: tensors["turned"].T,
)
TABLE = {"turned": TURNED}


@pytest.fixture
def source(tmp_path):
    """A checkpoint folder, and the model in it."""
    model = make(num_key_value_heads=2, tie_word_embeddings=True)
    folder = checkpoint.save(model, tmp_path / "checkpoint")
    return SimpleNamespace(folder=folder, model=model, out=tmp_path / "engine")


VARIANTS = {
    "plain": ({}, {"fused": False}),
    "fused": ({}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "odd heads": ({"head_dim": 12, "num_key_value_heads": 1}, {}),
    "packed": ({"attention_bias": True}, {"linears": ("turned",), "head": ("turned",)}),
    "packed, not fused": ({}, {"linears": ("turned",), "fused": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_engine_says_what_the_checkpoint_says(name, tmp_path):
    shape, changes = VARIANTS[name]
    model = make(**{"num_key_value_heads": 2, "tie_word_embeddings": True} | shape)
    folder = checkpoint.save(model, tmp_path / "checkpoint")
    config = BuildConfig(**vars(SMALL) | changes)
    build(folder, tmp_path / "engine", config, plugins=TABLE, clock=lambda run: 1.0)
    opened = open_engine(tmp_path / "engine", plugins=TABLE)
    torch.testing.assert_close(opened.model(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    wanted = Engine(model, EngineConfig(20, 4, 12, 3)).generate(PROMPTS)
    assert opened.engine().generate(PROMPTS, SamplingParams(16)) == wanted


def test_the_fastest_is_chosen_for_each_shape(source):
    calls = 0

    def clock(run):
        # PyTorch's first, then the other, which is faster but for the head (61, 32)
        nonlocal calls
        calls += 1
        head = run().shape[-1] == 61
        return 1.0 if (calls % 2 == 1) == head else 2.0

    config = BuildConfig(
        **vars(SMALL) | {"linears": ("torch", "turned"), "head": ("torch", "turned")}
    )
    document = build(source.folder, source.out, config, plugins=TABLE, clock=clock)
    assert document["linears"]["lm_head"] == "torch"
    others = {v for k, v in document["linears"].items() if k != "lm_head"}
    assert others == {"turned"}
    # a shape is measured once, whatever the number of its layers
    shapes = {(t["rows"], t["columns"]) for t in document["tactics"]}
    assert len(document["tactics"]) == 2 * len(shapes) == 2 * 5
    assert {t["tokens"] for t in document["tactics"]} == {3}


def test_the_head_has_plugins_of_its_own(source):
    config = BuildConfig(**vars(SMALL) | {"linears": ("turned",), "head": ("torch",)})
    found = build(source.folder, source.out, config, plugins=TABLE)["linears"]
    assert found.pop("lm_head") == "torch"
    assert set(found.values()) == {"turned"} and len(found) == 8


def test_tokens_expected_and_an_unknown_plugin():
    weight = torch.randn(5, 4)
    seen = []
    spy = TORCH._replace(product=lambda x, t: seen.append(x.shape) or x)
    found = measured(weight, 7, {"spy": spy}, ["spy"])
    assert set(seen) == {(1, 7, 4)} and found[0].seconds >= 0
    with pytest.raises(ValueError, match="'int4' was not given: there are spy"):
        measured(weight, 7, {"spy": spy}, ["int4"])


def test_attention_is_chosen_and_asked_for_again(source):
    def slow(*args):
        raise AssertionError("measured only")

    def by_hand(q, keys, values, tables, lengths):
        return building.paged_attention(q, keys, values, tables, lengths)

    times = iter([1.0] * 5 + [3.0, 2.0])
    both = {"torch": slow, "by hand": by_hand}
    document = build(
        source.folder,
        source.out,
        SMALL,
        attentions=both,
        clock=lambda run: next(times),
    )
    assert document["attention"] == "by hand"
    with pytest.raises(ValueError, match="attention 'by hand' was not given: there"):
        open_engine(source.out)
    opened = open_engine(source.out, attentions=both)
    assert opened.engine().pieces.pieces.paged_attention is by_hand


def test_a_plugin_that_is_missing_when_opened(source):
    config = BuildConfig(**vars(SMALL) | {"linears": ("turned",)})
    with pytest.raises(ValueError, match="'turned' was not given: there are torch"):
        build(source.folder, source.out, config)
    assert not source.out.exists()
    build(source.folder, source.out, config, plugins=TABLE)
    with pytest.raises(ValueError, match="'turned' was not given"):
        open_engine(source.out)


def test_the_folder_says_what_it_is(source):
    document = build(source.folder, source.out, SMALL)
    assert sorted(f.name for f in source.out.iterdir()) == [
        "engine.json",
        "engine.safetensors",
    ]
    assert json.loads((source.out / "engine.json").read_text()) == document
    opened = open_engine(source.out)
    assert opened.limits == EngineConfig(20, 4, 12, 3)
    assert opened.memory.blocks == 20
    c = source.model.config
    assert opened.memory.cache == 20 * 2 * 2 * 2 * c.head_dim * 4 * 4
    assert opened.memory.weights == building.weight_bytes(source.model)
    # tied: the vocabulary is stored once
    size = (source.out / "engine.safetensors").stat().st_size
    assert size < opened.memory.weights + 4000
    text = building.summary(document)
    assert "20 blocks, 80 tokens" in text and "9 × torch, fused" in text
    assert building.tactics_table(document["tactics"]).count("*") == 5


def altered_byte(folder):
    file = folder / "engine.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut_short(folder):
    file = folder / "engine.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def other_limit(folder):
    file = folder / "engine.json"
    file.write_text(file.read_text().replace('"max_tokens": 12', '"max_tokens": 99'))


def other_format(folder):
    file = folder / "engine.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (altered_byte, "engine.safetensors was altered"),
        (cut_short, "engine.safetensors has .* bytes, not"),
        (lambda f: (f / "engine.safetensors").unlink(), "has 0 bytes"),
        (other_limit, "engine.json was altered"),
        (other_format, "format=2 must be 1"),
        (lambda f: (f / "engine.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "engine.json").write_text("[]"), "format=None must be 1"),
    ],
    ids=["byte", "short", "gone", "limit", "format", "half", "list"],
)
def test_what_is_not_whole_is_refused(source, spoil, message):
    build(source.folder, source.out, SMALL)
    spoil(source.out)
    with pytest.raises(ValueError, match=message):
        open_engine(source.out)


def test_only_the_size_is_looked_at_without_a_checksum(source):
    build(source.folder, source.out, SMALL)
    altered_byte(source.out)
    open_engine(source.out, verify=False)
    cut_short(source.out)
    with pytest.raises(ValueError, match="bytes, not"):
        open_engine(source.out, verify=False)


def test_nothing_is_left_when_writing_fails(source, monkeypatch):
    def fail(state):
        raise OSError("no space left")

    monkeypatch.setattr(building, "stored", fail)
    with pytest.raises(OSError, match="no space"):
        build(source.folder, source.out, SMALL)
    assert [f.name for f in source.out.parent.iterdir()] == ["checkpoint"]


def test_an_engine_is_not_written_over(source):
    build(source.folder, source.out, SMALL)
    with pytest.raises(FileExistsError, match="is not written over"):
        build(source.folder, source.out, SMALL)
    with pytest.raises(FileNotFoundError, match="is no engine folder"):
        open_engine(source.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": None}, "num_blocks=None and memory=None: give one"),
        ({"memory": 10**6}, "num_blocks=20 and memory=1000000: give one"),
        ({"opt_tokens": 0}, "opt_tokens=0"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"linears": ()}, r"linears=\(\)"),
        ({"head": "torch"}, "head='torch'"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(**vars(SMALL) | changes)


def test_a_longest_text_of_ones_own(source):
    config = BuildConfig(**vars(SMALL) | {"max_length": 32})
    build(source.folder, source.out, config)
    engine = open_engine(source.out).engine()
    with pytest.raises(ValueError, match="32"):
        engine.add(list(range(30)), SamplingParams(10))
    config = BuildConfig(**vars(SMALL) | {"max_length": 10**6})
    with pytest.raises(ValueError, match="max_length=1000000 is above the model's"):
        build(source.folder, source.out.with_name("other"), config)


# Memory -------------------------------------------------------------------------------


def test_blocks_by_hand():
    """Llama 3.1 8B in 16 bits: 128 KiB a token, so 2 MiB a block of 16."""
    assert block_bytes(preset("llama-3.1-8b"), 16, 2) == 2 * 2**20
    tiny = LlamaConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    assert block_bytes(tiny, 3, 2) == 2 * 2 * 2 * 3 * 2 == 48

    def fit(memory, weights, activations, share=0.9):
        return blocks_that_fit(memory, weights, activations, tiny, 3, 2, share)

    assert fit(1000, 500, 112) == 6
    assert fit(1000, 500, 113) == 5
    assert fit(1000, 900, 1) == 0
    assert fit(1000, 500, 112, 1.0) == 8
    for share in (0, 1.1):
        with pytest.raises(ValueError, match=f"utilisation={share}"):
            fit(1000, 500, 100, share)


def test_bytes_that_live_at_one_time():
    x = torch.zeros(100)  # 400 bytes, older than the count

    def run():
        a = x + 1  # 400
        b = a.view(10, 10).t()  # the same memory
        del a
        c = b * 2  # 800 now
        del b  # the last view of a
        d = c + 1  # 800
        del c
        return d.sum()

    assert peak_bytes(run) == 800
    assert peak_bytes(lambda: x.view(10, 10)[1:]) == 0
    assert peak_bytes(lambda: [x + 1 for _ in range(3)]) == 1200


def test_activations_grow_with_the_step(source):
    few, many, wide = (
        planned(source.model, *limits, 4, num_blocks=9).activations
        for limits in ((16, 4), (64, 4), (16, 16))
    )
    assert few < many and few < wide
    d, f = 32, 48
    assert many > 64 * (d + 2 * f) * 4  # h, gate and up at least


def test_the_plan_fills_the_memory(source):
    memory = 10**6
    plan = planned(source.model, 12, 3, 4, memory=memory, utilisation=0.5)
    block = plan.cache // plan.blocks
    assert plan.total <= memory * 0.5 < plan.total + block
    assert Memory(1, 2, 3, 4).total == 6
    with pytest.raises(ValueError, match="has no room for a block"):
        planned(source.model, 12, 3, 4, memory=1000)
    with pytest.raises(ValueError, match="exactly one"):
        planned(source.model, 12, 3, 4)


def test_fused_blocks_are_the_same_function():
    model = make(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    wanted = model(IDS)
    names = {name.split(".")[-1] for name, m in fuse(model).named_modules()}
    assert "q_proj" not in names and "up_proj" not in names
    torch.testing.assert_close(model(IDS), wanted)


def test_a_packed_linear():
    weight, bias, x = torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 4)
    linear = PluginLinear(TURNED, TURNED.pack(weight), bias)
    torch.testing.assert_close(linear(x), F.linear(x, weight, bias))
    assert torch.equal(linear.weight, weight)
