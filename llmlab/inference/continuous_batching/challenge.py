"""The challenge: a scheduler that wins a trace.

It is judged in virtual time, over several traces: tokens per second, under a bound for
the 99th percentile of the times between tokens, with a cache of so many blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llmlab.inference.continuous_batching.schedule import Limits, schedule
from llmlab.inference.continuous_batching.simulation import (
    Cost,
    Scheduler,
    percentile,
    simulate,
)
from llmlab.inference.continuous_batching.traces import (
    Request,
    lognormal,
    poisson,
    trace,
)
