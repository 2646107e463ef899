"""Pipeline parallelism: layers on several ranks, microbatches in turn.

    schedules   who computes what, in which order: lists of ops, as data
    dualpipe    the same for DeepSeek-V3's: microbatches from both ends
    timeline    when each op runs: a simulator, and the Gantt chart
    stages      a Llama cut into stages
    pipeline    the executor: runs any schedule on the stages
    backward    a linear's backward pass in two halves, for the zero-bubble schedules
    memory      counts the activations that a rank keeps

Start with `schedules`, then `pipeline.PipelineStep`.
"""

from llmlab.parallelism.pipeline.dualpipe import (
    dualpipe,
    dualpipe_pairs,
    dualpipe_v,
)
from llmlab.parallelism.pipeline.memory import ActivationMeter
from llmlab.parallelism.pipeline.pipeline import (
    IGNORED,
    Microbatch,
    Pipeline,
    PipelineStep,
    clip_grad_norm,
)
from llmlab.parallelism.pipeline.schedules import (
    Kind,
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
from llmlab.parallelism.pipeline.timeline import (
    Costs,
    Timeline,
    simulate,
    until_stuck,
)

__all__ = [
    "IGNORED",
    "ActivationMeter",
    "Costs",
    "Kind",
    "Microbatch",
    "Pipeline",
    "PipelineStep",
    "Schedule",
    "Timeline",
    "clip_grad_norm",
    "dualpipe",
    "dualpipe_pairs",
    "dualpipe_v",
    "gpipe",
    "interleaved",
    "naive",
    "one_f_one_b",
    "simulate",
    "split",
    "stage_of",
    "until_stuck",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
