"""Seconds of a training step under a plan, by kind.

    step = (m + (p − 1)/v) · t  +  pipeline sends  +  exposed gradient all-reduce  +
                                                      Adam
    t    = forward and backward of a stage's microbatch:  products + elementwise +
                                                          tensor + context (+ experts)

    products      FLOPs / (peak · efficiency); the one number that is calibrated is the
                  machine's `efficiency`
    elementwise   `TRAFFIC` bytes of memory traffic for each byte of saved activations,
                  at the memory's bandwidth
    tensor        4 all-reduces a layer (or pairs of all-gather and reduce-scatter: the
                  same bytes), 6 with full recomputation
    context       ring attention's K and V, as far as they do not hide behind attention
    data          one all-reduce of the gradients, as far as it does not hide behind the
                  last backward pass; ZeRO-3: all its gathers and scatters, as far as
                  they do not hide behind all products

Sources: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473; Korthikanti et al.
2022, https://arxiv.org/abs/2205.05198. Left out: jitter, data loading, and that
tensor-parallel communication can be overlapped (in 2021 it was not).
"""

from __future__ import annotations

from functools import lru_cache

from llmlab.parallelism.choosing.memory import stage_parameters
from llmlab.parallelism.choosing.plan import Job, Plan, microbatches
from llmlab.parallelism.choosing.shapes import layer_activations, layer_flops
from llmlab.parallelism.runtime import cost

TRAFFIC = 5.0  # written, read forward, read backward, and its gradient written and read


@lru_cache(maxsize=4096)
def _layer_seconds(
    job: Job,
    tp: int,
    cp: int,
    microbatch: int,
    sequence: bool,
    recompute: str,
    devices: int,
) -> dict[str, float]:
    """Forward and backward of one layer and one microbatch on one device, by kind."""
    x, machine, n = job.shape, job.machine, job.seq * microbatch / cp
    products, scores = layer_flops(x, job.seq)
    again = {
        "none": 0.0,
        "selective": scores if x.family == "gpt" else 0.0,
        "full": products + scores,
    }[recompute]
    flops = n / tp * (3 * (products + scores) + again)
    touched = layer_activations(x, job.seq, microbatch, tp, sequence) / cp
    times = {
        "products": flops / (machine.flops * machine.efficiency),
        "elementwise": (
            TRAFFIC
            * touched
            * (4 / 3 if recompute == "full" else 1)
            / machine.bandwidth
        ),
    }
    # all-reduces, or pairs of all-gather and reduce-scatter
    rounds = 6 if recompute == "full" else 4
    times["tensor"] = rounds * cost.seconds(
        "all_reduce", tp, 2 * n * x.hidden, machine.wire(tp, devices)
    )
    # K and V forward, K and V and their gradients backward
    hops = (cp - 1) * (3 if recompute != "full" else 4)
    ring = hops * cost.seconds(
        "all_gather", 2, 2 * 2 * n * 2 * x.kv / tp, machine.wire(tp * cp, devices)
    )
    # it hides behind attention
    times["context"] = max(0.0, ring - times["products"] * scores / (products + scores))
    return times


def seconds(job: Job, plan: Plan) -> dict[str, float]:
    """Seconds of a step by kind. "bubble" is the pipeline's waiting."""
    x, machine, p = job.shape, job.machine, plan.pp
    m, layers = microbatches(job, plan), x.layers / p
    layer = _layer_seconds(
        job,
        plan.tp,
        plan.cp,
        plan.microbatch,
        plan.sequence,
        plan.recompute,
        plan.devices,
    )
    n = job.seq * plan.microbatch / plan.cp
    head = n * 6.0 * x.vocab * x.hidden / plan.tp / (machine.flops * machine.efficiency)
    slowest = {kind: layers * t for kind, t in layer.items()}
    slowest["products"] += head  # the last stage has the output layer besides
    if x.experts and plan.ep > 1:
        moved = 2 * n * x.top_k * x.hidden / (plan.tp if plan.sequence else 1)
        span = plan.tp * plan.cp * plan.ep
        slowest["experts"] = (
            layers
            * 4
            * cost.seconds(
                "all_to_all", plan.ep, moved, machine.wire(span, plan.devices)
            )
        )
    micro = sum(slowest.values())
    times = {kind: m * t for kind, t in slowest.items()}
    times["bubble"] = (p - 1) / plan.chunks * micro
    if p > 1:
        edge = machine.wire(plan.devices)
        times["pipeline"] = (
            2
            * m
            * plan.chunks
            * (edge.latency + 2 * n * x.hidden / plan.tp / edge.bandwidth)
        )
    return times | _update_seconds(job, plan, layers * layer["products"])


def _update_seconds(
    job: Job, plan: Plan, forward_and_backward: float
) -> dict[str, float]:
    """The gradients' way, as far as no backward pass hides it, and Adam."""
    shared, experts = stage_parameters(job.shape, plan, 0)
    replicas, m = plan.dp * plan.cp, microbatches(job, plan)
    wire = job.machine.wire(plan.tp * replicas, plan.devices)
    owners = replicas // plan.ep  # ranks with the same experts
    if plan.zero == 3:  # each microbatch gathers weights twice and scatters gradients
        rounds = 2 * [("all_gather", 2)] + [("reduce_scatter", plan.grad_bytes)]
        moved, hiding = (
            m * _moved(rounds, shared, experts, replicas, owners, wire),
            m * forward_and_backward,
        )
    else:
        moved = _moved(
            [("all_reduce", plan.grad_bytes)], shared, experts, replicas, owners, wire
        )
        hiding = forward_and_backward * 2 / 3  # the last microbatch's backward pass
    state = (
        (shared + experts)
        / (replicas if plan.zero >= 1 else 1)
        * (2 * 12 + plan.grad_bytes + 2)
    )
    return {"data": max(0.0, moved - hiding), "adam": state / job.machine.bandwidth}


def _moved(
    rounds: list,
    shared: float,
    experts: float,
    replicas: int,
    owners: int,
    wire: cost.Link,
) -> float:
    """Seconds of collectives (op, bytes a parameter) over the ranks that hold the same
    parameters.
    """
    groups = [(replicas, shared)] + [(owners, experts)] * (experts > 0)
    return sum(
        cost.seconds(op, p, each * n, wire) for op, each in rounds for p, n in groups
    )
