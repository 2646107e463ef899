"""Checkpoint → engine folder → engine: all that can be decided before, is.

    read      the checkpoint through its family's weight map
    fuse      products that read the same input become one
    choose    for each shape of matrix the fastest of the plugins that are allowed,
              measured on this machine; likewise the attention
    plan      weights, activations, and as many blocks as fit
    write     engine.safetensors, and engine.json, which says all of this; the
              checkpoint's tokenizer beside them

TensorRT-LLM splits the work in this way: convert_checkpoint.py reads and cuts, and
trtllm-build chooses and writes. To open a folder is to map a file into memory.

A folder is written whole or not at all. When it is opened, two checksums are compared:
that of the document with the one in it, and that of the weights with the document's.

Simplified: TensorRT compiles a graph; here the graph stays PyTorch's, and what is
chosen are its products and its attention.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.inference.engine.adapters import Adapter
from llmlab.inference.engine.attention import paged_attention as in_c
from llmlab.inference.engine.engine import Engine, EngineConfig
from llmlab.inference.engine.fused import fuse
from llmlab.inference.engine.memory import Memory, planned, weight_bytes
from llmlab.inference.engine.pieces import Pieces
from llmlab.inference.engine.plugins import (
    CACHES,
    TORCH,
    Clock,
    Plugin,
    PluginLinear,
    Tactic,
    fastest,
    known,
    measured,
    seconds,
)
from llmlab.inference.engine.weight_maps import FAMILIES, Family, as_model, read
from llmlab.inference.paged_attention import paged_attention
from llmlab.models import checkpoint
from llmlab.models.llama import Llama, LlamaConfig

FORMAT = 1
DOCUMENT, WEIGHTS = "engine.json", "engine.safetensors"
HEAD = "lm_head"
ATTENTIONS: dict[str, Callable] = {"torch": paged_attention, "C": in_c}


@dataclass(frozen=True)
class BuildConfig:
    """What an engine may use, and what it is to be good at.

    Attributes:
        max_sequences: requests that run at one time; trtllm-build's max_batch_size.
        max_tokens: computed in one step; max_num_tokens.
        max_length: of a text, answer included; None is the model's. max_seq_len.
        block_size: tokens of a block; tokens_per_block.
        num_blocks: of the cache. Without it, give memory.
        memory: bytes that the engine may use, of which `utilisation` is taken.
        opt_tokens: in a step as it is expected; tactics are measured with so many.
            None is max_sequences: all decode.
        fused: whether q, k, v become one product, and gate and up another. Adapters
            find their part of it.
        linears: plugins that may multiply in the blocks; the fastest does.
        head: the same for the head.
    """

    max_sequences: int = 8
    max_tokens: int = 256
    max_length: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    memory: int | None = None
    utilisation: float = 0.9
    opt_tokens: int | None = None
    fused: bool = True
    linears: tuple[str, ...] = ("torch",)
    head: tuple[str, ...] = ("torch",)

    def __post_init__(self) -> None:
        for name in ("max_length", "opt_tokens", "num_blocks", "memory"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number from 1")
        for name in ("linears", "head"):
            value = getattr(self, name)
            if isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r} must be names of plugins")
        if (self.num_blocks is None) == (self.memory is None):
            raise ValueError(
                f"num_blocks={self.num_blocks} and memory={self.memory}: give one"
            )
        _ = self.engine(self.num_blocks or 1)  # the others raise here

    @property
    def expected(self) -> int:
        """Tokens with which tactics are measured."""
        return self.opt_tokens or self.max_sequences

    def engine(self, num_blocks: int) -> EngineConfig:
        """The limits, as the engine takes them."""
        return EngineConfig(
            num_blocks, self.block_size, self.max_tokens, self.max_sequences
        )


# Choosing -----------------------------------------------------------------------------


def choose(
    model: Llama,
    config: BuildConfig,
    plugins: Mapping[str, Plugin],
    clock: Clock = seconds,
) -> tuple[dict[str, str], list[Tactic]]:
    """The plugin of each linear, and all times. Linears of one shape are alike.

    Raises:
        ValueError: a plugin that was not given.
    """
    chosen: dict[str, str] = {}
    log: list[Tactic] = []
    of_shape: dict[tuple, str] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        allowed = config.head if name == HEAD else config.linears
        key = (*linear.weight.shape, allowed)
        if key not in of_shape:
            found = measured(linear.weight, config.expected, plugins, allowed, clock)
            log += found
            of_shape[key] = fastest(found)
        chosen[name] = of_shape[key]
    return chosen, log


@torch.inference_mode()
def choose_attention(
    config: LlamaConfig,
    sequences: int,
    block_size: int,
    attentions: Mapping[str, Callable],
    tokens: int = 256,
    clock: Clock = seconds,
) -> tuple[str, dict[str, float]]:
    """The fastest for so many texts of so many tokens, one query each."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    each = -(-tokens // block_size)
    q = torch.randn(sequences, H, D)
    keys, values = torch.randn(2, sequences * each, block_size, K, D)
    tables = torch.randperm(sequences * each).view(sequences, each)
    lengths = torch.full((sequences,), tokens)
    times = {
        name: clock(lambda f=function: f(q, keys, values, tables, lengths))
        for name, function in attentions.items()
    }
    return min(times, key=times.get), times


