"""Products with packed codes, in C, and linears that use them.

products.c   the three loops; start here
compiling    the C file as a library, made once on each machine
linears      `Int4Linear`, an 8-bit embedding, and a whole model of them: `fast`
plugins      the same products for engines (part 07)
"""

from llmlab.compression.kernels.compiling import NoCompiler, available, library
from llmlab.compression.kernels.linears import Int4Linear, Int8Table, fast
from llmlab.compression.kernels.plugins import PLUGINS

__all__ = [
    "PLUGINS",
    "Int4Linear",
    "Int8Table",
    "NoCompiler",
    "available",
    "fast",
    "library",
]
