"""Who drafts tokens inside the engine: the text itself, or a small model.

A decoding request asks for 1 + γ tokens to be computed instead of 1: its last token,
and γ drafted ones behind it. The scheduler counts them as any others and may grant
fewer. One pass of the target then gives γ + 1 rows of logits, `accept` says what stays,
and the tables forget the rest.

    want     how many tokens a request would like to have drafted
    propose  the drafts of all requests of a step, and what each was drawn from

The draft model keeps its keys and values in the blocks of the same tables, in a memory
of its own: one block number means two blocks. So what is found, shared, truncated or
freed for the target is so for the draft, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.engine.pieces import Guarded
from llmlab.inference.engine.request import Request
from llmlab.inference.paged_attention import BlockManager, PagedCache
from llmlab.inference.sampling_and_speculation import draw
from llmlab.models.llama import Llama

# tokens, and the distribution that each was drawn from
Proposal = tuple[list[int], Float[Tensor, "gamma vocab"]]


class Nobody:
    """No speculation."""

    def want(self, request: Request) -> int:
        return 0

    def propose(
        self, asked: Sequence[tuple[Request, int]], manager: BlockManager
    ) -> list[Proposal]:
        return [([], torch.zeros(0, 1)) for _ in asked]

    def follow(self, chunks: Sequence[tuple[Request, Chunk]]) -> None:
        """The target has computed these."""


class FromText(Nobody):
    """Prompt lookup: what followed the last tokens where they stood before."""

    def __init__(self, gamma: int, longest: int, vocab: int, pieces: Guarded) -> None:
        self.gamma = gamma
        self.longest = longest
        self.vocab = vocab
        self.pieces = pieces

    def want(self, request: Request) -> int:
        return len(self._found(request, self.gamma))

    def propose(
        self, asked: Sequence[tuple[Request, int]], manager: BlockManager
    ) -> list[Proposal]:
        proposals = []
        for request, count in asked:
            drafted = self._found(request, count)
            one_hot = F.one_hot(torch.tensor(drafted).long(), self.vocab)
            proposals.append((drafted, one_hot.double()))
        return proposals

    def _found(self, request: Request, count: int) -> list[int]:
        # the pass gives one token more than stay, so one fewer is worth drafting
        count = min(count, request.to_write - 1)
        if count < 1:
            return []
        length, found = request.looked_up
        if length != len(request.tokens):
            found = self.pieces.lookup(request.tokens, self.gamma, self.longest)
            request.looked_up = (len(request.tokens), found)
        return found[:count]


class FromModel(Nobody):
    """A small model drafts for all requests together, a token of each in a pass."""

    def __init__(
        self, model: Llama, gamma: int, cache: PagedCache, pieces: Guarded
    ) -> None:
        self.model = model
        self.gamma = gamma
        self.cache = cache
        self.pieces = pieces
        self.processors = pieces.processors

    def want(self, request: Request) -> int:
        return min(self.gamma, request.to_write - 1)

    def propose(
        self, asked: Sequence[tuple[Request, int]], manager: BlockManager
    ) -> list[Proposal]:
        drafted: list[list[int]] = [[] for _ in asked]
        q: list[list[Tensor]] = [[] for _ in asked]
        for turn in range(max((count for _, count in asked), default=0)):
            on = [i for i, (_, count) in enumerate(asked) if turn < count]
            chunks = []
            for i in on:
                request = asked[i][0]
                text = [*request.tokens, *drafted[i]]
                # what the draft lacks: two tokens when all were accepted last time
                start = request.draft_computed
                table = manager.tables[request.sequence]
                chunks.append(Chunk(text[start:], start, table))
                request.draft_computed = len(text)
            logits = compute(self.model, self.cache, chunks, self.pieces.attention)
            for i, row in zip(on, logits, strict=True):
                request = asked[i][0]
                token, distribution = self._draw(request, drafted[i], row)
                drafted[i].append(token)
                q[i].append(distribution)
        vocab = self.model.config.vocab_size
        empty = torch.zeros(0, vocab).double()
        rows = [torch.stack(each) if each else empty for each in q]
        return list(zip(drafted, rows, strict=True))

    def _draw(
        self, request: Request, drafted: Sequence[int], logits: Tensor
    ) -> tuple[int, Tensor]:
        """One token, with the sampler of the request."""
        text = [*request.tokens, *drafted]
        p = request.sampler.probabilities(
            logits[None], text, (), request.prompt, self.processors
        )[0]
        u = torch.rand((), generator=request.generator, dtype=p.dtype)
        return draw(p, u), p

    def follow(self, chunks: Sequence[tuple[Request, Chunk]]) -> None:
        """The draft reads the prompts, too."""
        reading = []
        for request, chunk in chunks:
            if len(chunk.tokens) > chunk.wanted:  # a prompt, or a part of one
                start = request.draft_computed
                text = request.tokens[start : chunk.stop]
                reading.append(Chunk(text, start, chunk.table, 0))
                request.draft_computed = chunk.stop
        if reading:
            compute(self.model, self.cache, reading, self.pieces.attention)
