"""Hugging Face folders: both ways, bit for bit; every spelling; every refusal says
why.
"""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmlab.models import checkpoint
from llmlab.models.llama import Llama, LlamaConfig
from tests.models.hugging_face import VARIANTS, make, theirs

IDS = torch.arange(40).reshape(2, 20)


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(make(num_key_value_heads=2), tmp_path)


def rewrite(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if v != "gone"})
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_ours(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(**VARIANTS[name])
    hf = AutoModelForCausalLM.from_pretrained(checkpoint.save(model, tmp_path)).eval()
    same(model, hf)
    with torch.no_grad():
        assert (hf(IDS).logits - model(IDS)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_we_open_transformers(name, tmp_path):
    model = make(**VARIANTS[name])
    theirs(model).save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    same(model, ours)
    assert ours.config == model.config
    assert not ours.training
    with torch.no_grad():
        assert torch.equal(ours(IDS), model(IDS))
    assert (
        ours.lm_head.weight is ours.model.embed_tokens.weight
    ) == model.config.tie_word_embeddings


def test_shards(tmp_path):
    model = make()
    theirs(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(checkpoint.load(tmp_path), model)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folders_load_as_fp32(dtype, tmp_path):
    model = make(tie_word_embeddings=True)
    theirs(model).to(dtype).save_pretrained(tmp_path)
    same(checkpoint.load(tmp_path), model.to(dtype).float())
    assert checkpoint.load(tmp_path, dtype).lm_head.weight.dtype == dtype


@settings(max_examples=10, deadline=None)
@given(
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    tied=st.booleans(),
    bias=st.booleans(),
    half=st.integers(1, 4),
)
def test_save_then_load_changes_no_bit(tmp_path_factory, kv, group, tied, bias, half):
    model = make(
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=2 * half,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=not bias,
    )
    loaded = checkpoint.load(checkpoint.save(model, tmp_path_factory.mktemp("model")))
    assert loaded.config == model.config
    same(loaded, model)


def test_training_a_loaded_model_leaves_its_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = checkpoint.load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": "gone",
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": "gone",
        },
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "linear",
                "factor": 2.0,
            },
            "rope_theta": "gone",
            "rope_scaling": "gone",
        },
    ],
    ids=["type", "rope_type", "transformers 5"],
)
def test_every_spelling_of_rope(folder, spelling):
    from transformers import AutoConfig

    rewrite(folder, **spelling)
    config = checkpoint.load(folder).config
    assert (config.rope_theta, config.rope_scaling) == (
        5e5,
        {"rope_type": "linear", "factor": 2.0},
    )
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 5e5


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    from transformers import LlamaConfig, MistralConfig

    assert checkpoint.config_from_hf(
        {"model_type": "llama"}
    ) == checkpoint.config_from_hf(LlamaConfig().to_dict())
    bare = checkpoint.config_from_hf({"model_type": "mistral", "sliding_window": None})
    assert bare == checkpoint.config_from_hf(
        MistralConfig(sliding_window=None).to_dict()
    )


def test_mistral_without_a_window(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    config = MistralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=None
    )
    hf = MistralForCausalLM(config).eval()
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        assert (checkpoint.load(tmp_path)(IDS) - hf(IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'.*llama, mistral"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"type": "linear"}},
            "'linear' without a number for 'factor'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'low_freq_factor'"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, not '32'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_what_is_not_supported_is_named(folder, changes, says):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder)


def test_all_that_is_not_supported_is_named_at_once(folder):
    rewrite(folder, model_type="mistral", hidden_act="gelu", sliding_window=7)
    with pytest.raises(ValueError, match=r"config\.json.*gelu.*sliding_window=7"):
        checkpoint.load(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    state = load_file(folder / "model.safetensors")
    norm = state.pop("model.norm.weight")
    save_file(state | {"model.odd": norm}, folder / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing: model\.norm\.weight; not part of this model: model\.odd",
    ):
        checkpoint.load(folder)
    save_file(
        state | {"model.norm.weight": norm[:5].clone()}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(5,\), not \(32,\)"):
        checkpoint.load(folder)
    save_file(
        state | {"model.norm.weight": norm.to(torch.int8)}, folder / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"not floating point: model\.norm\.weight \(torch.int8\)"
    ):
        checkpoint.load(folder)


def test_leftovers_of_old_checkpoints_are_ignored(folder):
    state = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | extra, folder / "model.safetensors")
    checkpoint.load(folder)


def test_a_tied_checkpoint_may_hold_both_names(tmp_path):
    model = make(tie_word_embeddings=True)
    checkpoint.save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    save_file(
        state | {"lm_head.weight": model.lm_head.weight.detach().clone()},
        tmp_path / "model.safetensors",
    )
    same(checkpoint.load(tmp_path), model)


def stored(folder, change):
    """Rewrites the tensors of a folder."""
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("place", ["the head", "both, different"])
def test_what_is_stored_is_tied_as_transformers_ties_it(place, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint.save(make(tie_word_embeddings=True), tmp_path)

    def change(state):
        embedding = state.pop("model.embed_tokens.weight")
        if place == "the head":
            return state | {"lm_head.weight": embedding}
        other = {"model.embed_tokens.weight": embedding}
        return state | other | {"lm_head.weight": embedding + 1}

    stored(tmp_path, change)
    ours = checkpoint.load(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (hf(IDS).logits - ours(IDS)).abs().max() <= 1e-5
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == (place == "the head") == ours.config.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish", "sliding_window": 5},
        {"num_key_value_heads": None, "head_dim": None, "quantization_config": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 700.0},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 500.0,
            },
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_theta": 700.0,
        },
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 700.0},
    ],
)
def test_unusual_configs_are_read_as_transformers_reads_them(changes, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint.save(make(), tmp_path)
    rewrite(tmp_path, **{"rope_parameters": None, "rope_scaling": None} | changes)
    ours = checkpoint.load(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert (hf(IDS).logits - ours(IDS)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        (
            "config.json",
            "[]",
            r"config\.json: a config is an object with keys, not a li",
        ),
        ("model.safetensors", "x", r"model\.safetensors is not a safetensors file"),
        ("model.safetensors.index.json", "{}", r"index\.json has no 'weight_map'"),
    ],
)
def test_a_broken_file_is_named(name, text, says, folder):
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder)


def test_folders_without_weights_say_what_to_do(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*save_pretrained"):
        checkpoint.load(folder)
    with pytest.raises(FileNotFoundError, match="not a Hugging Face checkpoint folder"):
        checkpoint.load(tmp_path / "nowhere")


def test_loading_does_not_import_the_compiler():
    """Drawing or counting numbers on the meta device did: seconds in each process."""
    code = (
        "import sys; from llmlab.models import course_model; course_model.load();"
        " assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_on_the_meta_device_has_every_weight_and_no_numbers():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        empty = Llama(config)
    whole = Llama(config)
    assert all(p.is_meta and p.requires_grad for p in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }
