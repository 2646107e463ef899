"""The loop: draft, one pass of the target, accept, forget what was not kept.

    tokens  the text so far. Its last token is in no cache: it is read in the next pass,
            in front of the drafted ones.
    cache   after a round it holds the text without its last token, in both models

Simplified: a batch of one, and γ is the same in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from llmlab.inference.sampling_and_speculation.accept import accept, acceptance_rate
from llmlab.inference.sampling_and_speculation.drafts import Draft
from llmlab.inference.sampling_and_speculation.samplers import SamplerConfig
from llmlab.inference.sampling_and_speculation.tree import (
    TreeDraft,
    follow,
    keep_path,
    read_tree,
)
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama

# What scripts/speculation_sweep.py measured on the real model, a run a line.
FILE = Path(__file__).parents[1] / "data" / "speculation.csv"


@dataclass(frozen=True)
class Round:
    """One pass of the target.

    Attributes:
        drafted: what was proposed.
        kept: what came of it; the last token is the correction, or the bonus.
        alphas: Σ min(p, q) at each place that was tried.
    """

    drafted: tuple[int, ...]
    kept: tuple[int, ...]
    alphas: tuple[float, ...] = ()

    @property
    def accepted(self) -> int:
        """How many of the drafted tokens stayed."""
        return len(self.kept) - 1


@dataclass
class Run:
    """What `speculate` did."""

    tokens: list[int]  # the new ones
    rounds: list[Round] = field(default_factory=list)
    draft_passes: int = 0

    @property
    def passes(self) -> int:
        """Passes of the target, the one over the prompt included."""
        return len(self.rounds)

    @property
    def alpha(self) -> float:
        """The mean of Σ min(p, q) over all places that were tried; 0 if none was."""
        values = [a for each in self.rounds for a in each.alphas]
        return sum(values) / len(values) if values else 0.0


@torch.inference_mode()
def speculate(
    model: Llama,
    draft: Draft,
    ids: Int[Tensor, "1 seq"],
    max_new_tokens: int,
    sampler: SamplerConfig,
    *,
    gamma: int = 4,
    seed: int | None = None,
    eos: Sequence[int] = (),
) -> Run:
    """Text of the target's own distribution, with fewer passes of the target.

    Args:
        draft: it is new, or was used for the beginning of this very text.
        gamma: tokens to draft per pass; 0 is plain decoding.
        eos: tokens that end the text.
    Raises:
        ValueError: more than one prompt, no token asked for, or a negative γ.
    """
    _check(ids, max_new_tokens, gamma)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tokens = ids[0].tolist()
    prompt = len(tokens)
    cache = KVCache(len(model.model.layers), capacity=prompt + max_new_tokens)
    run = Run([])
    before = draft.passes
    while len(run.tokens) < max_new_tokens:
        left = max_new_tokens - len(run.tokens)
        # the pass gives one token more than stay, so one fewer is worth drafting
        count = min(gamma, left - 1)
        drafted, q = draft.propose(tokens, count, sampler, prompt, generator)
        fed = [*tokens[cache.length :], *drafted]
        logits = model(
            torch.tensor([fed]), cache=cache, logits_to_keep=len(drafted) + 1
        )[0]
        p = sampler.probabilities(logits, tokens, drafted, prompt)
        u = torch.rand(len(drafted) + 1, generator=generator, dtype=p.dtype)
        kept = _until(accept(p, q, drafted, u), eos)
        run.rounds.append(_round(p, q, drafted, kept))
        run.tokens += kept
        tokens += kept
        # What was drafted and not kept is forgotten by both.
        cache.truncate(len(tokens) - 1)
        draft.rewind(len(tokens) - 1)
        if kept[-1] in eos:
            break
    run.draft_passes = draft.passes - before
    return run


@torch.inference_mode()
def speculate_tree(
    model: Llama,
    draft: TreeDraft,
    ids: Int[Tensor, "1 seq"],
    max_new_tokens: int,
    *,
    eos: Sequence[int] = (),
) -> Run:
    """Greedy decoding with a tree of proposals: the same tokens, fewer passes.

    Raises:
        ValueError: more than one prompt, or no token asked for.
    """
    _check(ids, max_new_tokens, 0)
    tokens = ids[0].tolist()
    cache = KVCache(len(model.model.layers), capacity=len(tokens) + max_new_tokens)
    run = Run([])
    before = draft.passes
    while len(run.tokens) < max_new_tokens:
        left = max_new_tokens - len(run.tokens)
        nodes, parents = draft.grow(tokens, left - 1)
        # In the first round the prompt leads to the root, one token after the other.
        lead = tokens[cache.length : -1]
        past = cache.length + len(lead)
        chain = list(range(-1, len(lead) - 1))
        below = [parent + len(lead) for parent in parents]
        logits = read_tree(model, cache, [*lead, *nodes], [*chain, *below])
        best = logits[len(lead) :].argmax(-1).tolist()

        def choose(node: int, children: list[int], best=best, nodes=nodes):
            proposed = [nodes[child] for child in children]
            token = best[node]
            return (proposed.index(token) if token in proposed else None), token

        path, kept = follow(nodes, parents, choose)
        kept = _until(kept, eos)
        run.rounds.append(Round(tuple(nodes[1:]), tuple(kept)))
        run.tokens += kept
        tokens += kept
        keep_path(cache, past, path[: len(kept)])
        draft.cache.truncate(min(len(tokens) - 1, draft.cache.length))
        if kept[-1] in eos:
            break
    run.draft_passes = draft.passes - before
    return run


def _check(ids: Tensor, max_new_tokens: int, gamma: int) -> None:
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] < 1:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; it must be (1, seq): rows of a batch"
            " would keep different numbers of tokens"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must be 0 (no draft) or more")


def _until(kept: list[int], eos: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends the text."""
    for i, token in enumerate(kept):
        if token in eos:
            return kept[: i + 1]
    return kept


def _round(p: Tensor, q: Tensor, drafted: list[int], kept: list[int]) -> Round:
    """What happened, with α at the places that were tried."""
    tried = min(len(kept), len(drafted))  # the rejected one included
    alphas = acceptance_rate(p[:tried], q[:tried]).tolist()
    return Round(tuple(drafted), tuple(kept), tuple(alphas))
