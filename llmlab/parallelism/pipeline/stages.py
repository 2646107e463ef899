"""A Llama cut into the stages of a pipeline.

    whole model            embed_tokens   layers 0 … n − 1   norm   lm_head
    stage 0                embed_tokens   layers 0 … a − 1
    stage s                               layers a … b − 1
    stage S − 1                           layers c … n − 1   norm   lm_head

    n   layers             p   ranks                h   hidden states (B, T, d)
    s   a stage            v   chunks per rank      S   stages, p·v

Parameter names stay those of the whole model: the states of all ranks' stages, merged,
are the state of the whole model.

With tied embeddings stage 0 and stage S − 1 both have the one matrix. On two ranks
these are two copies; `pipeline` adds up their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama, rope_tables
from llmlab.parallelism.pipeline.schedules import stage_count, stage_of


class Stage(nn.Module):
    """Some layers of a Llama. The first stage has the embedding, the last the head.

    Takes modules out of `model`; nothing is copied.

    Args:
        layers: which layers of `model`.
        is_first: tokens go in, not hidden states.
        is_last: logits come out, not hidden states.
    """

    def __init__(
        self, model: Llama, layers: range, is_first: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.config = model.config
        self.is_first = is_first
        self.is_last = is_last
        # The same nesting as in the whole model, so that the names are the same.
        self.model = nn.Module()
        if is_first:
            self.model.embed_tokens = model.model.embed_tokens
        # A dictionary, not a list: a layer keeps its number in the whole model.
        own_layers = {str(i): model.model.layers[i] for i in layers}
        self.model.layers = nn.ModuleDict(own_layers)
        if is_last:
            self.model.norm = model.model.norm
            self.lm_head = model.lm_head
        self.register_buffer("theta", model.model.theta.clone(), persistent=False)

    def forward(
        self, x: Int[Tensor, "B T"] | Float[Tensor, "B T d"]
    ) -> Float[Tensor, "B T d_or_V"]:
        """From tokens or hidden states to hidden states or logits."""
        h = self.model.embed_tokens(x) if self.is_first else x  # (B, T, d)
        positions = torch.arange(h.shape[1], device=h.device)[None]  # (1, T)
        cos, sin = rope_tables(positions, self.theta.float())
        rope = (cos.to(h.dtype), sin.to(h.dtype))
        for block in self.model.layers.values():
            h = block(h, rope, None, None, sdpa)
        if not self.is_last:
            return h
        return self.lm_head(self.model.norm(h))  # (B, T, d) → (B, T, V)


def layer_ranges(
    n: int, stages: int, layers: Sequence[int] | None = None
) -> list[range]:
    """Which of n layers each stage has.

    Args:
        layers: how many layers each stage gets, 0 allowed. None: the same number each;
            where S does not divide n, the first n mod S stages get one more.
    Raises:
        ValueError: `layers` does not have one number per stage, or they do not add up
            to n; fewer layers than stages without `layers`.
    """
    if layers is None:
        if n < stages:
            raise ValueError(
                f"{n} layers cannot be dealt to {stages} stages: use fewer, or say"
                " layers=… with zeros"
            )
        each, left_over = divmod(n, stages)
        layers = [each + 1 if s < left_over else each for s in range(stages)]
    if len(layers) != stages or sum(layers) != n or min(layers) < 0:
        raise ValueError(
            f"layers={list(layers)} must be {stages} numbers, 0 or more, that add up"
            f" to {n}"
        )
    ranges = []
    start = 0
    for count in layers:
        ranges.append(range(start, start + count))
        start += count
    return ranges


def split(
    model: Llama,
    rank: int,
    p: int,
    v: int = 1,
    *,
    layers: Sequence[int] | None = None,
    layout: str = "loop",
) -> list[Stage]:
    """This rank's chunks, in order.

    Each rank calls it on the same model, and drops the model afterwards.

    Args:
        v: chunks per rank; there are p·v stages, or p in the "bidirectional" layout.
        layers: how many layers each stage gets (see `layer_ranges`).
        layout: "loop", "v" or "bidirectional" (see `schedules`).
    """
    S = stage_count(p, v, layout)
    ranges = layer_ranges(len(model.model.layers), S, layers)
    stages = []
    for chunk in range(v):
        s = stage_of(rank, chunk, p, layout)
        is_first = s == 0
        is_last = s == S - 1
        stages.append(Stage(model, ranges[s], is_first, is_last))
    return stages
