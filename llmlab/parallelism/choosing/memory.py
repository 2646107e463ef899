"""Bytes on a device under a plan, of the fullest pipeline stage.

    weights      2Ψ      ZeRO-3 cuts them over the data-parallel ranks         Ψ
                         parameters of the device's stage, cut by tp
    gradients    4Ψ      ZeRO-2 and 3 cut them                                 (Megatron
                         sums them in 32 bits; with
    optimizer    12Ψ     ZeRO-1, 2 and 3 cut it: fp32 copy, two averages
                         `grad_bytes=2` it is ZeRO's 16Ψ)
    activations  of a microbatch, times the microbatches in flight
    logits       of the last stage, in 32 bits

Sources: Rajbhandari et al. 2020 (ZeRO), https://arxiv.org/abs/1910.02054, figure 1;
Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4. Left out:
fragmentation, communication buffers, the CUDA context.
"""

from __future__ import annotations

from llmlab.parallelism.choosing.plan import Job, Plan, microbatches
from llmlab.parallelism.choosing.shapes import (
    Shape,
    attention_parameters,
    layer_activations,
    mlp_parameters,
    replicated_parameters,
)


def stage_parameters(x: Shape, plan: Plan, stage: int) -> tuple[float, float]:
    """(shared by all data-parallel ranks, experts) that one device of a stage holds
    before ZeRO.
    """
    layers = x.layers / plan.pp
    dense = attention_parameters(x) + (0 if x.experts else mlp_parameters(x))
    ends = (stage == 0) * (x.vocab / plan.tp + x.positions) * x.hidden
    last = stage == plan.pp - 1
    ends += (
        last * (2 if x.family == "gpt" else 1) * x.hidden
        + (last and not (x.tied and plan.pp == 1)) * x.vocab / plan.tp * x.hidden
    )
    experts = layers * x.experts * mlp_parameters(x) / (plan.tp * plan.ep)
    return layers * (dense / plan.tp + replicated_parameters(x)) + ends, experts


def in_flight(plan: Plan, stage: int, m: int) -> float:
    """Microbatches whose activations a stage keeps at once under 1F1B, in units of all
    its layers.

    Interleaved: 1 + (p − 1)/(p v) times as many on the first stage (Korthikanti et al.
        2022, section 4.2.3).
    """
    p, v = plan.pp, plan.chunks
    if v == 1:
        return min(p - stage, m)
    return min((v * p + p - 1 - 2 * stage) / v, m)


def memory(job: Job, plan: Plan) -> dict[str, float]:
    """Bytes by kind on a device of the fullest stage."""
    stages = (_stage_memory(job, plan, r) for r in {0, plan.pp - 1})
    return max(stages, key=lambda kinds: sum(kinds.values()))


def _stage_memory(job: Job, plan: Plan, stage: int) -> dict[str, float]:
    x, n = job.shape, job.seq / plan.cp * plan.microbatch
    shared, experts = stage_parameters(x, plan, stage)

    # ZeRO cuts over the ranks that hold the same parameters
    def held(each: float, cut: bool) -> float:
        replicas = plan.dp * plan.cp
        return each * (
            shared / (replicas if cut else 1)
            + experts / (replicas / plan.ep if cut else 1)
        )

    layer = (
        layer_activations(
            x, job.seq, plan.microbatch, plan.tp, plan.sequence, plan.recompute
        )
        / plan.cp
    )
    whole = plan.tp if plan.sequence else 1
    m = microbatches(job, plan)
    kept = layer * x.layers / plan.pp * in_flight(plan, stage, m)
    if plan.recompute == "full":  # one layer at a time comes back in full
        kept += (
            layer_activations(x, job.seq, plan.microbatch, plan.tp, plan.sequence)
            / plan.cp
        )
    if stage == 0 and x.family == "gpt":
        kept += n * x.hidden / whole * min(plan.pp, m)  # the embedding's dropout mask
    logits = (
        n * (4 * x.hidden / whole + 4 * x.vocab / plan.tp)
        if stage == plan.pp - 1
        else 0.0
    )
    return {
        "weights": held(2, plan.zero >= 3),
        "gradients": held(plan.grad_bytes, plan.zero >= 2),
        "optimizer": held(12, plan.zero >= 1),
        "activations": kept,
        "logits": logits,
    }
