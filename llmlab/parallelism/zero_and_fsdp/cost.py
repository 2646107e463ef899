"""What ZeRO's stages cost a rank: bytes held between forward and step, bytes sent.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, sections 3.1 (the 16 bytes),
5 (memory) and 7 (communication).

    Ψ  parameters
    N  ranks
    m  microbatches per step
    K  12 bytes of optimizer state per parameter (fp32 w, m, v)

    stage   held               sent    in which collectives
    0       2Ψ + 2Ψ + KΨ       2       all-reduce gradients
    1       2Ψ + 2Ψ + KΨ/N     2       reduce-scatter gradients, all-gather weights
    2       2Ψ + (2 + K)Ψ/N    m + 1   the reduce-scatter comes with each microbatch
    3       (2 + 2 + K)Ψ/N     3m      per microbatch: gather in forward, gather in
                                       backward, reduce-scatter

"Sent" is in units of (N−1)/N · 2Ψ bytes: weights and gradients of 16 bits.

The paper has m = 1 and leaves out the factor (N−1)/N of a ring. Not counted:
activations, the collectives' buffers, the unit that is whole at the moment, and in
stage 2 the gradient of the unit that is not yet complete.
"""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

STAGES = (0, 1, 2, 3)
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12  # bytes per parameter

# Table 1 of the paper: GB per device, by model (parameters) and number of ranks, for
# stages 1, 2 and 3, as printed.
TABLE_1 = {
    7.5e9: {
        1: ("120", "120", "120"),
        4: ("52.5", "41.3", "30"),
        16: ("35.6", "21.6", "7.5"),
        64: ("31.4", "16.6", "1.88"),
        256: ("30.4", "15.4", "0.47"),
        1024: ("30.1", "15.1", "0.12"),
    },
    128e9: {
        1: ("2048", "2048", "2048"),
        4: ("896", "704", "512"),
        16: ("608", "368", "128"),
        64: ("536", "284", "32"),
        256: ("518", "263", "8"),
        1024: ("513", "257", "2"),
    },
    1e12: {
        1: ("16000", "16000", "16000"),
        4: ("7000", "5500", "4000"),
        16: ("4750", "2875", "1000"),
        64: ("4187", "2218", "250"),
        256: ("4046", "2054", "62.5"),
        1024: ("4011", "2013", "15.6"),
    },
}
# Table 2, 64 GPUs of 32 GB, no model parallelism: the largest model by the formula, by
# stage, and what ran.
TABLE_2 = {
    "predicted": {0: 2e9, 1: 7.6e9, 2: 14.4e9, 3: 128e9},
    "ran": {0: 1.3e9, 1: 6.2e9},
}


def _check(stage: int, ranks: int) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {STAGES}")
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")


def state_bytes(
    stage: int,
    parameters: float,
    ranks: int,
    *,
    weight: int = WEIGHT,
    gradient: int = GRADIENT,
    optimizer: int = OPTIMIZER,
) -> dict[str, float]:
    """Bytes that a rank holds after backward, by kind.

    Args:
        weight, gradient, optimizer: bytes per parameter; by default those of mixed
            precision with Adam.
    Raises:
        ValueError: an unknown stage, or no rank.
    """
    _check(stage, ranks)

    def share(first):
        return (
            parameters / ranks if stage >= first else parameters
        )  # cut from stage `first` on

    return {
        "weights": weight * share(3),
        "gradients": gradient * share(2),
        "optimizer": optimizer * share(1),
    }


def total_bytes(stage: int, parameters: float, ranks: int) -> float:
    """The sum of `state_bytes`."""
    return sum(state_bytes(stage, parameters, ranks).values())


def sent_bytes(
    stage: int,
    parameters: float,
    ranks: int,
    *,
    microbatches: int = 1,
    kept: float = 0,
    itemsize: int = WEIGHT,
) -> float:
    """Bytes that a rank sends in one optimizer step, with ring collectives.

    Args:
        microbatches: backward passes before the step.
        kept: parameters that stage 3 does not free between forward and backward (the
            root's).
    Raises:
        ValueError: an unknown stage, or no rank or microbatch.
    """
    _check(stage, ranks)
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches} must be at least 1")
    m = microbatches
    passes = (
        2 * parameters,
        2 * parameters,
        (m + 1) * parameters,
        m * (3 * parameters - kept),
    )[stage]
    return passes * itemsize * (ranks - 1) / ranks


def largest_model(stage: int, memory: float, ranks: int) -> float:
    """Parameters whose model state fills `memory` bytes on each of `ranks` devices."""
    return memory / total_bytes(stage, 1.0, ranks)


def agreement(value: float, printed: str) -> str:
    """How a value agrees with a printed number: "same" when rounded to its digits,
    "cut" when only without rounding, or "differs".
    """
    step = Decimal(1).scaleb(-len(printed.partition(".")[2]))  # 0.1 for "31.4"
    for word, mode in (("same", ROUND_HALF_UP), ("cut", ROUND_DOWN)):
        if Decimal(value).quantize(step, mode) == Decimal(printed):
            return word
    return "differs"
