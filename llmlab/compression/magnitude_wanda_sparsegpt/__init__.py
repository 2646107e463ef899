"""Magnitude, Wanda and SparseGPT: which weights of a trained model can go.

    config      what is pruned, how much, in which pattern
    masks       scores of weights, and masks with exact counts: magnitude, Wanda, N of M
    sparsegpt   the mask chosen block by block, and an update of what is left
    model       the walk over a model; zeros that stay zero in training
    packed      N of M weights and their places, for the disk

Start with `masks`.
"""

from llmlab.compression.magnitude_wanda_sparsegpt.config import PruneConfig
from llmlab.compression.magnitude_wanda_sparsegpt.masks import (
    from_each_row,
    from_matrix,
    keep_best,
    n_of_m,
    obs_scores,
    pruned_count,
    wanda_scores,
)
from llmlab.compression.magnitude_wanda_sparsegpt.model import (
    FILE,
    apply,
    hold_zeros,
    keep_mask,
    prune,
    pruned_weights,
    sparsity,
)
from llmlab.compression.magnitude_wanda_sparsegpt.packed import (
    SparseLinear,
    pack,
    with_places,
)
from llmlab.compression.magnitude_wanda_sparsegpt.sparsegpt import (
    best_update,
    sparsegpt,
)

__all__ = [
    "FILE",
    "PruneConfig",
    "SparseLinear",
    "apply",
    "best_update",
    "from_each_row",
    "from_matrix",
    "hold_zeros",
    "keep_best",
    "keep_mask",
    "n_of_m",
    "obs_scores",
    "pack",
    "prune",
    "pruned_count",
    "pruned_weights",
    "sparsegpt",
    "sparsity",
    "wanda_scores",
    "with_places",
]
