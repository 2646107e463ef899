"""What papers on distributed training print, computed again from our cost models.

Each function is one rule; `OURS` gives them names, for tables that are kept as data.
Bytes are bytes, seconds seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from llmlab.parallelism.choosing import Job, Plan, machine, planner, shapes
from llmlab.parallelism.runtime import cost

# layers, hidden, heads; vocabulary 51,200 and sequence 2048 as in Megatron's papers
SHAPES = {
    "22B": (48, 6144, 64),
    "175B": (96, 12288, 96),
    "530B": (105, 20480, 128),
    "1T": (128, 25600, 160),
}
# Korthikanti et al. 2022, table 3: tp, pp, chunks, devices, sequences per step,
# microbatch
SETUPS = {
    "22B": (8, 1, 1, 8, 4, 4),
    "175B": (8, 8, 3, 64, 64, 1),
    "530B": (8, 35, 3, 280, 280, 1),
    "1T": (8, 64, 1, 512, 512, 1),
}
# Narayanan et al. 2021, table 1: layers, hidden, heads, tp, pp, devices, sequences a
# step, teraFLOP/s a device
MEGATRON = (
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (30, 3072, 32, 2, 1, 64, 512, 138),
    (36, 4096, 32, 4, 1, 128, 512, 142),
    (40, 6144, 48, 8, 1, 256, 1024, 135),
    (48, 8192, 64, 8, 2, 512, 1536, 138),
    (60, 10240, 80, 8, 4, 1024, 1792, 140),
    (80, 12288, 96, 8, 8, 1536, 2304, 148),
    (96, 16384, 128, 8, 16, 1920, 2160, 155),
    (105, 20480, 128, 8, 35, 2520, 2520, 163),
    (128, 25600, 160, 8, 64, 3072, 3072, 163),
)
# Korthikanti et al. 2022, table 5: seconds per step with full recomputation, and
# selective with sequence parallelism
STEPS = {
    "22B": {"full": 1.42, "selective": 1.10},
    "175B": {"full": 18.13, "selective": 13.75},
    "530B": {"full": 49.05, "selective": 37.83},
    "1T": {"full": 94.42, "selective": 71.49},
}


def gpt_parameters(L: int, d: int, H: int) -> int:
    """Parameters of a GPT with Megatron's vocabulary and positions."""
    return shapes.parameters(shapes.gpt(L, d, H))


def mixture_parameters(name: str, active: int) -> int:
    """Parameters of a mixture of experts, all (active=0) or those that a token uses
    (active=1).
    """
    return (shapes.active_parameters if active else shapes.parameters)(
        shapes.MIXTURES[name]
    )


def zero_bytes(stage: int, parameters: float, n: int) -> float:
    """ZeRO's 16Ψ: 2 for weights, 2 for gradients and 12 for Adam, of which the stage
    cuts some n ways.
    """
    cut = [
        each / (n if stage >= first else 1) for each, first in ((2, 3), (2, 2), (12, 1))
    ]
    return sum(cut) * parameters


def training_days(parameters: float, tokens: float, n: int, tera: float) -> float:
    """8 T P / (n X): Narayanan et al. 2021, equation 4.

    The 8 counts full recomputation.
    """
    return 8 * tokens * parameters / (n * tera * 1e12) / 86_400


def hardware_tera(name: str, n: int, batch: int, step: float) -> float:
    """teraFLOP/s a device with recomputation counted (Narayanan et al. 2021, equation
    3), from seconds per step.
    """
    return megatron_flops(*SHAPES[name][:2], batch) / (n * step) / 1e12


def megatron_flops(L: int, d: int, batch: int) -> float:
    """96 B s L h² (1 + s/6h + V/16Lh): a step's FLOPs with full recomputation, s = 2048
    and V = 51,200.
    """
    return 96 * batch * 2048 * L * d**2 * (1 + 2048 / (6 * d) + 51_200 / (16 * L * d))


def predicted_tera(
    L: int, d: int, H: int, tp: int, pp: int, n: int, batch: int
) -> float:
    """What our cost model expects for a row of `MEGATRON`.

    Microbatch and chunks, which are not printed, are the best.
    """
    job = Job(shapes.gpt(L, d, H), batch, 2048, machine("a100-80gb"))
    tries = [
        planner.estimate(
            job,
            Plan(
                n // tp // pp, tp, pp, microbatch=b, zero=0, recompute="full", chunks=v
            ),
        )
        for b in planner.MICROBATCHES
        for v in range(1, 6)
    ]
    return (
        megatron_flops(L, d, batch)
        / (n * min(e.step for e in tries if not e.problems))
        / 1e12
    )


def dense_mfu(
    parameters: float,
    L: int,
    H: int,
    D: int,
    seq: int,
    rate: float,
    n: int,
    tera: float,
    attention: int,
) -> float:
    """Percent of peak that (6N + 12 L H D T) FLOPs per token are, at `rate` tokens a
    second (Chowdhery et al. 2022, app. B).
    """
    each = 6 * parameters + (12 * L * H * D * seq if attention else 0)
    return 100 * rate * each / (n * tera * 1e12)


def gpt_mfu(name: str, step: float) -> float:
    """MFU in percent of a setup of Korthikanti et al. 2022 that takes `step`
    seconds.
    """
    return 100 * planner.mfu(_job(name), SETUPS[name][3], step)


def predicted_step(name: str, recompute: str) -> float:
    """Seconds a step that our cost model expects; "selective" comes with sequence
    parallelism, as in the paper.
    """
    t, p, v, n, _, b = SETUPS[name]
    way = Plan(
        n // t // p,
        t,
        p,
        microbatch=b,
        chunks=v,
        recompute=recompute,
        sequence=recompute == "selective",
    )
    return planner.estimate(_job(name), way).step


def attention_term(name: str) -> float:
    """5 a s / h: what the attention scores add to the 34 of a GPT layer's
    activations.
    """
    _, d, H = SHAPES[name]
    return 5 * H * 2048 / d


def selective_saving(name: str) -> float:
    """Percent of a layer's activations that selective recomputation saves, tp and
    sequence parallel.
    """
    x = shapes.gpt(*SHAPES[name])
    kept = [
        shapes.layer_activations(x, 2048, 1, 8, True, way)
        for way in ("selective", "none")
    ]
    return 100 * (1 - kept[0] / kept[1])


def selective_overhead(name: str) -> float:
    """Percent of FLOPs that it adds by the paper's formulas: (1 + s/3h + V/12hL)
    against (1 + s/6h + V/12hL).

    That counts the scores' forward pass three times; one forward pass more is a third
    of it.
    """
    L, d, _ = SHAPES[name]
    return 100 * (2048 / (6 * d)) / (1 + 2048 / (6 * d) + 51_200 / (12 * d * L))


def bubble(p: int, m: int, v: int = 1) -> float:
    """Percent of a step's useful time that a pipeline waits: (p − 1) / (v m) (Narayanan
    et al. 2021, section 2.2).
    """
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
        mixture_parameters,
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