def put(model: Llama, chosen: Mapping[str, str], plugins: Mapping[str, Plugin]) -> None:
    """Linears whose plugin is not PyTorch's own are packed, in place."""
    for name, plugin_name in chosen.items():
        if plugin_name == "torch":
            continue
        linear = model.get_submodule(name)
        plugin = known(plugin_name, plugins)
        bias = None if linear.bias is None else linear.bias.detach()
        packed = plugin.pack(linear.weight.detach())
        set_module(model, name, PluginLinear(plugin, packed, bias))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` in the place of the one with that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# Building -----------------------------------------------------------------------------


@torch.inference_mode()
def build(
    source: str | Path,
    out: str | Path,
    config: BuildConfig,
    *,
    plugins: Mapping[str, Plugin] | None = None,
    attentions: Mapping[str, Callable] = ATTENTIONS,
    families: Mapping[str, Family] = FAMILIES,
    clock: Clock | None = None,
) -> dict:
    """An engine folder from a checkpoint folder.

    Args:
        out: must not exist.
        plugins: name → plugin, besides "torch".
        attentions: name → a function as `paged_attention`.
        clock: a function → seconds that it takes; None measures.
    Returns:
        What stands in engine.json.
    Raises:
        FileExistsError: `out` is there. FileNotFoundError: `source` is no checkpoint.
        ValueError: the checkpoint fits no map; a plugin that was not given; no room.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: an engine is not written over")
    plugins = {"torch": TORCH} | dict(plugins or {})
    for name in (*config.linears, *config.head):
        known(name, plugins)
    took = {}
    started = time.perf_counter()
    shape, state = read(source, families)
    shape = with_length(shape, config.max_length)
    model = as_model(shape, state)
    took["read"] = time.perf_counter() - started
    if config.fused:
        fuse(model)
    if clock is None:
        clock = partial(seconds, others=min(CACHES, weight_bytes(model)))
    started = time.perf_counter()
    chosen, log = choose(model, config, plugins, clock)
    attention, attention_times = choose_attention(
        shape, config.max_sequences, config.block_size, attentions, clock=clock
    )
    took["choose"] = time.perf_counter() - started
    started = time.perf_counter()
    put(model, chosen, plugins)
    took["pack"] = time.perf_counter() - started
    if chosen[HEAD] != "torch":
        shape = replace(shape, tie_word_embeddings=False)
    started = time.perf_counter()
    limits = (config.max_tokens, config.max_sequences, config.block_size)
    room = (config.num_blocks, config.memory, config.utilisation)
    memory = planned(model, *limits, *room)
    took["plan"] = time.perf_counter() - started
    document = {
        "format": FORMAT,
        "made by": {"llmlab": version(), "torch": torch.__version__},
        "source": {"sha256": digest_of_folder(Path(source))},
        "model": asdict(shape),
        "limits": asdict(config.engine(memory.blocks)),
        "memory": asdict(memory),
        "fused": config.fused,
        "linears": chosen,
        "attention": attention,
        "tactics": [tactic._asdict() for tactic in log],
        "attention tactics": attention_times,
    }
    return write(out, model, document, took, Path(source))


def with_length(config: LlamaConfig, longest: int | None) -> LlamaConfig:
    """The shape with texts of at most so many tokens.

    Raises:
        ValueError: the model has fewer positions.
    """
    if longest is None:
        return config
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"max_length={longest} is above the model's"
            f" {config.max_position_embeddings}"
        )
    return replace(config, max_position_embeddings=longest)


def write(out: Path, model: Llama, document: dict, took: dict, source: Path) -> dict:
    """The folder appears when all of it is written."""
    from safetensors.torch import save_file

    started = time.perf_counter()
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        weights = scratch / WEIGHTS
        save_file(stored(model), weights)
        checkpoint.copy_tokenizer(source, scratch)
        document["weights"] = {
            "bytes": weights.stat().st_size,
            "sha256": digest(weights),
        }
        took["write"] = time.perf_counter() - started
        document["seconds"] = took
        document["sha256"] = digest_of(document)
        text = json.dumps(document, indent=1) + "\n"
        (scratch / DOCUMENT).write_text(text, encoding="utf-8")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return document


def stored(model: Llama) -> dict[str, Tensor]:
    """The tensors of a file: a tied head is not stored twice."""
    state = dict(model.state_dict())
    head = state.get(checkpoint.HEAD)
    embedding = state[checkpoint.EMBEDDING]
    if head is not None and head.data_ptr() == embedding.data_ptr():
        del state[checkpoint.HEAD]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def version() -> str:
    """Of this package."""
    import llmlab

    return getattr(llmlab, "__version__", "0")


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(document: Mapping) -> str:
    """The SHA-256 of a document without its own."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Of a checkpoint: its configuration and its weights, in the order of names."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    lines = [f"{file.name} {digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Opening ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """An opened engine folder.

    Attributes:
        model: a Llama whose weights are the mapped file.
        limits: of the engine that runs it.
        attention: the function that was chosen.
        document: engine.json.
    """

    model: Llama
    limits: EngineConfig
    attention: Callable
    document: dict

    @property
    def memory(self) -> Memory:
        """As it was planned."""
        return Memory(**self.document["memory"])

    def engine(
        self,
        *,
        pieces: Pieces | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> Engine:
        """Ready for requests."""
        pieces = replace(pieces or Pieces(), paged_attention=self.attention)
        return Engine(self.model, self.limits, pieces=pieces, adapters=adapters)


def open_engine(
    folder: str | Path,
    *,
    plugins: Mapping[str, Plugin] | None = None,
    attentions: Mapping[str, Callable] = ATTENTIONS,
    verify: bool = True,
) -> Built:
    """An engine folder, mapped into memory.

    Args:
        plugins, attentions: as given to `build`.
        verify: whether the weights are read once, for their checksum. Without that,
            only their size is compared.
    Raises:
        FileNotFoundError: it is no engine folder.
        ValueError: it was altered or is not whole; another format; a plugin that it
            needs was not given.
    """
    folder = Path(folder)
    document = read_document(folder)
    plugins = {"torch": TORCH} | dict(plugins or {})
    for name in sorted({*document["linears"].values()}):
        known(name, plugins)
    attention = document["attention"]
    if attention not in attentions:
        raise ValueError(
            f"the attention {attention!r} was not given: there are"
            f" {', '.join(attentions)}"
        )
    state = read_weights(folder / WEIGHTS, document["weights"], verify)
    model = filled(document, state, plugins)
    limits = EngineConfig(**document["limits"])
    return Built(model, limits, attentions[attention], document)


def read_document(folder: Path) -> dict:
    """engine.json, looked at; raises as `open_engine`."""
    file = folder / DOCUMENT
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {folder} is no engine folder")
    document = checkpoint.read_json(file)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise ValueError(f"{file}: format={found!r} must be {FORMAT}: build it anew")
    if document.get("sha256") != digest_of(document):
        raise ValueError(f"{file} was altered: its checksum is another. Build it anew")
    return document


def read_weights(file: Path, expected: Mapping, verify: bool) -> dict[str, Tensor]:
    """The tensors of a file, mapped; raises as `open_engine`."""
    from safetensors.torch import load_file

    size = file.stat().st_size if file.is_file() else 0
    if size != expected["bytes"]:
        raise ValueError(f"{file} has {size} bytes, not {expected['bytes']}")
    if verify and digest(file) != expected["sha256"]:
        raise ValueError(f"{file} was altered: its checksum is another")
    return load_file(file)


def filled(
    document: Mapping, state: dict[str, Tensor], plugins: Mapping[str, Plugin]
) -> Llama:
    """The model that a document describes, on these tensors."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**document["model"]))
        if document["fused"]:
            fuse(model)
    for name, plugin_name in document["linears"].items():
        if plugin_name == "torch":
            continue
        start = f"{name}.stored_"
        keys = [key for key in state if key.startswith(start)]
        tensors = {key.removeprefix(start): state[key] for key in keys}
        bias = state.get(f"{name}.bias")
        set_module(model, name, PluginLinear(plugins[plugin_name], tensors, bias))
    return checkpoint.fill(model, state).eval()


# Printing -----------------------------------------------------------------------------


def summary(document: Mapping) -> str:
    """What was decided, as trtllm-build says it at its end."""
    limits, memory = document["limits"], document["memory"]
    counts: dict[str, int] = {}
    for name in document["linears"].values():
        counts[name] = counts.get(name, 0) + 1
    used = ", ".join(f"{count} × {name}" for name, count in counts.items())
    tokens = limits["num_blocks"] * limits["block_size"]
    lines = [
        f"sequences at once   {limits['max_sequences']}",
        f"tokens in a step    {limits['max_tokens']}",
        f"products            {used}{', fused' if document['fused'] else ''}",
        f"attention           {document['attention']}",
        f"weights             {memory['weights'] / 1e6:8.1f} MB",
        f"activations         {memory['activations'] / 1e6:8.1f} MB",
        f"cache               {memory['cache'] / 1e6:8.1f} MB,"
        f" {limits['num_blocks']} blocks, {tokens} tokens",
    ]
    return "\n".join(lines)


def tactics_table(tactics: Sequence[Mapping]) -> str:
    """All times; the fastest of a shape is marked."""
    lines = []
    shapes = {(t["rows"], t["columns"]) for t in tactics}
    for shape in sorted(shapes):
        of_shape = [t for t in tactics if (t["rows"], t["columns"]) == shape]
        best = min(of_shape, key=lambda t: t["seconds"])
        times = "  ".join(
            f"{t['plugin']} {1e3 * t['seconds']:.2f} ms{'*' if t is best else ''}"
            for t in of_shape
        )
        lines.append(f"{shape[0]:6} × {shape[1]:<5} {times}")
    return "\n".join(lines)
