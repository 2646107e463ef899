"""The engine: many requests on one model, made of the functions of the lessons.

    request    what is asked, and what comes out
    engine     add, step, abort; one step is a plan, blocks, a pass, tokens
    batch      one forward pass over new tokens of many requests
    speculate  who drafts: the text itself, or a small model
    adapters   LoRA for each request
    pieces     the functions that can be others, and what is asked of them

Start with `engine`.
"""

from llmlab.inference.engine.adapters import Adapter, Adapters
from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.engine.engine import Engine, EngineConfig, Stats, cache_blocks
from llmlab.inference.engine.pieces import PieceError, Pieces
from llmlab.inference.engine.request import Event, Request, SamplingParams

__all__ = [
    "Adapter",
    "Adapters",
    "Chunk",
    "Engine",
    "EngineConfig",
    "Event",
    "PieceError",
    "Pieces",
    "Request",
    "SamplingParams",
    "Stats",
    "cache_blocks",
    "compute",
]
