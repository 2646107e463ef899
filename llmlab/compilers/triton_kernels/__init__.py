"""Kernels in Triton, run without a GPU and read as far down as the machine's words.

kernels    softmax, the part's mlp, attention: imported by its name, it needs triton
programs   our own interpreter: it counts bytes, refuses stray addresses and races
"""

from llmlab.compilers.triton_kernels.programs import (
    OutOfRange,
    Race,
    Report,
    launch,
    tl,
)

__all__ = ["OutOfRange", "Race", "Report", "launch", "tl"]
