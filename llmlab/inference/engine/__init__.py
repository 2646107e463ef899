"""The engine: many requests on one model, made of the functions of the lessons.

    request    what is asked, and what comes out
    engine     add, step, abort; one step is a plan, blocks, a pass, tokens
    batch      one forward pass over new tokens of many requests
    speculate  who drafts: the text itself, or a small model
    adapters   LoRA for each request
    attention  paged attention in C (`attention.c`), where it compiles
    packed     a model whose weights lie as the processor multiplies them
    pieces     the functions that can be others, and what is asked of them

Start with `engine`.
"""

from llmlab.inference.engine.adapters import Adapter, Adapters
from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.engine.engine import Engine, EngineConfig, Stats, cache_blocks
from llmlab.inference.engine.packed import PackedLinear, packed
from llmlab.inference.engine.pieces import PieceError, Pieces
from llmlab.inference.engine.request import Event, Request, SamplingParams

__all__ = [
    "Adapter",
    "Adapters",
    "Chunk",
    "Engine",
    "EngineConfig",
    "Event",
    "PackedLinear",
    "PieceError",
    "Pieces",
    "Request",
    "SamplingParams",
    "Stats",
    "cache_blocks",
    "compute",
    "packed",
]
