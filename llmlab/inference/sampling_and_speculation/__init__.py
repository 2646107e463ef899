"""Sampling and speculation: how a token is drawn, and how several are drawn per pass.

    samplers   from logits to probabilities: processors as a list, and their order
    accept     which drafted tokens stay; the same distribution, by enumeration
    drafts     who proposes: a small model, the first layers, the text so far
    tree       several proposals at once: the mask, and what is kept
    generate   the loop over a model and its draft, both with a cache
    cost       tokens per pass, speed, the best number of drafted tokens

Begin with `accept`, which is the idea; the rest feeds it.
"""

from llmlab.inference.sampling_and_speculation.accept import (
    accept,
    accept_children,
    acceptance_rate,
    draw,
    emitted,
    outcomes,
    residual,
    target_distribution,
)
from llmlab.inference.sampling_and_speculation.cost import (
    best_gamma,
    expected_tokens,
    speedup,
)
from llmlab.inference.sampling_and_speculation.drafts import (
    Draft,
    DraftModel,
    Lookup,
    first_layers,
    lookup,
)
from llmlab.inference.sampling_and_speculation.generate import (
    FILE,
    Round,
    Run,
    speculate,
    speculate_tree,
)
from llmlab.inference.sampling_and_speculation.samplers import (
    ORDERS,
    PROCESSORS,
    SamplerConfig,
    process,
)
from llmlab.inference.sampling_and_speculation.tree import (
    TreeDraft,
    depths,
    follow,
    keep_path,
    tree_mask,
)

__all__ = [
    "FILE",
    "ORDERS",
    "PROCESSORS",
    "Draft",
    "DraftModel",
    "Lookup",
    "Round",
    "Run",
    "SamplerConfig",
    "TreeDraft",
    "accept",
    "accept_children",
    "acceptance_rate",
    "best_gamma",
    "depths",
    "draw",
    "emitted",
    "expected_tokens",
    "first_layers",
    "follow",
    "keep_path",
    "lookup",
    "outcomes",
    "process",
    "residual",
    "speculate",
    "speculate_tree",
    "speedup",
    "target_distribution",
    "tree_mask",
]
