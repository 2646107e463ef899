"""Which units stay, the whole model, and its folder."""

from __future__ import annotations

import csv
import json
from copy import deepcopy

import pytest
import torch

from llmlab.compression import dependencies, llm_pruner
from llmlab.compression import quantization_basics as qb
from llmlab.compression.llm_pruner import PrunerConfig
from llmlab.models import checkpoint
from tests.models.hugging_face import make, named, theirs

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
DEEP = {"num_hidden_layers": 4, "intermediate_size": 47}
INNER = {"keep_first": 1, "keep_last": 1}


def logits(model):
    out = model(IDS)
    return getattr(out, "logits", out)


# Which stay ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, ratio, kept",
    [
        (8, 0.5, 4),
        (9, 0.5, 5),
        (3, 0.25, 3),
        (3, 0.34, 2),
        (100, 0.29, 71),
        (11008, 0.25, 8256),
        (5, 0, 5),
        (4, 0.99, 1),
        (1, 0.9, 1),
    ],
)
def test_a_share_as_it_is_written_goes(n, ratio, kept):
    assert llm_pruner.kept_count(n, ratio) == kept


def test_the_best_stay_in_order_and_of_equal_ones_the_last():
    scores = {"a.mlp": torch.tensor([5.0, 1, 4, 2, 3]), "b.mlp": torch.ones(4)}
    kept = llm_pruner.kept_units(scores, 0.5)
    assert kept["a.mlp"].tolist() == [0, 2, 4] and kept["b.mlp"].tolist() == [2, 3]


def test_everywhere_compares_layers_and_empties_none():
    scores = {
        "a.mlp": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "a.self_attn": torch.tensor([9.0, 7.0]),
        "b.mlp": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "b.self_attn": torch.tensor([8.0, 9.5]),
    }
    kept = llm_pruner.kept_units(scores, 0.5, everywhere=True)
    assert {n: k.tolist() for n, k in kept.items()} == {
        "a.mlp": [3],
        "a.self_attn": [0],
        "b.mlp": [1, 2, 3],
        "b.self_attn": [1],
    }
    assert list(kept) == list(scores)
    same = llm_pruner.kept_units({"a.mlp": scores["a.mlp"]}, 0.5, everywhere=True)
    assert same["a.mlp"].tolist() == [2, 3]
    assert scores["a.mlp"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_first_and_last_layers_stay_whole():
    model = make(**DEEP)
    known = dependencies.groups(model)
    config = PrunerConfig(0.5, keep_first=1, keep_last=2)
    assert list(llm_pruner.prunable(model, known, config)) == [
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]
    config = PrunerConfig(0.5, keep_first=0, keep_last=0, parts=("mlp",))
    assert list(llm_pruner.prunable(model, known, config)) == [
        f"model.layers.{i}.mlp" for i in range(4)
    ]
    with pytest.raises(ValueError, match="keep_first=4 and keep_last=2 leave nothing"):
        llm_pruner.apply(model, None, PrunerConfig(0.5, "magnitude"))


# The whole model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["magnitude", "random", "vector", "first", "second", "mix"]
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["plain", "gqa", "tied", "biases"],
)
def test_apply_cuts_the_least_important(shape, kind):
    ours = make(**DEEP | shape)
    config = PrunerConfig(0.5, kind, **INNER)
    whole = deepcopy(ours)
    known = dependencies.groups(ours)
    scores = llm_pruner.importance(ours, [IDS], config, known)
    hf = llm_pruner.apply(theirs(ours), [IDS], config)
    assert llm_pruner.apply(ours, [IDS], config) is ours
    torch.testing.assert_close(logits(hf), logits(ours), rtol=1e-3, atol=1e-4)
    kept = {}
    for name, its in scores.items():
        gone = int(len(its) * 0.5)
        kept[name] = torch.tensor(sorted(range(len(its)), key=lambda u: its[u])[gone:])
    dependencies.mask(whole, kept, known)
    torch.testing.assert_close(logits(ours), logits(whole), rtol=1e-3, atol=1e-4)
    widths = [len(block.mlp.up_proj.weight) for block in ours.model.layers]
    assert widths == [47, 24, 24, 47]
    heads = [len(block.self_attn.q_proj.weight) // 8 for block in ours.model.layers]
    assert heads == [4, 2, 2, 4]


def test_everywhere_gives_layers_of_unequal_width():
    model = make(**DEEP)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 0.1
    llm_pruner.apply(
        model,
        None,
        PrunerConfig(0.5, "magnitude", parts=("mlp",), everywhere=True, **INNER),
    )
    widths = [len(block.mlp.up_proj.weight) for block in model.model.layers]
    assert sum(widths[1:3]) == 47 and widths[1] > widths[2] >= 1
    assert model.config.intermediate_size == 47


def test_random_is_a_draw_and_magnitude_reads_nothing():
    config = PrunerConfig(0.5, "random", seed=3, **INNER)
    model = make(**DEEP)
    first = llm_pruner.importance(model, None, config)
    again = llm_pruner.importance(model, None, config)
    other = llm_pruner.importance(model, None, PrunerConfig(0.5, "random", **INNER))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    llm_pruner.apply(model, None, PrunerConfig(0.5, "magnitude", **INNER))
    with pytest.raises(ValueError, match="batches=None: kind='mix' needs texts"):
        llm_pruner.apply(make(**DEEP), None, PrunerConfig(0.5, "mix", **INNER))


def test_bf16_stays_bf16():
    model = make(**DEEP).bfloat16()
    llm_pruner.apply(model, [IDS], PrunerConfig(0.5, "mix", **INNER))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_a_failure_leaves_the_model_as_it_was():
    model = make(**DEEP)
    before = dict(model.named_parameters())
    for batches, words in [
        ([], "is empty"),
        ([torch.tensor([[1]])], "one token"),
        ([torch.rand(1, 4)], "rows of token ids"),
    ]:
        with pytest.raises(ValueError, match=words):
            llm_pruner.apply(model, batches, PrunerConfig(0.5, **INNER))
    with pytest.raises(ValueError, match="is compressed already"):
        llm_pruner.apply(
            qb.apply(make(num_hidden_layers=4), qb.QuantConfig(group_size=4)),
            None,
            PrunerConfig(0.5, "magnitude", **INNER),
        )
    for n, p in model.named_parameters():
        assert p is before[n] and p.requires_grad and p.grad is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"kind": "l2"}, "kind='l2'"),
        ({"aggregate": "mean"}, "aggregate='mean'"),
        ({"parts": ()}, r"parts=\(\)"),
        ({"parts": ("norm",)}, "parts="),
        ({"keep_first": -1}, "keep_first=-1"),
        ({"keep_last": -1}, "keep_last=-1"),
    ],
    ids=named,
)
def test_settings_that_are_wrong_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        PrunerConfig(**{"ratio": 0.5} | settings)


