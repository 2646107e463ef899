"""A compressed model as a Hugging Face folder: config.json beside model.safetensors.

`quantization_config` in config.json says how the linears are stored. Three formats are
those of libraries, which open them with the same numbers:

    compressed-tensors   "pack-quantized": vLLM, transformers with its package
    gptq                 AutoGPTQ's: vLLM, and transformers with GPTQModel on a GPU
    awq                  llm-awq's "gemm": the same

All are opened here, too, as models whose linears are `QuantLinear`: packed in memory as
on disk. A model of float weights (a pruned one, say) is an ordinary folder.

Simplified: linears of the blocks alone are quantised, all in one way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.compression import walk
from llmlab.compression.formats import packing
from llmlab.compression.formats.packing import Stored
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.models import checkpoint
from llmlab.models.checkpoint import copy_tokenizer
from llmlab.models.llama import Llama

FORMATS = ("compressed-tensors", "gptq", "awq")
WRITERS = {
    "compressed-tensors": packing.to_compressed_tensors,
    "gptq": packing.to_gptq,
    "awq": packing.to_awq,
}


# A linear as what is stored, and back -------------------------------------------------


def stored(linear: QuantLinear) -> Stored:
    """Unsigned codes, and a scale and a zero point for each group of a row.

    Raises:
        ValueError: its scale is for the whole matrix: the formats have one per row or
            group.
    """
    config = linear.config
    if config.per == "tensor":
        raise ValueError("per='tensor' must be 'row' or 'group' in this format")
    rows = linear.shape[0]
    middle = 2 ** (config.bits - 1) if config.symmetric else 0
    codes = (linear.codes() + middle).long()
    zero = (linear.zeros() + middle).long().reshape(rows, -1)
    return Stored(codes, linear.scale.reshape(rows, -1), zero, config.bits)


def quant_linear(weight: Stored, bias: nn.Parameter | None = None) -> QuantLinear:
    """The linear that computes with it.

    A symmetric format of 4 bits has the code −8, ours ends at −7: with a code −8 the
    layer is taken as one with zero points, which are all 8.
    """
    symmetric = weight.symmetric and bool((weight.codes > 0).all())
    config = QuantConfig(
        weight.bits,
        symmetric=symmetric,
        group_size=weight.group_size,
        scale_dtype=weight.scale.dtype,
    )
    middle = 2 ** (weight.bits - 1) if symmetric else 0
    codes = (weight.codes - middle).float()
    return QuantLinear.of(codes, weight.scale, weight.zero - middle, config, bias)


# Writing ------------------------------------------------------------------------------


def save(
    model: Llama,
    folder: str | Path,
    format: str = "compressed-tensors",
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model whose linears are `QuantLinear` as a folder that libraries open.

    Embedding, head and norms are stored as floats. Each file is replaced whole.

    Args:
        tokenizer_from: a folder whose tokenizer's files are copied along.
        dtype: of the floats; that of the model if it is not given.
    Raises:
        ValueError: the format is unknown or cannot hold the model, the linears are
            quantised in different ways, or some are and some are not; nothing is
            written.
    """
    from safetensors.torch import save_file

    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {FORMATS}")
    layers = quantised_linears(model)
    state: dict[str, Tensor] = {}
    configs = {}
    for name, layer in layers.items():
        weight = stored(layer)
        packing.check_fits(name, weight, format)
        for part, tensor in WRITERS[format](weight).items():
            state[f"{name}.{part}"] = tensor
        configs[name] = replace(layer.config, group_size=weight.group_size)
    if len(set(configs.values())) > 1 and len({c.per for c in configs.values()}) > 1:
        raise ValueError("the linears are quantised in different ways: one per folder")
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to(dtype or parameter.dtype).contiguous()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} would not be finite in {tensor.dtype}")
        state[name] = tensor

    raw = checkpoint.config_to_hf(model.config)
    raw["dtype"] = str(state[checkpoint.EMBEDDING].dtype).removeprefix("torch.")
    first = next(iter(layers.values())).config
    raw["quantization_config"] = DESCRIBE[format](first)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new_config = folder / "config.json.tmp"
    new_weights = folder / "model.safetensors.tmp"
    new_config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    save_file(state, new_weights, metadata={"format": "pt"})
    # safetensors makes its files readable by the owner alone
    shutil.copymode(new_config, new_weights)
    os.replace(new_config, folder / "config.json")
    os.replace(new_weights, folder / "model.safetensors")
    copy_tokenizer(tokenizer_from, folder)
    return folder


