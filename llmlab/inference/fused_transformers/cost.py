"""What a layer's kernels are and what they cost: predicted from its shape.

    unfused   as our `Llama` runs: PyTorch launches each step of the formulas
    fused     as `layer` runs

A kernel cannot be faster than its bytes or its arithmetic allow, and it has to be
launched. On a CPU the one who launches computes as well; a GPU computes while the CPU
launches what comes next, and waits only where that takes longer:

    CPU   Σ (launch + work)        GPU   the queue: a kernel starts when it has been
    work = max(bytes / β, W / π)         launched and the one before has ended

    N = B T tokens      H, K, D  heads, key heads, head_dim      β  bytes per second
    S  tokens seen      d, f     hidden and intermediate size    π  FLOPs per second

Simplified: one type of number throughout, no bias, no mask; a norm's sums are in the
same type. Caches are left out: what one kernel wrote the next one reads from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmlab.models.llama import LlamaConfig

# What scripts/fused_sweep.py measured.
FILE = Path(__file__).parents[1] / "data" / "fused_transformers.csv"


@dataclass(frozen=True)
class Kernel:
    """A launch: numbers read and written, and FLOPs of a product."""

    name: str
    read: int
    written: int
    flops: int = 0

    @property
    def numbers(self) -> int:
        """Read and written."""
        return self.read + self.written


def product(tokens: int, inner: int, outer: int) -> Kernel:
    """x (tokens, inner) times a weight (outer, inner)."""
    read = tokens * inner + inner * outer
    return Kernel("mm", read, tokens * outer, 2 * tokens * inner * outer)


def attention(config: LlamaConfig, batch: int, new: int, past: int) -> Kernel:
    """Queries, keys and values read; outputs and a log-sum-exp for each row written."""
    H, K, D = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    rows, seen = batch * new * H, past + new
    read = rows * D + 2 * batch * K * seen * D
    return Kernel("attention", read, rows * (D + 1), 4 * rows * seen * D)


def _norm(N: int, d: int) -> list[Kernel]:
    """RMSNorm in six launches."""
    return [
        Kernel("pow", N * d, N * d),
        Kernel("mean", N * d, N),
        Kernel("add_", N, N),
        Kernel("rsqrt", N, N),
        Kernel("mul", N * d + N, N * d),
        Kernel("mul", d + N * d, N * d),
    ]


def _rotate(N: int, new: int, heads: int, D: int) -> list[Kernel]:
    """RoPE of one tensor in five launches."""
    n, table = N * heads * D, new * D
    return [
        Kernel("mul", n + table, n),
        Kernel("neg", n // 2, n // 2),
        Kernel("cat", n, n),
        Kernel("mul", n + table, n),
        Kernel("add", 2 * n, n),
    ]


def unfused(config: LlamaConfig, batch: int, new: int, past: int) -> list[Kernel]:
    """The launches of a layer of `Llama` with a cache that has room."""
    d, f, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    N = batch * new
    return [
        *_norm(N, d),
        product(N, d, H * D),
        product(N, d, K * D),
        product(N, d, K * D),
        *_rotate(N, new, H, D),
        *_rotate(N, new, K, D),
        Kernel("copy_", N * K * D, N * K * D),
        Kernel("copy_", N * K * D, N * K * D),
        attention(config, batch, new, past),
        product(N, H * D, d),
        Kernel("add", 2 * N * d, N * d),
        *_norm(N, d),
        product(N, d, f),
        Kernel("silu", N * f, N * f),
        product(N, d, f),
        Kernel("mul", 2 * N * f, N * f),
        product(N, f, d),
        Kernel("add", 2 * N * d, N * d),
    ]


def fused(config: LlamaConfig, batch: int, new: int, past: int) -> list[Kernel]:
    """The launches of a `FusedLayer`."""
    d, f, D = config.hidden_size, config.intermediate_size, config.head_dim
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * D
    H = config.num_attention_heads
    N = batch * new
    add_rms_norm = Kernel("add_rms_norm", 2 * N * d + d, 2 * N * d)
    return [
        add_rms_norm,
        product(N, d, rows),
        Kernel("rope_and_store", N * rows + N * D, N * rows),
        attention(config, batch, new, past),
        product(N, H * D, d),
        add_rms_norm,
        product(N, d, 2 * f),
        Kernel("swiglu", 2 * N * f, N * f),
        product(N, f, d),
    ]


def work(kernel: Kernel, bandwidth: float, speed: float, bytes_each: int = 2) -> float:
    """Seconds that a kernel takes at least, once it runs."""
    return max(bytes_each * kernel.numbers / bandwidth, kernel.flops / speed)


def queued(seconds: Sequence[float], launch: float) -> float:
    """When the last kernel of a queue has ended.

    Args:
        seconds: of each kernel.
        launch: seconds between two launches.

    >>> queued([1.0, 1.0, 9.0], launch=2.0)  # the third starts at 6
    15.0
    """
    launched = ended = 0.0
    for each in seconds:
        launched += launch
        ended = max(launched, ended) + each
    return ended
