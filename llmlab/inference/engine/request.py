"""What is asked of the engine, and what comes out.

A request is a text that grows. Of its tokens the first `computed` have their keys and
values in the cache; the rest is still to be computed: all of the prompt at first, later
the one token that was written last. That is all there is to prefill and decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmlab.inference.sampling_and_speculation import SamplerConfig


@dataclass(frozen=True)
class SamplingParams:
    """How the text of one request goes on.

    Attributes:
        max_new_tokens: it ends after so many, finished "length".
        temperature: 0 is greedy. The other fields of a sampler are those of
            `SamplerConfig`.
        seed: the same seed draws with the same numbers; None takes the engine's.
        stop_tokens: the text ends with any of these, finished "stop". The token itself
            is put out.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    order: str = "transformers"
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"max_new_tokens={count!r} must be a whole number from 1")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be a whole number or None")
        stops = self.stop_tokens
        if isinstance(stops, int | str):
            raise ValueError(f"stop_tokens={stops!r} must be a list of tokens")
        object.__setattr__(self, "stop_tokens", tuple(stops))
        _ = self.sampler  # a value out of range raises here

    @property
    def sampler(self) -> SamplerConfig:
        """The part of it that turns logits into probabilities."""
        return SamplerConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            order=self.order,
        )


@dataclass(frozen=True)
class Event:
    """One token of one request, or its end.

    Attributes:
        token: None where it was aborted.
        finished: None while it goes on; else "stop", "length" or "abort".
    """

    id: int
    token: int | None
    finished: str | None = None


@dataclass(eq=False)  # two requests for the same are two requests
class Request:
    """A text that grows.

    Attributes:
        tokens: the prompt and what was written.
        prompt: how many of them are the prompt.
        generator: of its own seed, or the engine's.
        adapter: which LoRA it goes through.
        computed: tokens whose keys and values are stored.
        sequence: its number in the block manager while it runs.
        keys: of its full blocks; a beginning of them, made when they are asked for.
        draft_computed: what the draft model has stored of it.
        registered: full blocks of it that others can find.
        looked_up: what prompt lookup found for a text of that many tokens.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    sampler: SamplerConfig
    generator: torch.Generator
    adapter: str | None = None
    prompt: int = 0
    computed: int = 0
    sequence: int | None = None
    keys: list[bytes] = field(default_factory=list)
    draft_computed: int = 0
    registered: int = 0
    looked_up: tuple[int, list[int]] = (0, [])

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest logit, and nothing else."""
        return self.sampler.temperature == 0 and not self.sampler.steps

    @property
    def left(self) -> int:
        """Tokens to compute before the next can be written."""
        return len(self.tokens) - self.computed

    @property
    def written(self) -> Sequence[int]:
        """What came after the prompt."""
        return self.tokens[self.prompt :]

    @property
    def to_write(self) -> int:
        """Tokens that it may still write."""
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt)

    def forget(self) -> None:
        """Nothing of it is stored."""
        self.sequence = None
        self.computed = 0
        self.draft_computed = 0
        self.registered = 0
