"""Seconds of a training step under a plan, by kind.

    step = (m + (p − 1)/v) · t  +  pipeline  +  data  +  adam
    t    = products + elementwise + tensor + context (+ experts)

    t             forward and backward of one microbatch in one stage
    m, p, v       microbatches, pipeline ranks, chunks per pipeline rank
    n             tokens of a microbatch on one device
    products      FLOPs / (peak · efficiency); the one number that is calibrated is
                  `efficiency` of the machine
    elementwise   `TRAFFIC` bytes of memory traffic per byte of saved activations, at
                  the bandwidth of the memory
    tensor        4 all-reduces per layer (or pairs of all-gather and reduce-scatter:
                  the same bytes), 6 with full recomputation
    context       K and V of ring attention, unless they hide behind attention
    experts       all-to-alls to the experts and back
    bubble        (p − 1)/v · t, while the pipeline waits
    pipeline      sends from stage to stage
    data          one all-reduce of the gradients, unless it hides behind the last
                  backward pass; ZeRO-3: all its gathers and scatters, unless they hide
                  behind all products
    adam          memory traffic of the update

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
    x = job.shape
    machine = job.machine
    n = job.seq * microbatch / cp
    products, scores = layer_flops(x, job.seq)
    again = {
        "none": 0.0,
        "selective": scores if x.family == "gpt" else 0.0,
        "full": products + scores,
    }[recompute]
    flops = n / tp * (3 * (products + scores) + again)
    touched = layer_activations(x, job.seq, microbatch, tp, sequence) / cp
    passes = 4 / 3 if recompute == "full" else 1
    times = {
        "products": flops / (machine.flops * machine.efficiency),
        "elementwise": TRAFFIC * touched * passes / machine.bandwidth,
    }

    # All-reduces, or pairs of all-gather and reduce-scatter.
    rounds = 6 if recompute == "full" else 4
    link = machine.wire(tp, devices)
    times["tensor"] = rounds * cost.seconds("all_reduce", tp, 2 * n * x.hidden, link)

    # K and V forward; K and V and their gradients backward.
    hops = (cp - 1) * (4 if recompute == "full" else 3)
    link = machine.wire(tp * cp, devices)
    ring = hops * cost.seconds("all_gather", 2, 2 * 2 * n * 2 * x.kv / tp, link)
    attention = times["products"] * scores / (products + scores)
    times["context"] = max(0.0, ring - attention)
    return times


def seconds(job: Job, plan: Plan) -> dict[str, float]:
    """Seconds of a step by kind. "bubble" is the pipeline's waiting."""
    x = job.shape
    machine = job.machine
    p = plan.pp
    m = microbatches(job, plan)
    layers = x.layers / p
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
    slowest["products"] += head  # the last stage has the output layer too
    if x.experts and plan.ep > 1:
        moved = 2 * n * x.top_k * x.hidden / (plan.tp if plan.sequence else 1)
        link = machine.wire(plan.tp * plan.cp * plan.ep, plan.devices)
        all_to_all = cost.seconds("all_to_all", plan.ep, moved, link)
        # Dispatch and combine, forward and backward.
        slowest["experts"] = layers * 4 * all_to_all
    micro = sum(slowest.values())
    times = {kind: m * t for kind, t in slowest.items()}
    times["bubble"] = (p - 1) / plan.chunks * micro
    if p > 1:
        link = machine.wire(plan.devices)
        send = link.latency + 2 * n * x.hidden / plan.tp / link.bandwidth
        times["pipeline"] = 2 * m * plan.chunks * send  # forward and backward
    return times | _update_seconds(job, plan, layers * layer["products"])


def _update_seconds(
    job: Job, plan: Plan, forward_and_backward: float
) -> dict[str, float]:
    """Moving the gradients, as far as no backward pass hides it, and Adam."""
    shared, experts = stage_parameters(job.shape, plan, 0)
    replicas = plan.dp * plan.cp
    m = microbatches(job, plan)
    wire = job.machine.wire(plan.tp * replicas, plan.devices)
    owners = replicas // plan.ep  # ranks with the same experts
    if plan.zero == 3:
        # Each microbatch gathers weights twice and scatters gradients once.
        rounds = [("all_gather", 2), ("all_gather", 2)]
        rounds.append(("reduce_scatter", plan.grad_bytes))
        moved = m * _moved(rounds, shared, experts, replicas, owners, wire)
        hiding = m * forward_and_backward
    else:
        rounds = [("all_reduce", plan.grad_bytes)]
        moved = _moved(rounds, shared, experts, replicas, owners, wire)
        hiding = forward_and_backward * 2 / 3  # the backward pass of one microbatch
    updated = (shared + experts) / (replicas if plan.zero >= 1 else 1)
    # Adam reads and writes its 12 bytes, reads the gradient and writes the weight.
    state = updated * (2 * 12 + plan.grad_bytes + 2)
    return {"data": max(0.0, moved - hiding), "adam": state / job.machine.bandwidth}


def _moved(
    rounds: list[tuple[str, int]],
    shared: float,
    experts: float,
    replicas: int,
    owners: int,
    wire: cost.Link,
) -> float:
    """Seconds of collectives over the ranks that hold the same parameters.

    Args:
        rounds: (collective, bytes per parameter)
        shared: parameters that all `replicas` hold.
        experts: parameters that `owners` hold.
    """
    groups = [(replicas, shared)]
    if experts > 0:
        groups.append((owners, experts))
    times = []
    for op, each in rounds:
        for ranks, count in groups:
            times.append(cost.seconds(op, ranks, each * count, wire))
    return sum(times)
