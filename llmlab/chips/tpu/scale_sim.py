"""A run as SCALE-Sim 3.0.0 reports it, without running it.

Samajdar et al. 2020, "A Systematic Methodology for Characterizing Scalability of DNN
Accelerators using SCALE-Sim", and https://arxiv.org/abs/2504.15377 for version 3. Its
arrays are ours, and four of its figures are counted otherwise:

    cycles       the number of the last cycle, so one less than there are
    cycles, os   a fold is R cycles shorter: its results leave in no time
    writes, os   R + C more for each fold than there are results
    compute      "Compute Util": with weights or inputs that stay, a fold's cycles are
                 taken C − 1 too long
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.chips.tpu.array import Run

FLOWS = {"ws": "weight", "os": "output", "is": "input"}


@dataclass(frozen=True)
class Report:
    """The columns of its reports that depend on the array alone; shares in percent."""

    cycles: int
    utilisation: float
    mapping: float
    compute: float
    reads_x: int
    reads_w: int
    writes_y: int


def report(run: Run) -> Report:
    """What SCALE-Sim 3.0.0 says of it.

    Raises:
        ValueError: a double-buffered array: it has none.
    """
    array = run.array
    if array.double:
        raise ValueError("double=True: SCALE-Sim 3.0.0 has no second register")
    stays = array.dataflow == "output"
    cycles = run.cycles - 1
    fold = run.period + array.columns - 1  # what "Compute Util" divides by
    writes = run.writes_y
    if stays:
        cycles -= run.folds * array.rows
        fold = run.period - array.rows
        writes += run.folds * (array.rows + array.columns)
    return Report(
        cycles=cycles,
        utilisation=100 * run.macs / (array.cells * cycles),
        mapping=100 * run.mapping,
        compute=100 * run.mapping * run.sizes[2] / fold,
        reads_x=run.reads_x,
        reads_w=run.reads_w,
        writes_y=writes,
    )
