"""Continuous batching: what each step computes, decided anew before every step.

    schedule       which requests get how many tokens in the next step
    traces         who comes when, and with how much
    simulation     a trace in virtual time: static, dynamic, continuous, chunked
    serving        static and continuous on a real model
    disaggregated  prefill and decoding on two machines
    published      what vLLM and OpenVINO plan on the same cases
    challenge      a trace to win

Start with `schedule`.
"""

from pathlib import Path

from llmlab.inference.continuous_batching import challenge, published
from llmlab.inference.continuous_batching.disaggregated import (
    Link,
    decode_rank,
    moved_bytes,
    prefill_rank,
    read_out,
    simulate_apart,
    simulate_together,
    write_in,
)
from llmlab.inference.continuous_batching.schedule import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    check_plan,
    give_running,
    schedule,
)
from llmlab.inference.continuous_batching.serving import Run, serve_trace
from llmlab.inference.continuous_batching.simulation import (
    Cost,
    Served,
    Step,
    in_batches,
    latencies,
    percentile,
    simulate,
)
from llmlab.inference.continuous_batching.traces import (
    Request,
    bursts,
    lognormal,
    poisson,
    trace,
)

# What scripts/continuous_batching_sweep.py measured, a run a line.
FILE = Path(__file__).parent.parent / "data" / "continuous_batching.csv"

__all__ = [
    "FILE",
    "Cost",
    "Job",
    "Limits",
    "Link",
    "Plan",
    "Request",
    "Run",
    "Served",
    "Step",
    "blocks_needed",
    "bursts",
    "challenge",
    "check_plan",
    "decode_rank",
    "give_running",
    "in_batches",
    "latencies",
    "lognormal",
    "moved_bytes",
    "percentile",
    "poisson",
    "prefill_rank",
    "published",
    "read_out",
    "schedule",
    "serve_trace",
    "simulate",
    "simulate_apart",
    "simulate_together",
    "trace",
    "write_in",
]
