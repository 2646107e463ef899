"""NVIDIA's GPUs: what a kernel costs there, counted without one.

transactions.py   sectors and bank cycles of a warp's 32 addresses: start here
occupancy.py      blocks that an SM holds; its limits by compute capability
simulator.py      numba's CUDA simulator, with every address written down
kernels.py        kernels to run in it, or on a GPU
tensor_cores.py   fragments in registers, peaks, and what feeds them
tma.py            boxes that hardware copies, and clusters that share them

`kernels` is imported by its name, after `cuda_simulator()`: it imports numba, and that
settles whether kernels are simulated.
"""

from llmlab.chips.nvidia_gpu.occupancy import (
    Limits,
    Occupancy,
    capabilities,
    limits,
    occupancy,
)
from llmlab.chips.nvidia_gpu.simulator import Race, Traffic, cuda_simulator, record
from llmlab.chips.nvidia_gpu.tensor_cores import (
    SHARED_PER_CLOCK,
    Generation,
    element,
    fed,
    fragments,
    gathered,
    generations,
    in_flight,
    mma,
    owner,
    wgmma_element,
)
from llmlab.chips.nvidia_gpu.tma import TensorMap, multicast
from llmlab.chips.nvidia_gpu.transactions import (
    BankCycles,
    Transactions,
    global_memory,
    shared_memory,
    swizzle,
)

__all__ = [
    "SHARED_PER_CLOCK",
    "BankCycles",
    "Generation",
    "Limits",
    "Occupancy",
    "Race",
    "TensorMap",
    "Traffic",
    "Transactions",
    "capabilities",
    "cuda_simulator",
    "element",
    "fed",
    "fragments",
    "gathered",
    "generations",
    "global_memory",
    "in_flight",
    "limits",
    "mma",
    "multicast",
    "occupancy",
    "owner",
    "record",
    "shared_memory",
    "swizzle",
    "wgmma_element",
]