def quantised_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every `QuantLinear` of the model by name.

    Raises:
        ValueError: there is none, or a linear of a block is none.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module
    if not found:
        raise ValueError(
            "the model has no QuantLinear: quantise it first, or save its floats with"
            " llmlab.models.checkpoint.save"
        )
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in checkpoint.ATTENTION + checkpoint.MLP and name not in found:
            raise ValueError(
                f"{name} is a {type(module).__name__} and others are quantised: the"
                " format stores all linears of the blocks in one way"
            )
    return found


def describe_compressed_tensors(config: QuantConfig) -> dict:
    """`quantization_config` as compressed-tensors 0.19 writes and reads it."""
    weights = {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.symmetric,
        "strategy": "group" if config.per == "group" else "channel",
        "group_size": config.group_size if config.per == "group" else None,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def describe_gptq(config: QuantConfig) -> dict:
    """`quantization_config` as AutoGPTQ writes it."""
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size if config.per == "group" else -1,
        "desc_act": False,
        "sym": config.symmetric,
        "checkpoint_format": "gptq",
    }


def describe_awq(config: QuantConfig) -> dict:
    """`quantization_config` as llm-awq and AutoAWQ write it."""
    return {
        "quant_method": "awq",
        "bits": config.bits,
        "group_size": config.group_size if config.per == "group" else -1,
        "zero_point": True,
        "version": "gemm",
    }


DESCRIBE: dict[str, Callable[[QuantConfig], dict]] = {
    "compressed-tensors": describe_compressed_tensors,
    "gptq": describe_gptq,
    "awq": describe_awq,
}


# Opening ------------------------------------------------------------------------------


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a folder in one of FORMATS, or of floats, in eval mode.

    Args:
        dtype: what embedding, head, norms and biases are cast to.
    Raises:
        FileNotFoundError: as `checkpoint.load`.
        ValueError: the folder needs what is not supported here, or its tensors do not
            fit config.json; they are named.
    """
    folder = Path(folder)
    raw = checkpoint.read_json(folder / "config.json")
    described = raw.pop("quantization_config", None)
    if described is None:
        return checkpoint.load(folder, dtype)
    bits, read = reader(described)
    config = checkpoint.config_from_hf(raw)
    state = checkpoint.read_state(folder)
    if config.tie_word_embeddings and not checkpoint.tie(state):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Llama(config)

    made = {}
    for name, linear in walk_blocks(model).items():
        parts = {}
        for key in [key for key in state if key.rpartition(".")[0] == name]:
            if key != f"{name}.bias":
                parts[key.rpartition(".")[2]] = state.pop(key)
        weight = read_linear(name, parts, read, tuple(linear.weight.shape), bits)
        made[name] = quant_linear(weight, linear.bias)
    walk.put_modules(model, made)
    checkpoint.check(model, state)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return checkpoint.fill(model, state).eval()


def reader(described: dict) -> tuple[int, Callable[[dict], Stored]]:
    """Bits, and what reads a linear's tensors, from a `quantization_config`.

    Raises:
        ValueError: it asks for what is not supported, which is named.
    """
    method = described.get("quant_method")
    if method == "compressed-tensors":
        groups = described.get("config_groups") or {}
        if described.get("format") != "pack-quantized" or len(groups) != 1:
            raise ValueError(
                f"format={described.get('format')!r} with {len(groups)} config_groups"
                " is not supported: only 'pack-quantized' with one"
            )
        (group,) = groups.values()
        if group.get("input_activations"):
            raise ValueError(
                "input_activations are quantised in this folder: only weights are"
                " supported"
            )
        bits = group["weights"]["num_bits"]
        return bits, lambda parts: packing.from_compressed_tensors(parts, bits)
    if method == "gptq":
        bits = described["bits"]
        v2 = described.get("checkpoint_format") == "gptq_v2"
        return bits, lambda parts: packing.from_gptq(parts, bits, v2)
    if method == "awq":
        if described.get("version", "gemm").lower() != "gemm":
            raise ValueError(
                f"version={described['version']!r} is not supported: only 'gemm'"
            )
        return described["bits"], packing.from_awq
    raise ValueError(f"quant_method={method!r} is not supported: one of {FORMATS}")


def read_linear(
    name: str, parts: dict[str, Tensor], read: Callable, shape: tuple, bits: int
) -> Stored:
    """One linear's weight from its tensors.

    Raises:
        ValueError: a tensor is missing or has another shape than the model's.
    """
    try:
        weight = read(parts)
    except KeyError as missing:
        found = ", ".join(sorted(parts)) or "nothing"
        raise ValueError(f"{name} lacks {missing}; the file holds {found}") from None
    if tuple(weight.codes.shape) != shape:
        raise ValueError(
            f"{name} has codes of shape {tuple(weight.codes.shape)}, not {shape}"
        )
    return weight


def walk_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks by name; the weights need not be there yet."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found[name] = module
    return found
