"""What a pass costs: FLOPs, bytes, and the time that a machine needs at least.

Williams et al. 2009, the roofline, https://doi.org/10.1145/1498765.1498785; Pope et al.
2022, section 2, https://arxiv.org/abs/2211.05102. A pass over T new tokens in each of B
rows, with S tokens in each row at its end:

    seconds  ≥  max( Q / β,  W / π )
    Q        =  weights, once  +  B S · cache bytes per token
    W        ≈  2 N · B T  +  4 L H D S · B T

    N  weights that are multiplied     β  bandwidth, bytes per second
    L  layers                          π  speed, FLOPs per second
    H  query heads                     W / Q  arithmetic intensity
    D  head_dim                        π / β  intensity at which both take equally long

Prefill: T is the prompt's length, and one read of the weights serves all its tokens.
Decode: T = 1, and one read serves B tokens.

Simplified: activations stay on the chip, and reading and computing overlap perfectly.
Where a program waits for anything else, it is slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmlab.models.accounting import forward_flops, kv_cache_bytes, parameters
from llmlab.models.llama import LlamaConfig

# What scripts/prefill_decode_sweep.py measured on the real model, a pass a line.
FILE = Path(__file__).parents[1] / "data" / "prefill_decode.csv"

# Elements per token and layer that each kind of attention keeps: DeepSeek-V2, table 1.
KINDS = ("MHA", "GQA", "MQA", "MLA")


@dataclass(frozen=True)
class Machine:
    """Two rates and a size.

    Raises:
        ValueError: a number that is not above 0.
    """

    bandwidth: float  # bytes per second from the large memory, β
    speed: float  # FLOPs per second, π
    memory: float = float("inf")  # bytes

    def __post_init__(self) -> None:
        for name in ("bandwidth", "speed", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on arithmetic is the limit."""
        return self.speed / self.bandwidth


# Vendor's figures, dense 16-bit arithmetic: NVIDIA's data sheets of the SXM modules.
MACHINES = {
    "A100 80GB": Machine(2.039e12, 312e12, 80e9),
    "H100 80GB": Machine(3.35e12, 989e12, 80e9),
    "H200 141GB": Machine(4.8e12, 989e12, 141e9),
}


# Bytes ----------------------------------------------------------------------------


def cache_bytes(
    kind: str,
    layers: int,
    heads: int,
    head_dim: int,
    *,
    groups: int = 1,
    latent: int = 0,
    rope: int = 0,
    bytes_each: float = 2,
) -> float:
    """Bytes in the cache for one token.

    Args:
        kind: MHA keeps a key and a value for each head, GQA for each group, MQA one of
            each. MLA keeps one latent vector and one key with positions, for all heads.
        groups: key/value heads of GQA.
        latent: d_c of MLA.
        rope: d_h^R of MLA.
        bytes_each: of one number; less than 1 where several share a byte.
    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    per_layer = {
        "MHA": 2 * heads * head_dim,
        "GQA": 2 * groups * head_dim,
        "MQA": 2 * head_dim,
        "MLA": latent + rope,
    }
    return layers * per_layer[kind] * bytes_each


def weights_read(config: LlamaConfig, dtype: torch.dtype = torch.float16) -> int:
    """Bytes of the weights that a pass multiplies by.

    An embedding that is no head as well is only looked up: a few rows of it.
    """
    looked_up = 0
    if not config.tie_word_embeddings:
        looked_up = config.vocab_size * config.hidden_size
    return (parameters(config) - looked_up) * dtype.itemsize


# Time -----------------------------------------------------------------------------


def decode_time(
    batch: int,
    context: int,
    *,
    weights: float,
    cache: float,
    work: float,
    bandwidth: float,
    speed: float,
) -> float:
    """Seconds of one decoding step at least: every row gets one token.

    Args:
        batch: rows.
        context: tokens that each row has in the cache.
        weights: bytes of all weights.
        cache: bytes in the cache for one token.
        work: FLOPs for one new token.
        bandwidth: bytes per second.
        speed: FLOPs per second.
    """
    traffic = weights + batch * context * cache
    return max(traffic / bandwidth, batch * work / speed)


@dataclass(frozen=True)
class Pass:
    """A pass of a model on a machine."""

    tokens: int  # new ones, in all rows
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """New tokens per second: those read in prefill, those written in decode."""
        return self.tokens / self.seconds


def passes(
    config: LlamaConfig,
    machine: Machine,
    *,
    batch: int = 1,
    new: int = 1,
    past: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Pass:
    """The cost of one pass: `new` tokens in each row, behind `past` cached ones.

    With `past` 0 it is a prefill, and its seconds are the time to the first token. With
    `new` 1 it is a decoding step, and its seconds are the time per output token.

    Raises:
        ValueError: a size that is too small.
    """
    if batch < 1 or new < 1 or past < 0:
        raise ValueError(
            f"batch={batch} and new={new} must be at least 1, past={past} at least 0"
        )
    flops = forward_flops(config, batch, new, past, logits=1)
    cached = kv_cache_bytes(config, batch, past + new, dtype)
    traffic = weights_read(config, dtype) + cached
    seconds = max(traffic / machine.bandwidth, flops / machine.speed)
    return Pass(batch * new, flops, traffic, seconds)


def max_batch(memory: float, weights: float, cache: float, context: int) -> int:
    """Rows of `context` tokens that fit beside the weights; 0 if none does.

    Args:
        memory: bytes.
        weights: bytes of all weights.
        cache: bytes in the cache for one token.
    """
    return max(0, int((memory - weights) // (context * cache)))
