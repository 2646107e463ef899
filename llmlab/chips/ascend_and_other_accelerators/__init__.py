"""Ascend and other accelerators.

core.py        what the units of an Ascend core do in a cycle; tiles and their traffic
balance.py     which unit a layer of a Llama waits for
layout.py      fractals: how a matrix lies in memory, NZ and its kin
queues.py      units side by side, and the flags that make them wait
rank_table.py  who is who in a job over several servers, for HCCL
glm.py         a block of ChatGLM-6B
porting.py     a Llama's parameters for Paddle and MindSpore; defaults that differ

Start with core.py.
"""

from llmlab.chips.ascend_and_other_accelerators import (
    balance,
    core,
    glm,
    layout,
    porting,
    queues,
    rank_table,
)

__all__ = [
    "balance",
    "core",
    "glm",
    "layout",
    "porting",
    "queues",
    "rank_table",
]
