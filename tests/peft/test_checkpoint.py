"""Adapter folders: both files, the prefix, and errors that name what is wrong."""

import json

import pytest
import torch

from llmlab.peft import checkpoint

TENSORS = {"layers.0.q_proj.lora_A.weight": torch.arange(6.0).view(2, 3)}


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(
        tmp_path / "new" / "folder", {"peft_type": "LORA", "r": 2}, TENSORS
    )
    settings, tensors = checkpoint.read(tmp_path / "new" / "folder", "LORA")
    assert settings["r"] == 2 and tensors.keys() == TENSORS.keys()
    assert torch.equal(
        tensors["layers.0.q_proj.lora_A.weight"],
        TENSORS["layers.0.q_proj.lora_A.weight"],
    )


def test_names_in_the_file_bear_the_prefix(tmp_path):
    from safetensors import safe_open

    checkpoint.write(tmp_path, {"peft_type": "LORA"}, TENSORS)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert list(f.keys()) == ["base_model.model.layers.0.q_proj.lora_A.weight"]
        assert f.metadata() == {"format": "pt"}


def test_a_transposed_view_is_saved_as_seen(tmp_path):
    checkpoint.write(
        tmp_path, {"peft_type": "LORA"}, {"x.w": torch.arange(6.0).view(2, 3).T}
    )
    assert checkpoint.read(tmp_path, "LORA")[1]["x.w"].tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, file):
    checkpoint.write(tmp_path, {"peft_type": "LORA"}, TENSORS)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        checkpoint.read(tmp_path, "LORA")


def test_another_methods_adapter_is_refused(tmp_path):
    checkpoint.write(tmp_path, {"peft_type": "IA3"}, TENSORS)
    with pytest.raises(ValueError, match="IA3 adapter, not LORA"):
        checkpoint.read(tmp_path, "LORA")


def test_a_tensor_without_the_prefix_is_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"'x' does not start with 'base_model\.model\.'"
    ):
        checkpoint.read(tmp_path, "LORA")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "lacks 'a'"),
        (
            {"a": torch.ones(2, 3)},
            r"'a' has shape \(2, 3\) in the file; this model needs \(3, 2\)",
        ),
        (
            {"a": torch.ones(3, 2), "b": torch.ones(1)},
            "has 'b', which this model has no place for",
        ),
    ],
)
def test_tensors_are_checked_by_name_and_shape(found, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.check_tensors(found, {"a": (3, 2)})
    checkpoint.check_tensors({"a": torch.ones(3, 2)}, {"a": (3, 2)})
