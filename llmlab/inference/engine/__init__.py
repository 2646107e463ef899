"""The engine: many requests on one model, made of the functions of the lessons.

    request    what is asked, and what comes out
    engine     add, step, abort; one step is a plan, blocks, a pass, tokens
    batch      one forward pass over new tokens of many requests
    speculate  who drafts: the text itself, or a small model
    adapters   LoRA for each request
    attention  paged attention in C (`attention.c`), where it compiles
    packed     a model whose weights lie as the processor multiplies them
    pieces     the functions that can be others, and what is asked of them

and, before anything runs:

    weight_maps  a family of models as data: its checkpoints become our Llama
    building     checkpoint → engine folder → engine
    plugins      which function multiplies with a weight, chosen by measuring
    fused        q, k, v in one product, gate and up in another
    memory       weights, activations, and the blocks that fit

Start with `engine`.
"""

from pathlib import Path

from llmlab.inference.engine.adapters import Adapter, Adapters
from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.engine.building import (
    BuildConfig,
    Built,
    build,
    open_engine,
    summary,
    tactics_table,
)
from llmlab.inference.engine.engine import Engine, EngineConfig, Stats, cache_blocks
from llmlab.inference.engine.memory import Memory, block_bytes, blocks_that_fit
from llmlab.inference.engine.packed import PackedLinear, packed
from llmlab.inference.engine.pieces import PieceError, Pieces
from llmlab.inference.engine.plugins import Plugin
from llmlab.inference.engine.request import Event, Request, SamplingParams
from llmlab.inference.engine.weight_maps import FAMILIES, Family, Row, split_qkv

DATA = Path(__file__).parent.parent / "data"
RUNS = DATA / "engine_build.csv"  # what scripts/engine_sweep.py measured
LOADS = DATA / "load_test.jsonl"  # what scripts/load_test.py found
PEERS = DATA / "engine_peers.json"  # what two other engines wrote

__all__ = [
    "FAMILIES",
    "LOADS",
    "PEERS",
    "RUNS",
    "Adapter",
    "Adapters",
    "BuildConfig",
    "Built",
    "Chunk",
    "Engine",
    "EngineConfig",
    "Event",
    "Family",
    "Memory",
    "PackedLinear",
    "PieceError",
    "Pieces",
    "Plugin",
    "Request",
    "Row",
    "SamplingParams",
    "Stats",
    "block_bytes",
    "blocks_that_fit",
    "build",
    "cache_blocks",
    "compute",
    "open_engine",
    "packed",
    "split_qkv",
    "summary",
    "tactics_table",
]
