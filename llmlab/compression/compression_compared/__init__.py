"""What a compressed model costs, what it is worth, and which one to take.

    counting   bits, bytes and what is read per token, each tensor once
    speed      forms of a model that decode; tokens per second
    grammar    pairs of sentences, one of them wrong: a task with a verifier
    mixed      a plan for each matrix, some in many bits and some in few
    choosing   who is not beaten, and who fits a budget

`FILE` is what scripts/compression_compared_sweep.py measured on the real model, a
recipe a line; `SPEED` what its `--speed` did, with the CPU in it. Start with
`counting`.
"""

from pathlib import Path

from llmlab.compression.compression_compared.choosing import (
    best_within,
    combined,
    pareto,
)
from llmlab.compression.compression_compared.counting import (
    bits_of_linears,
    bits_per_parameter,
    parameters,
    per_token,
    stored_bytes,
    write,
)
from llmlab.compression.compression_compared.grammar import (
    PHENOMENA,
    Pair,
    accuracy,
    pairs,
    preferred,
)
from llmlab.compression.compression_compared.mixed import (
    follow,
    planned_bytes,
    rounded,
)
from llmlab.compression.compression_compared.speed import (
    CodedEmbedding,
    EightBitLinear,
    decode_rate,
    eight_bits,
    embedding_in_codes,
    predicted_rate,
)
from llmlab.models.machine import bandwidth

FILE = Path(__file__).parents[1] / "data" / "compression_compared.csv"
SPEED = Path(__file__).parents[1] / "data" / "compression_speed.csv"

__all__ = [
    "FILE",
    "PHENOMENA",
    "SPEED",
    "CodedEmbedding",
    "EightBitLinear",
    "Pair",
    "accuracy",
    "bandwidth",
    "best_within",
    "bits_of_linears",
    "bits_per_parameter",
    "combined",
    "decode_rate",
    "eight_bits",
    "embedding_in_codes",
    "follow",
    "pairs",
    "parameters",
    "pareto",
    "per_token",
    "planned_bytes",
    "predicted_rate",
    "preferred",
    "rounded",
    "stored_bytes",
    "write",
]
