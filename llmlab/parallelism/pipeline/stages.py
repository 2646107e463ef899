"""A Llama cut into the stages of a pipeline. Parameter names stay those of the whole
model.

    whole model            embed_tokens   layers 0 … n − 1   norm   lm_head
    stage 0                embed_tokens   layers 0 … a − 1
    stage s                               layers a … b − 1
    stage S − 1                           layers c … n − 1   norm   lm_head

The states of all ranks' stages, merged, are the state of the whole model. With tied
embeddings stage 0 and stage S − 1 both have the one matrix; on two ranks these are two
copies, whose gradients `pipeline` adds up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models.attention import sdpa
from llmlab.models.llama import Llama, rope_tables
from llmlab.parallelism.pipeline.schedules import stage_of


class Stage(nn.Module):
    """Some layers of a Llama, with the embedding before the first and the norm and the
    head after the last.

    Takes modules out of `model`; nothing is copied. `is_first`: tokens go in;
    `is_last`: logits come out.
    """

    def __init__(
        self, model: Llama, layers: range, is_first: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.config, self.is_first, self.is_last = model.config, is_first, is_last
        self.model = nn.Module()
        if is_first:
            self.model.embed_tokens = model.model.embed_tokens
        self.model.layers = nn.ModuleDict(
            {str(i): model.model.layers[i] for i in layers}
        )
        if is_last:
            self.model.norm, self.lm_head = model.model.norm, model.lm_head
        self.register_buffer("theta", model.model.theta.clone(), persistent=False)

    def forward(
        self, x: Int[Tensor, "B T"] | Float[Tensor, "B T d"]
    ) -> Float[Tensor, "B T d_or_V"]:
        """Tokens (first stage) or hidden states in, hidden states or logits (last
        stage) out.
        """
        h = self.model.embed_tokens(x) if self.is_first else x
        positions = torch.arange(h.shape[1], device=h.device)[None]
        rope = tuple(t.to(h.dtype) for t in rope_tables(positions, self.theta.float()))
        for block in self.model.layers.values():
            h = block(h, rope, None, None, sdpa)
        return self.lm_head(self.model.norm(h)) if self.is_last else h


def layer_ranges(
    n: int, stages: int, layers: Sequence[int] | None = None
) -> list[range]:
    """Which of n layers each stage has.

    Args:
        layers: how many each stage gets, 0 allowed; None: as even as can be, the first
            n mod S stages one more.
    Raises:
        ValueError: `layers` has not one number a stage, or they do not add up to n;
            fewer layers than stages without `layers`.
    """
    if layers is None:
        if n < stages:
            raise ValueError(
                f"{n} layers cannot be dealt to {stages} stages: use fewer, or say"
                " layers=… with zeros"
            )
        layers = [n // stages + (s < n % stages) for s in range(stages)]
    if len(layers) != stages or sum(layers) != n or min(layers) < 0:
        raise ValueError(
            f"layers={list(layers)} must be {stages} numbers, 0 or more, that add up"
            f" to {n}"
        )
    starts = [sum(layers[:s]) for s in range(stages)]
    return [
        range(start, start + count) for start, count in zip(starts, layers, strict=True)
    ]


def split(
    model: Llama,
    rank: int,
    p: int,
    v: int = 1,
    *,
    layers: Sequence[int] | None = None,
    layout: str = "loop",
) -> list[Stage]:
    """This rank's chunks, in order. Each rank must call it on the same model, and drop
    the model after it.

    Args:
        v: chunks a rank; there are p·v stages.
        layers: how many layers each stage gets (see `layer_ranges`).
        layout: "loop" or "v" (see `schedules`).
    """
    ranges = layer_ranges(len(model.model.layers), p * v, layers)
    mine = [stage_of(rank, chunk, p, layout) for chunk in range(v)]
    return [Stage(model, ranges[s], s == 0, s == p * v - 1) for s in mine]
