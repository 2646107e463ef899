"""Who proposes the next tokens.

    DraftModel   a smaller model with the same vocabulary, and a cache of its own
    first_layers the target's own first layers under its own head, as a model: early
                 exit, as in LayerSkip (https://arxiv.org/abs/2404.16710)
    Lookup       the text itself: what followed the last few tokens where they stood
                 before (Saxena 2023, prompt lookup decoding)

A draft has two duties besides proposing. It says the distribution q that each token was
really drawn from. And after each round it forgets what was not kept.

    γ  tokens asked for        V  vocabulary

Simplified: an early exit makes keys and values of its layers once more in the target's
pass; LayerSkip keeps them, and trains the model for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.sampling_and_speculation.accept import draw
from llmlab.inference.sampling_and_speculation.samplers import SamplerConfig
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama

Proposal = tuple[list[int], Float[Tensor, "gamma vocab"]]


class Draft(Protocol):
    """What `speculate` asks of a draft."""

    passes: int  # of a model, since it was made

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampler: SamplerConfig,
        prompt: int,
        generator: torch.Generator | None,
    ) -> Proposal:
        """At most `count` tokens to follow `tokens`, and what each was drawn from."""

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens of the text are certain."""


class DraftModel:
    """A model proposes: it draws one token after the other, with the same sampler."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.cache = KVCache(len(model.model.layers))
        self.passes = 0

    @torch.inference_mode()
    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampler: SamplerConfig,
        prompt: int,
        generator: torch.Generator | None,
    ) -> Proposal:
        drafted: list[int] = []
        q = []
        # What the cache lacks: the whole prompt, or what was kept last. That is two
        # tokens when all were accepted, for the last drafted one was never read here.
        step = list(tokens[self.cache.length :])
        for _ in range(count):
            logits = self.model(
                torch.tensor([step]), cache=self.cache, logits_to_keep=1
            )[0]
            self.passes += 1
            row = sampler.probabilities(logits, [*tokens, *drafted], (), prompt)
            u = torch.rand((), generator=generator, dtype=row.dtype)
            drafted.append(draw(row[0], u))
            q.append(row[0])
            step = drafted[-1:]
        vocab = self.model.config.vocab_size
        return drafted, torch.stack(q) if q else torch.zeros(0, vocab).double()

    def rewind(self, length: int) -> None:
        self.cache.truncate(min(length, self.cache.length))


def first_layers(model: Llama, layers: int) -> Llama:
    """The first `layers` of a model under its own last norm and head, as a model.

    Weights are shared, not copied.

    Raises:
        ValueError: fewer than one layer, or more than there are.
    """
    total = model.config.num_hidden_layers
    if not 1 <= layers <= total:
        raise ValueError(f"layers={layers} must be 1 … {total}")
    with torch.device("meta"):  # no memory for weights that are replaced at once
        short = Llama(replace(model.config, num_hidden_layers=layers))
    short.model.embed_tokens = model.model.embed_tokens
    short.model.layers = model.model.layers[:layers]
    short.model.norm = model.model.norm
    short.model.theta = model.model.theta
    short.lm_head = model.lm_head
    return short.train(model.training)


def lookup(tokens: Sequence[int], count: int, longest: int) -> list[int]:
    """What followed the last tokens where they stood before: at most `count` tokens.

    The last `longest` tokens are looked for first, then one fewer, down to one. Of
    several places the earliest counts, as in transformers and vLLM. Nothing found: [].
    """
    tokens = list(tokens)
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n):  # the suffix itself stands one later
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + count]
    return []


class Lookup:
    """The text itself proposes, at no cost. q is one-hot: nothing is drawn."""

    def __init__(self, vocab_size: int, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"longest={longest} must be at least 1")
        self.vocab_size = vocab_size
        self.longest = longest
        self.passes = 0

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampler: SamplerConfig,
        prompt: int,
        generator: torch.Generator | None,
    ) -> Proposal:
        drafted = lookup(tokens, count, self.longest)
        one_hot = F.one_hot(torch.tensor(drafted).long(), self.vocab_size)
        return drafted, one_hot.double()

    def rewind(self, length: int) -> None:
        """There is nothing to forget."""