# To the disk and back -----------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
    ],
    ids=named,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_unequal_width_come_back(tmp_path, shape, dtype):
    model = make(**DEEP | shape).to(dtype)
    llm_pruner.apply(model, None, PrunerConfig(0.5, "random", **INNER))
    folder = llm_pruner.save(model, tmp_path / "pruned")
    back = llm_pruner.load(folder, dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter)
    if dtype == torch.float32:  # .to(bfloat16) rounds the table of RoPE, too
        assert torch.equal(logits(back), logits(model))
    assert not back.training
    if shape.get("tie_word_embeddings"):
        assert back.lm_head.weight is back.model.embed_tokens.weight
    assert [b.self_attn.layer for b in back.model.layers] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"wrong shape: .*layers.1"):
        checkpoint.load(folder)


def test_a_usual_folder_is_refused_to_layers_of_unequal_width(tmp_path):
    model = make(**DEEP)
    llm_pruner.apply(model, None, PrunerConfig(0.5, "random", **INNER))
    with pytest.raises(ValueError, match=r"layers\.1\..*llm_pruner\.save"):
        checkpoint.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_of_one_width_is_a_usual_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(**DEEP | {"hidden_size": 36, "head_dim": 8, "num_attention_heads": 6})
    config = PrunerConfig(0.5, "random", keep_first=0, keep_last=0)
    llm_pruner.apply(model, None, config)
    folder = llm_pruner.save(model, tmp_path)
    assert "layer_widths" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(logits(llm_pruner.load(folder)), logits(model))
    assert torch.equal(logits(checkpoint.load(folder)), logits(model))
    hf = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(hf), logits(model), rtol=1e-4, atol=1e-5)


def test_what_transformers_does_not_open(tmp_path):
    """Layers of unequal width; and a number of heads that does not divide the width,
    though head_dim is given and nothing is computed by that quotient.
    """
    from transformers import AutoModelForCausalLM

    model = make(**DEEP)
    llm_pruner.apply(model, None, PrunerConfig(0.5, "random", **INNER))
    folder = llm_pruner.save(model, tmp_path / "unequal")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    model = make()
    kept = {f"model.layers.{i}.self_attn": torch.arange(3) for i in range(2)}
    dependencies.cut(model, kept)
    folder = llm_pruner.save(model, tmp_path / "three heads")
    assert torch.equal(logits(llm_pruner.load(folder)), logits(model))
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_is_no_pruned_llama_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a Llama of llmlab"):
        llm_pruner.save(theirs(make()), tmp_path)
    with pytest.raises(ValueError, match="is compressed already"):
        llm_pruner.save(qb.apply(make(), qb.QuantConfig(group_size=4)), tmp_path)
    model = make(**DEEP)
    llm_pruner.apply(model, None, PrunerConfig(0.5, "random", **INNER))
    folder = llm_pruner.save(model, tmp_path)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    for spoilt in (raw["layer_widths"][:3], 7, [{"intermediate_size": 3}] * 4):
        file.write_text(json.dumps(raw | {"layer_widths": spoilt}))
        with pytest.raises(ValueError, match="for each of 4 layers"):
            llm_pruner.load(folder)
    raw["layer_widths"][1]["intermediate_size"] = 9
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"do not fit layer_widths.*layers.1.mlp"):
        llm_pruner.load(folder)


def test_the_stored_runs_are_complete():
    with llm_pruner.FILE.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    keys = [(r["part"], r["kind"], r["ratio"], r["seed"], r["steps"]) for r in runs]
    assert len(set(keys)) == len(keys)
    known = dict(zip(keys, runs, strict=True))
    recovered = [key for key in known if key[-1] == "12"]
    kinds = [("first", "0.2"), ("random", "0.2"), ("first", "0")]
    assert sorted(recovered) == sorted(
        ("mlp", *kind, seed, "12") for kind in kinds for seed in "012"
    )
    for key in recovered:
        loss, gained = (float(known[key][name]) for name in ("loss", "gained"))
        if key[2] == "0":  # the whole model, as it is and trained
            assert gained == -float(known[key]["grown"])
        else:
            before = known[*key[:-1], "0"]
            assert loss + gained == pytest.approx(float(before["loss"]), abs=2e-4)
