"""Low-rank factors, and the floats of 4 and 8 bits that they repair.

    svd            the best product of two thin matrices, for W and for its outputs
    float_formats  FP8 and FP4 from their numbers of exponent and mantissa bits
    block_formats  MXFP8, MXFP4, NVFP4: a block of floats and the scale it shares
    lorc           a weight in few bits plus a product of rank r; models, files

Start with `svd`.
"""

from llmlab.compression.low_rank.block_formats import (
    FP4,
    MXFP4,
    MXFP8,
    NVFP4,
    BlockFormat,
)
from llmlab.compression.low_rank.float_formats import E2M1, E4M3, E5M2, FloatFormat
from llmlab.compression.low_rank.lorc import (
    FILE,
    LowRankConfig,
    LowRankLinear,
    apply,
    bits_per_weight,
    load,
    save,
)

__all__ = [
    "E2M1",
    "E4M3",
    "E5M2",
    "FILE",
    "FP4",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "BlockFormat",
    "FloatFormat",
    "LowRankConfig",
    "LowRankLinear",
    "apply",
    "bits_per_weight",
    "load",
    "save",
]
