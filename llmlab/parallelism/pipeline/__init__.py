"""The room `pipeline`."""

from llmlab.parallelism.pipeline.memory import ActivationMeter
from llmlab.parallelism.pipeline.pipeline import (
    IGNORED,
    Microbatch,
    Pipeline,
    clip_grad_norm,
)
from llmlab.parallelism.pipeline.schedules import (
    Schedule,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    stage_of,
    zb_h1,
    zb_h2,
    zb_v,
)
from llmlab.parallelism.pipeline.stages import split
from llmlab.parallelism.pipeline.timeline import Costs, Timeline, simulate

__all__ = [
    "IGNORED",
    "ActivationMeter",
    "Costs",
    "Microbatch",
    "Pipeline",
    "Schedule",
    "Timeline",
    "clip_grad_norm",
    "gpipe",
    "interleaved",
    "naive",
    "one_f_one_b",
    "simulate",
    "split",
    "stage_of",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
