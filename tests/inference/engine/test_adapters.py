"""Each request goes through its own LoRA, as if it had been merged for it alone."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from llmlab.inference.engine import Adapter, Engine, SamplingParams
from llmlab.inference.engine.fused import fuse
from llmlab.inference.engine.packed import packed
from llmlab.peft import lora
from llmlab.peft.lora import files
from tests.inference.engine.models import make, plain, small

BASE = make()
CONFIGS = {
    "small": lora.LoRAConfig(r=2, target_modules=("q_proj", "v_proj")),
    "wide": lora.LoRAConfig(r=5, alpha=3, target_modules="all-linear", rslora=True),
    "uneven": lora.LoRAConfig(
        r=3,
        target_modules=("o_proj", "down_proj", "k_proj"),
        rank_pattern={"o_proj": 1},
        alpha_pattern={"k_proj": 30.0},
    ),
}
CONFIGS["head"] = lora.LoRAConfig(r=4, target_modules=("lm_head", "v_proj"))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
PARAMS = SamplingParams(max_new_tokens=8)


def tuned(name: str):
    """The base with one adapter whose factors are far from 0."""
    model = lora.apply(deepcopy(BASE), CONFIGS[name], name)
    torch.manual_seed(len(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {name: tuned(name) for name in CONFIGS}
ADAPTERS = {name: Adapter.of(model, name) for name, model in MODELS.items()}
MERGED = {
    name: lora.merge_and_unload(deepcopy(model)) for name, model in MODELS.items()
}


@pytest.fixture
def engine():
    made = small(BASE, adapters=ADAPTERS, max_tokens=20)
    yield made
    made.close()


def test_rows_of_different_adapters_in_one_batch(engine):
    names = [None, "small", "wide", "uneven", "head", "small", None]
    prompts = [PROMPT[i:] for i in range(7)]
    written = engine.generate(prompts, PARAMS, names)
    models = [BASE if name is None else MERGED[name] for name in names]
    wanted = [plain(m, p, 8) for m, p in zip(models, prompts, strict=True)]
    assert written == wanted
    # else it would not show whether they are mixed up
    assert len({tuple(plain(m, PROMPT, 8)) for m in [BASE, *MERGED.values()]}) == 5


class Other(torch.nn.Linear):
    """As a quantised one: where linears are joined, it multiplies by itself."""


def with_others() -> torch.nn.Module:
    model = deepcopy(BASE)
    for block in model.model.layers:
        block.self_attn.k_proj.__class__ = Other
    return model


FAST = {
    "fused": lambda: fuse(deepcopy(BASE)),
    "packed": lambda: packed(BASE),
    "packed, others beside": lambda: packed(with_others()),
}


@pytest.mark.parametrize("way", FAST)
def test_linears_that_were_joined_are_found(way):
    """q, k, v are one product then, and each adapter changes some of them."""
    engine = small(FAST[way](), adapters=ADAPTERS, max_tokens=20)
    names = [None, *MODELS]
    written = engine.generate([PROMPT] * 5, PARAMS, names)
    models = [BASE, *MERGED.values()]
    assert written == [plain(model, PROMPT, 8) for model in models]


def test_what_one_adapter_stores_serves_no_other(engine):
    first = engine.generate([PROMPT], PARAMS, ["wide"])
    assert engine.stats.found == 0
    assert engine.generate([PROMPT], PARAMS) == [plain(BASE, PROMPT, 8)]
    assert engine.generate([PROMPT], PARAMS, ["small"]) != first
    assert engine.stats.found == 0
    assert engine.generate([PROMPT], PARAMS, ["wide"]) == first
    assert engine.stats.found == 8


@pytest.mark.parametrize("gamma", [0, 3])
def test_with_speculation_and_little_room(gamma):
    engine = small(BASE, adapters=ADAPTERS, gamma=gamma, num_blocks=12)
    names = ["small", "wide", None, "wide"]
    written = engine.generate([PROMPT] * 4, PARAMS, names)
    assert engine.stats.preemptions > 0
    models = [BASE if name is None else MERGED[name] for name in names]
    assert written == [plain(model, PROMPT, 8) for model in models]
    engine.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_the_same_factors(name, tmp_path):
    files.save(MODELS[name], tmp_path, name)
    loaded = Adapter.load(tmp_path)
    assert set(loaded.factors) == set(ADAPTERS[name].factors)
    for place, (A, B) in ADAPTERS[name].factors.items():
        torch.testing.assert_close(loaded.factors[place][0], A)
        torch.testing.assert_close(loaded.factors[place][1], B)


def test_the_model_is_as_it_was(engine):
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = make()(ids)
        assert torch.equal(BASE(ids), before)
        engine.generate([PROMPT], PARAMS, ["wide"])
        assert torch.equal(BASE(ids), before)
    engine.close()
    assert not any(module._forward_hooks for module in BASE.modules())


def test_two_engines_on_one_model():
    one = small(BASE, adapters={"x": ADAPTERS["small"]})
    two = small(BASE, adapters={"x": ADAPTERS["wide"]})
    for _ in range(2):
        assert one.generate([PROMPT], PARAMS, ["x"]) == [
            plain(MERGED["small"], PROMPT, 8)
        ]
        assert two.generate([PROMPT], PARAMS, ["x"]) == [
            plain(MERGED["wide"], PROMPT, 8)
        ]
    one.close()
    two.close()


# Refusals -----------------------------------------------------------------------------


def test_an_adapter_that_there_is_not(engine):
    with pytest.raises(ValueError, match="adapter='x' is not known: there are"):
        engine.add(PROMPT, PARAMS, "x")
    with pytest.raises(ValueError, match=r"adapter='x' is not known: there are \[\]"):
        small(BASE).add(PROMPT, PARAMS, "x")
    with pytest.raises(ValueError, match="adapter='x' is not on the model"):
        Adapter.of(MODELS["small"], "x")


def test_factors_that_do_not_fit():
    A, B = torch.zeros(2, 24), torch.zeros(24, 2)
    place = "model.layers.0.self_attn.q_proj"
    for factors, said in [
        ({"model.layers.9.self_attn.q_proj": (A, B)}, "no layer"),
        ({place: (A[:, :-1], B)}, "is 24 × 24"),
        ({place: (A, B[:-1])}, "is 24 × 24"),
        ({place: (A[:1], B)}, "is 24 × 24"),
        ({"model.embed_tokens": (A, B)}, "is no linear"),
        ({}, "must be an Adapter with factors"),
    ]:
        with pytest.raises(ValueError, match=said):
            Engine(BASE, adapters={"x": Adapter(factors)})
    assert not any(module._forward_hooks for module in BASE.modules())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora.LoRAConfig(dora=True), "use_dora=True must be False"),
        (lora.LoRAConfig(modules_to_save=("lm_head",)), "modules_to_save="),
    ],
)
def test_more_than_low_rank_is_refused(config, said, tmp_path):
    model = lora.apply(make(1, tie_word_embeddings=False), config)
    files.save(model, tmp_path)
    with pytest.raises(ValueError, match=said):
        Adapter.load(tmp_path)
