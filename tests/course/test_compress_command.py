"""`llmlab compress`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from typer.testing import CliRunner

from llmlab.compression import formats, recipes
from llmlab.compression import quantization_basics as qb
from llmlab.course.cli.main import app
from llmlab.models import checkpoint, course_model, language_model
from tests.models.hugging_face import make

TOKENS = torch.arange(2 * 9).reshape(2, 9)


def run(*words):
    done = CliRunner().invoke(app, ["compress", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with the tokenizer of the course model."""
    path = tmp_path_factory.mktemp("model")
    model = make(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_key_value_heads=2,
    )
    checkpoint.save(model, path)
    course_model.load_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")
    return path


def test_rounding_writes_what_rounding_gives(folder, tmp_path):
    out = tmp_path / "out"
    code, said = run(folder, "-o", out, "--method", "rtn", "--group", 16, "--no-judge")
    assert code == 0, said
    assert "5.00 bits per weight" in said  # 4, and 16 for 16 weights
    want = qb.apply(checkpoint.load(folder), qb.QuantConfig(group_size=16))
    found = formats.load(out)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        found.get_submodule(name).weight, want.get_submodule(name).weight
    )
    embedding = want.model.embed_tokens.weight.half().float()
    assert torch.equal(found.model.embed_tokens.weight, embedding)
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("method", "format"),
    [
        ("gptq", "compressed-tensors"),
        ("gptq-act-order", "gptq"),
        ("gptq", "awq"),
        ("awq", "awq"),
    ],
)
def test_methods_and_formats_are_judged(folder, tmp_path, method, format):
    out = tmp_path / "out"
    report = tmp_path / "report.json"
    words = ["--group", 16, "--tokens", 512, "--json", report]
    words += ["--format", format, "--method", method]
    code, said = run(folder, "-o", out, *words)
    assert code == 0, said
    result = json.loads(report.read_text())
    assert result["factor_low"] <= result["factor"] <= result["factor_high"]
    ratio = result["perplexity"] / result["perplexity_before"]
    assert ratio == pytest.approx(result["factor"])
    assert result["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert f"{result['perplexity']:.2f}" in said


@pytest.mark.parametrize(
    ("words", "zeros"),
    [
        (["magnitude"], 0.5),
        (["wanda", "--sparsity", 0.25], 0.25),
        (["sparsegpt", "--pattern", "2:4"], 0.5),
    ],
)
def test_pruned_models_are_folders_of_floats(folder, tmp_path, words, zeros):
    out = tmp_path / "out"
    report = tmp_path / "report.json"
    usual = ["--tokens", 512, "--no-judge", "--floats", "float32", "--json", report]
    code, said = run(folder, "-o", out, *usual, "--method", *words)
    assert code == 0, said
    result = json.loads(report.read_text())
    assert result["sparsity"] == pytest.approx(zeros, abs=0.01)
    weight = checkpoint.load(out).model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean().item() == pytest.approx(zeros, abs=0.1)
    if "2:4" in words:
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    assert (out / "tokenizer.json").is_file()


def test_smoothquant_has_a_folder_of_its_own(folder, tmp_path):
    out = tmp_path / "out"
    report = tmp_path / "report.json"
    words = ["--method", "smoothquant", "--tokens", 512, "--json", report]
    code, said = run(folder, "-o", out, *words)
    assert code == 0, said
    result = json.loads(report.read_text())
    rows, weights = 64 + 32 + 32 + 64 + 96 + 96 + 64, 64 * (64 + 64 + 64 + 3 * 96)
    assert result["bits_per_weight"] == pytest.approx(8 + 32 * rows / weights)
    assert 0.9 < result["factor"] < 1.1
    blank = checkpoint.load(folder)
    with pytest.raises(ValueError, match="do not fit config"):
        checkpoint.load(out)  # an ordinary folder it is not
    opened = recipes.load_own(blank, out)
    assert opened.model.layers[0].mlp.up_proj.codes.dtype == torch.int8
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "method", [name for name, m in recipes.METHODS.items() if m.stores == "memory"]
)
def test_methods_without_a_folder_say_so_before_they_run(folder, tmp_path, method):
    code, said = run(folder, "-o", tmp_path / "out", "--method", method)
    assert code == 2
    assert f"method={method!r} has no folder: in Python, recipes.compress" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_recipe_gives_a_model_that_runs(method):
    torch.manual_seed(0)
    model = make(hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    want = model(TOKENS)
    embedding = model.model.embed_tokens.weight.clone()
    recipe = recipes.Recipe(method)
    made = recipes.compress(model, recipe, [TOKENS])
    assert made is model
    assert torch.equal(made.model.embed_tokens.weight, embedding)
    got = recipes.as_floats(made)(TOKENS)
    assert got.isfinite().all()
    assert not torch.equal(got, want)
    error = ((got - want).square().sum() / want.square().sum()).item()
    assert error < (2 if recipes.METHODS[method].stores == "floats" else 0.5)


def test_peqa_says_what_it_did(folder, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    words = ["--method", "peqa", "--group", 16, "--tokens", 768, "--no-judge"]
    code, said = run(folder, "-o", out, *words, "--json", report)
    assert code == 0, said
    assert "then 3 steps of training, a run of 256 tokens each, for the scales" in said
    assert json.loads(report.read_text())["steps"] == 3
    name = "model.layers.1.mlp.down_proj"
    rounded = qb.apply(checkpoint.load(folder), qb.QuantConfig(group_size=16))
    want, found = (m.get_submodule(name) for m in (rounded, formats.load(out)))
    assert torch.equal(found.codes(), want.codes())
    assert not torch.equal(found.scale, want.scale)


def test_peqa_reads_the_text_better_than_rounding_and_changes_scales_alone():
    torch.manual_seed(0)
    text = [torch.arange(16)[None] % 5] * 8
    model = make(tie_word_embeddings=True, attention_bias=True)
    model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {name: p.clone() for name, p in model.named_parameters()}
    rounded = recipes.compress(deepcopy(model), recipes.Recipe("rtn", 3, 8))
    seen = []
    made = recipes.compress(
        model, recipes.Recipe("peqa", 3, 8), text, lambda *now: seen.append(now)
    )
    assert seen == [(i + 1, 8) for i in range(8)]
    loss = [
        language_model.next_token_loss(m(text[0]), text[0]) for m in (made, rounded)
    ]
    assert loss[0] < loss[1] - 0.001
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, kept[name])
        assert parameter.requires_grad == flags[name]
    for name, module in made.named_modules():
        if isinstance(module, qb.QuantLinear):
            assert torch.equal(module.codes(), rounded.get_submodule(name).codes())


def test_peqa_that_fails_leaves_the_model():
    model = make()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    recipe = recipes.Recipe("peqa", group=16)
    with pytest.raises(ValueError, match="no token to predict"):
        recipes.compress(model, recipe, [TOKENS, TOKENS[:, :1]])
    model.model.norm.weight.data[0] = before["model.norm.weight"][0] = torch.inf
    with pytest.raises(ValueError, match="the loss is nan after 0 steps"):
        recipes.compress(model, recipe, [TOKENS])
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_recipe_knows_its_bits():
    assert recipes.Recipe("rtn").bits == recipes.Recipe("mxfp4").bits == 4
    assert recipes.Recipe("smoothquant").bits == recipes.Recipe("llm-int8").bits == 8
    assert recipes.Recipe("zeroquant", 3).bits == 3
    with pytest.raises(ValueError, match="bits=4 must be 8 in smoothquant"):
        recipes.Recipe("smoothquant", 4)
    with pytest.raises(ValueError, match="rank=-1"):
        recipes.Recipe("lorc", rank=-1)


def test_text_of_ones_own_is_read(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    words = ["--group", 16, "--text", text, "--no-judge"]
    code, said = run(folder, "-o", tmp_path / "out", *words)
    assert code == 2
    assert "too few for a sequence of length=256" in said
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_judged_as_it_was_rounded(folder, tmp_path):
    out = tmp_path / "out"
    report = tmp_path / "report.json"
    code, said = run(folder, "-o", out, "--format", "gguf:Q8_0", "--json", report)
    assert code == 0, said
    result = json.loads(report.read_text())
    assert [file.name for file in out.iterdir()] == ["model.gguf"]
    assert "bits_per_weight" not in result
    assert result["factor"] == pytest.approx(1, abs=0.05)
    assert result["factor"] != 1


def test_the_course_model_has_no_tokenizer_for_gguf(tmp_path):
    words = ["--format", "gguf:Q8_0", "--no-judge"]
    code, said = run("course", "-o", tmp_path / "out", *words)
    assert code == 2 and "no folder with a tokenizer" in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, said = run(folder, "-o", tmp_path, "--method", "rtn")
    assert code == 2 and "is there already" in said
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group", 48], "group_size=48 must divide the last dimension"),
        (["--bits", 9], "bits=9 must be an integer from 2 to 8"),
        (["--method", "magic"], "method='magic' must be one of rtn, gptq"),
        (["--method", "wanda", "--sparsity", 2], "sparsity=2.0"),
        (["--method", "wanda", "--pattern", "4:2"], "pattern='4:2' must be"),
        (["--format", "zip"], "--format 'zip': use compressed-tensors"),
        (["--format", "gguf:Q3_K"], "after gguf: comes one of"),
        (["--floats", "int8"], "--floats 'int8': use one of float32"),
        (["--format", "awq", "--bits", 8], "bits=8 must be one of (4,)"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(folder, tmp_path, words, said):
    out = tmp_path / "out"
    usual = ["--group", 16, "--tokens", 256, "--no-judge"]
    code, text = run(folder, "-o", out, *usual, *words)
    assert code == 2
    assert said in text
    assert not out.exists()


def test_no_model_of_that_name(tmp_path):
    code, said = run("gpt5", "-o", tmp_path / "out")
    assert code == 2 and "MODEL='gpt5' is no folder" in said


def test_a_recipe_without_text_leaves_the_model():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="gptq calibrates on text"):
        recipes.compress(model, recipes.Recipe(group=16))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_decoded_weights_compute_the_same_and_share_the_rest():
    model = qb.apply(make(attention_bias=True), qb.QuantConfig(group_size=16))
    dense = recipes.as_floats(model)
    assert torch.equal(dense(TOKENS), model(TOKENS))
    assert dense.model.embed_tokens is model.model.embed_tokens
    assert isinstance(model.model.layers[0].mlp.up_proj, qb.QuantLinear)
    assert recipes.bits_per_weight(model) == 5
    assert recipes.bits_per_weight(dense) == 32
