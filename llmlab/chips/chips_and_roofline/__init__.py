"""Chips and roofline.

roofline.py   what a chip needs at least for a piece of work; chips ranked by it
cpu.py        the same two numbers of the machine that runs this

The figures of the chips are a file that other parts read, too: `llmlab/models/chips.py`
and `llmlab/models/data/chips.csv`. Start with `seconds` in roofline.py.
"""

from llmlab.chips.chips_and_roofline.cpu import FORMATS, measure
from llmlab.chips.chips_and_roofline.roofline import (
    Place,
    Work,
    attainable,
    chips_needed,
    implied_clock,
    layer_products,
    product,
    rank,
    ridge,
    seconds,
    smallest_batch,
    step,
)

__all__ = [
    "FORMATS",
    "Place",
    "Work",
    "attainable",
    "chips_needed",
    "implied_clock",
    "layer_products",
    "measure",
    "product",
    "rank",
    "ridge",
    "seconds",
    "smallest_batch",
    "step",
]
