"""A compiler's back end: from loops to machine code, and schedules as data.

    ir          loops, statements and arrays
    programs    naive ones: a product, 4-bit weights, what the front end captured
    dependence  which statements must stay in their order
    schedule    tile, reorder, vectorise, pack …: how a program runs
    interpret   what a program means, with every index checked
    lower       what both code generators share: tails, lanes, loops written out
    to_c        C
    to_llvm     LLVM, for this processor or as assembly for a GPU
    run         compiled programs, called with tensors
    machine     registers, and the best schedules
    cost        traffic through a cache, and cycles, counted
    tuner       a search for schedules, with its log

Start with `ir`.
"""

from llmlab.compilers.back_end.machine import Machine, best_schedule, this
from llmlab.compilers.back_end.schedule import NotLegal, apply
from llmlab.compilers.back_end.tuner import Choice

__all__ = ["Choice", "Machine", "NotLegal", "apply", "best_schedule", "this"]
