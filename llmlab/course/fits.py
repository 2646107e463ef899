"""`llmlab fits`: what a model needs on this machine, to be run and to be trained.

Memory is counted from the shape, by the package's own accounting: weights
(`accounting`), 4-bit weights, adapters and what is kept for the backward pass
(`qlora.memory_plan`), 16 bytes per parameter for Adam (`accounting.adam_bytes`). Time
is an estimate: a few seconds of matrix products and of reading measure this CPU, and
the FLOPs and bytes of the shape are divided by what it did. Numbers take two bytes
(bf16) where the CPU multiplies those as fast as it does four (fp32), else four.

    N  parameters          T  tokens of a sequence
    F  FLOPs of a forward pass over the batch
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmlab.course import model_shapes

if TYPE_CHECKING:
    import torch

    from llmlab.models.llama import LlamaConfig

SECONDS = 5.0  # that the calibration takes
ROUNDS = 3  # of it
OF_PYTHON = 600e6  # bytes: the interpreter and torch, before a weight is loaded
USAGE = "a name (llama-2-7b, smollm2-135m …), or a config.json or the folder with one"


@dataclass(frozen=True)
class Speed:
    """What this CPU did in the calibration.

    Attributes:
        flops_bf16: of matrix products in bfloat16, per second.
        flops_fp32: the same in float32.
        bandwidth: bytes read from memory per second.
    """

    flops_bf16: float
    flops_fp32: float
    bandwidth: float

    @property
    def width(self) -> int:
        """Bytes of a number: 2 where bf16 is as fast as fp32, or nearly, else 4."""
        return 2 if self.flops_bf16 > 0.7 * self.flops_fp32 else 4

    @property
    def flops(self) -> float:
        """FLOPs per second in the numbers that are used."""
        return self.flops_bf16 if self.width == 2 else self.flops_fp32


@dataclass(frozen=True)
class Need:
    """One use of the model.

    Attributes:
        use: what it is.
        parts: bytes by kind.
        unit: what `seconds` is the time of.
        seconds: estimated.
    """

    use: str
    parts: dict[str, int]
    unit: str
    seconds: float

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def most(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def config_of(model: str) -> tuple[LlamaConfig, tuple[str, ...]]:
    """(the sizes of MODEL, what its checkpoint has and they do not show).

    Raises:
        ValueError: no such model, or one that is no dense Llama.
    """
    from llmlab.models.presets import PRESETS

    if model in PRESETS:
        return PRESETS[model], ()
    file = model_shapes.config_file(model)
    if file is None:
        raise model_shapes.unknown(model, [*PRESETS], USAGE)
    found = model_shapes.from_file(file)
    if found.experts:
        raise ValueError(
            f"MODEL={model!r} has {found.experts} experts in each layer: `llmlab fits`"
            " counts dense Llamas; `llmlab plan` counts mixtures"
        )
    return found.config, found.left_out


def needs(
    config: LlamaConfig, batch: int, seq: int, rank: int, speed: Speed
) -> list[Need]:
    """What five uses of a model need.

    Training keeps each block's input and computes one block again at a time; attention
    scores and logits are not counted.

    Args:
        config: the model's sizes.
        batch: sequences at once.
        seq: tokens of each.
        rank: of the adapters, which stand beside every linear.
        speed: what the CPU did.
    """
    from llmlab.models import accounting

    kept = memory_kinds(config, batch, seq, rank, speed.width)
    full = accounting.adam_bytes(config) | kept["activations"]
    forward = accounting.forward_flops(config, batch, seq)
    one = accounting.forward_flops(config, batch, 1, past=seq)
    # Training computes a block forward twice. A frozen weight needs no gradient, so its
    # backward pass is one product in place of two.
    tuned = kept["adapters"] | kept["activations"]
    rows = [
        ("inference", kept["weights"] | kept["cache"], "a token", one),
        ("inference in NF4", kept["NF4"] | kept["cache"], "a token", one),
        ("QLoRA", kept["NF4"] | tuned, "a step", 3 * forward),
        ("LoRA", kept["weights"] | tuned, "a step", 3 * forward),
        ("full fine-tuning", full, "a step", 4 * forward),
    ]
    out = []
    for use, parts, unit, flops in rows:
        # for a token, all weights and the cache are read once
        read = sum(parts.values()) if unit == "a token" else 0
        seconds = max(flops / speed.flops, read / speed.bandwidth)
        out.append(Need(use, parts, unit, seconds))
    return out


def memory_kinds(
    config: LlamaConfig, batch: int, seq: int, rank: int, width: int
) -> dict[str, dict[str, int]]:
    """Bytes of what the uses are put together from; `width` bytes for a number."""
    from llmlab.models import accounting
    from llmlab.peft.qlora import QLoRAConfig, memory_plan

    plan = memory_plan(config, QLoRAConfig(r=rank), batch, seq)  # in bf16
    wide = {name: size * width // 2 for name, size in plan.items()}
    cache = accounting.kv_cache_bytes(config, batch, seq) * width // 2
    return {
        "weights": {"weights": width * accounting.parameters(config)},
        "NF4": {
            "4-bit codes": plan["4-bit codes"],
            "scales": plan["scales"],
            "other weights": wide["other weights"],
        },
        "cache": {"KV cache": cache},
        "adapters": {
            "adapters": wide["adapters"],
            "gradients": wide["gradients"],
            "optimizer": plan["optimizer"],  # in fp32 either way
        },
        "activations": {"activations": wide["activations"]},
    }


def calibrate(seconds: float = SECONDS) -> Speed:
    """Measures this CPU, for about so many seconds.

    In turn, so that what else the machine does meets all three alike.
    """
    import torch

    share = seconds / 3 / ROUNDS
    rounds = [
        (
            _flops(torch.bfloat16, share),
            _flops(torch.float32, share),
            _bandwidth(share),
        )
        for _ in range(ROUNDS)
    ]
    return Speed(*map(max, zip(*rounds, strict=True)))


def _flops(dtype: torch.dtype, seconds: float) -> float:
    """FLOPs per second of products of two n × n matrices.

    n doubles from 256 until a product takes a fiftieth of a second.
    """
    import torch

    end = time.perf_counter() + seconds
    n = 128
    took = 0.0
    with torch.inference_mode():
        while took < 0.02 and n < 2048:
            n *= 2
            a = torch.randn(n, n).to(dtype)
            b = torch.randn(n, n).to(dtype)
            took = fastest(lambda a=a, b=b: a @ b, 0)
        left = end - time.perf_counter()
        return 2 * n**3 / min(took, fastest(lambda: a @ b, left))


def _bandwidth(seconds: float, size: int = 2**28) -> float:
    """Bytes per second that a sum over `size` bytes reads: more than caches hold."""
    import torch

    numbers = torch.ones(size // 4)
    with torch.inference_mode():
        return size / fastest(numbers.sum, seconds)


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many runs as there is time for, at least three.

    The fastest, since other programs can only make a run longer.
    """
    end = time.perf_counter() + seconds
    took: list[float] = []
    while len(took) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)


def memory_free() -> float:
    """Bytes for a model here: what can be had, less what Python and torch take."""
    from llmlab.course.kernels import memory

    return max(0.0, memory.available() - OF_PYTHON)
