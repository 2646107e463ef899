"""What papers on distributed training print, computed again from shapes, throughputs and our cost models.

Each function is one rule; `OURS` gives them names, for tables that are kept as data. Bytes are bytes, seconds seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from llmlab.parallelism import cost, planner, shapes
from llmlab.parallelism.machines import machine
from llmlab.parallelism.plan import Job, Plan

SHAPES = {  # layers, hidden, heads; vocabulary 51,200 and sequence 2048 as in Megatron's papers
    "22B": (48, 6144, 64),
    "175B": (96, 12288, 96),
    "530B": (105, 20480, 128),
    "1T": (128, 25600, 160),
}
SETUPS = {  # Korthikanti et al. 2022, table 3: tp, pp, chunks, devices, sequences a step, microbatch
    "22B": (8, 1, 1, 8, 4, 4),
    "175B": (8, 8, 3, 64, 64, 1),
    "530B": (8, 35, 3, 280, 280, 1),
    "1T": (8, 64, 1, 512, 512, 1),
}


def gpt_parameters(L: int, d: int, H: int) -> int:
    """Parameters of a GPT with Megatron's vocabulary and positions."""
    return shapes.parameters(shapes.gpt(L, d, H))


def zero_bytes(stage: int, parameters: float, n: int) -> float:
    """ZeRO's 16Ψ: 2 for weights, 2 for gradients and 12 for Adam, of which the stage cuts some n ways."""
    cut = [each / (n if stage >= first else 1) for each, first in ((2, 3), (2, 2), (12, 1))]
    return sum(cut) * parameters


def training_days(parameters: float, tokens: float, n: int, tera: float) -> float:
    """8 T P / (n X): Narayanan et al. 2021, equation 4; the 8 counts full recomputation."""
    return 8 * tokens * parameters / (n * tera * 1e12) / 86_400


def hardware_tera(name: str, n: int, batch: int, step: float) -> float:
    """teraFLOP/s a device with recomputation counted (Narayanan et al. 2021, equation 3), from seconds a step."""
    L, d, _ = SHAPES[name]
    flops = 96 * batch * 2048 * L * d**2 * (1 + 2048 / (6 * d) + 51_200 / (16 * L * d))
    return flops / (n * step) / 1e12


def dense_mfu(
    parameters: float, L: int, H: int, D: int, seq: int, rate: float, n: int, tera: float, attention: int
) -> float:
    """Percent of peak that (6N + 12 L H D T) FLOPs a token are, at `rate` tokens a second (Chowdhery et al. 2022, app. B)."""
    each = 6 * parameters + (12 * L * H * D * seq if attention else 0)
    return 100 * rate * each / (n * tera * 1e12)


def gpt_mfu(name: str, step: float) -> float:
    """MFU in percent of a setup of Korthikanti et al. 2022 that takes `step` seconds."""
    return 100 * planner.mfu(_job(name), SETUPS[name][3], step)


def predicted_step(name: str, recompute: str) -> float:
    """Seconds a step that our cost model expects; "selective" comes with sequence parallelism, as in the paper."""
    t, p, v, n, _, b = SETUPS[name]
    way = Plan(n // t // p, t, p, microbatch=b, chunks=v, recompute=recompute, sequence=recompute == "selective")
    return planner.estimate(_job(name), way).step


def attention_term(name: str) -> float:
    """5 a s / h: what the attention scores add to the 34 of a GPT layer's activations."""
    _, d, H = SHAPES[name]
    return 5 * H * 2048 / d


def selective_saving(name: str) -> float:
    """Percent of a layer's activations that selective recomputation saves, tp and sequence parallel."""
    x = shapes.gpt(*SHAPES[name])
    kept = [shapes.layer_activations(x, 2048, 1, 8, True, way) for way in ("selective", "none")]
    return 100 * (1 - kept[0] / kept[1])


def selective_overhead(name: str) -> float:
    """Percent of FLOPs that it adds by the paper's formulas: (1 + s/3h + V/12hL) against (1 + s/6h + V/12hL).

    That counts the scores' forward pass three times; one forward pass more is a third of it.
    """
    L, d, _ = SHAPES[name]
    return 100 * (2048 / (6 * d)) / (1 + 2048 / (6 * d) + 51_200 / (12 * d * L))


def bubble(p: int, m: int, v: int = 1) -> float:
    """Percent of a step's useful time that a pipeline waits: (p − 1) / (v m) (Narayanan et al. 2021, section 2.2)."""
    return 100 * (p - 1) / (v * m)


def all_reduce_share(p: int) -> float:
    """Bytes that a ring's rank sends for one byte of the tensor: 2 (p − 1) / p."""
    return cost.sent("all_reduce", 0, [1] * p) / p


def _job(name: str) -> Job:
    return Job(shapes.gpt(*SHAPES[name]), SETUPS[name][4], 2048, machine("a100-80gb"))


OURS: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        gpt_parameters,
        zero_bytes,
        training_days,
        hardware_tera,
        dense_mfu,
        gpt_mfu,
        predicted_step,
        attention_term,
        selective_saving,
        selective_overhead,
        bubble,
        all_reduce_share,
    )
}
