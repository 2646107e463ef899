"""Bytes on a device under a plan, of the fullest pipeline stage.

    weights      2Ψ      ZeRO-3 cuts them over the data-parallel ranks
    gradients    4Ψ      ZeRO-2 and 3 cut them; Megatron sums them in 32 bits. With
                         `grad_bytes=2` all three together are ZeRO's 16Ψ
    optimizer    12Ψ     ZeRO-1, 2 and 3 cut it: fp32 copy and two averages
    activations  those of a microbatch, times the microbatches in flight
    logits       of the last stage, in 32 bits

    Ψ  parameters of the device's stage, cut by tp
    x  the shape of the model
    m  microbatches
    p  pipeline ranks
    v  chunks per pipeline rank
    n  tokens of a microbatch on one device

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
    """Parameters that one device of a stage holds, before ZeRO.

    Returns:
        (those that all data-parallel ranks share, those of experts)
    """
    layers = x.layers / plan.pp
    dense = attention_parameters(x)
    if not x.experts:
        dense += mlp_parameters(x)

    # What the first and the last stage have besides their layers.
    first = 0.0
    if stage == 0:
        first = (x.vocab / plan.tp + x.positions) * x.hidden  # the embedding
    last = 0.0
    if stage == plan.pp - 1:
        last = (2 if x.family == "gpt" else 1) * x.hidden  # the last norm
        if not x.tied or plan.pp > 1:  # tied: a copy of the embedding, on another rank
            last += x.vocab / plan.tp * x.hidden
    experts = layers * x.experts * mlp_parameters(x) / (plan.tp * plan.ep)
    shared = layers * (dense / plan.tp + replicated_parameters(x)) + (first + last)
    return shared, experts


def in_flight(plan: Plan, stage: int, m: int) -> float:
    """Microbatches whose activations a stage keeps at once under 1F1B.

    The unit is all layers of the stage. Interleaved, the first stage keeps
    1 + (p − 1)/(p v) times as many (Korthikanti et al. 2022, section 4.2.3).
    """
    p, v = plan.pp, plan.chunks
    if v == 1:
        return min(p - stage, m)
    return min((v * p + p - 1 - 2 * stage) / v, m)


def memory(job: Job, plan: Plan) -> dict[str, float]:
    """Bytes by kind on a device of the fullest stage."""
    first_and_last = {0, plan.pp - 1}
    stages = [_stage_memory(job, plan, stage) for stage in first_and_last]
    return max(stages, key=lambda kinds: sum(kinds.values()))


def _stage_memory(job: Job, plan: Plan, stage: int) -> dict[str, float]:
    shared, experts = stage_parameters(job.shape, plan, stage)
    replicas = plan.dp * plan.cp

    def held(bytes_per_parameter: float, cut: bool) -> float:
        if not cut:
            return bytes_per_parameter * (shared + experts)
        # ZeRO cuts over the ranks that hold the same parameters.
        pieces = shared / replicas + experts / (replicas / plan.ep)
        return bytes_per_parameter * pieces

    return {
        "weights": held(2, plan.zero >= 3),
        "gradients": held(plan.grad_bytes, plan.zero >= 2),
        "optimizer": held(12, plan.zero >= 1),
        "activations": _stage_activations(job, plan, stage),
        "logits": _stage_logits(job, plan, stage),
    }


def _stage_activations(job: Job, plan: Plan, stage: int) -> float:
    """Bytes kept for the backward pass, of all microbatches in flight."""
    x = job.shape
    m = microbatches(job, plan)
    kept_layer = layer_activations(
        x, job.seq, plan.microbatch, plan.tp, plan.sequence, plan.recompute
    )
    kept = kept_layer / plan.cp * x.layers / plan.pp * in_flight(plan, stage, m)
    if plan.recompute == "full":  # one layer at a time is computed again
        whole = layer_activations(x, job.seq, plan.microbatch, plan.tp, plan.sequence)
        kept += whole / plan.cp
    if stage == 0 and x.family == "gpt":
        mask = _tokens(job, plan) * x.hidden / _sequence_cut(plan)
        kept += mask * min(plan.pp, m)  # of the embedding's dropout
    return kept


def _stage_logits(job: Job, plan: Plan, stage: int) -> float:
    """Bytes of the last stage's logits and their input, in 32 bits."""
    if stage != plan.pp - 1:
        return 0.0
    x = job.shape
    per_token = 4 * x.hidden / _sequence_cut(plan) + 4 * x.vocab / plan.tp
    return _tokens(job, plan) * per_token


def _tokens(job: Job, plan: Plan) -> float:
    return job.seq / plan.cp * plan.microbatch


def _sequence_cut(plan: Plan) -> int:
    """Over how many ranks sequence parallelism cuts what tp leaves whole."""
    return plan.tp if plan.sequence else 1
