"""From logits to the probabilities that a token is drawn from.

A sampler is a list of processors, each a pure function on the logits of a batch. The
order is part of the sampler: each processor sees what those before it left.

    top-k                Fan et al. 2018, https://arxiv.org/abs/1805.04833
    top-p                Holtzman et al. 2020, https://arxiv.org/abs/1904.09751
    min-p                Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
    typical              Meister et al. 2022, https://arxiv.org/abs/2202.00666
    repetition penalty   Keskar et al. 2019, https://arxiv.org/abs/1909.05858

    B  batch        V  vocabulary
    prompt, output  how often each token stands in the prompt, and in what was generated

Top-k, top-p and the greedy case are those of `llmlab.models.generation`. Ties: top-k
and min-p keep all tokens that are equal to the last one; top-p keeps no more than it
needs.
Simplified: no n-gram bans, no minimum length, no bias for single tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.models.generation import keep_top_k, keep_top_p, probabilities

Logits = Float[Tensor, "batch vocab"]
Counts = Int[Tensor, "batch vocab"]
Step = tuple[str, float]  # the name of a processor, and its value
# tokens, what was drafted after them, and how many of the tokens are the prompt (None:
# all)
Text = tuple[Sequence[int], Sequence[int], int | None]


def keep_min_p(logits: Logits, min_p: float) -> Logits:
    """All tokens below `min_p` times the largest probability become −∞."""
    p = logits.softmax(-1)
    floor = min_p * p.amax(-1, keepdim=True)
    return logits.masked_fill(p < floor, -torch.inf)


def keep_typical(logits: Logits, mass: float) -> Logits:
    """Tokens whose surprise −log p is nearest to its mean, the entropy, until they have
    `mass`. The likeliest token may go.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(-1, keepdim=True)  # 0 · log 0 counts as 0
    distance = (-log_p - entropy).abs()
    ascending, order = distance.sort()
    reached = p.gather(-1, order).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return logits.masked_fill(distance > ascending.gather(-1, last), -torch.inf)


def penalise_repetition(
    logits: Logits, penalty: float, prompt: Counts, output: Counts
) -> Logits:
    """Positive logits of tokens seen before are divided by `penalty`, negative ones
    multiplied.
    """
    seen = (prompt + output) > 0
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


# name → function of (logits, value, prompt, output)
Processors = Mapping[str, Callable[[Tensor, float, Tensor, Tensor], Tensor]]
PROCESSORS: Processors = {
    "repetition_penalty": penalise_repetition,
    "presence_penalty": lambda logits, a, _, output: logits - a * (output > 0),
    "frequency_penalty": lambda logits, a, _, output: logits - a * output,
    "temperature": lambda logits, t, *_: logits / t,
    "top_k": lambda logits, k, *_: keep_top_k(logits, int(k)),
    "top_p": lambda logits, p, *_: keep_top_p(logits, p),
    "min_p": lambda logits, p, *_: keep_min_p(logits, p),
    "typical_p": lambda logits, p, *_: keep_typical(logits, p),
}

# In which order the libraries apply them. What is not named, the library does not have.
ORDERS: dict[str, tuple[str, ...]] = {
    "transformers": (
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ),
    "vllm": (
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "temperature",
        "min_p",
        "top_k",
        "top_p",
    ),
}


def process(
    logits: Logits,
    steps: Sequence[Step],
    prompt: Counts,
    output: Counts,
    processors: Processors = PROCESSORS,
) -> Logits:
    """The logits after all processors, in the order of the list.

    Args:
        processors: others in the place of ours, by the same names.
    Raises:
        ValueError: a name that is not in `processors`.
    """
    for name, value in steps:
        if name not in processors:
            raise ValueError(
                f"steps names the processor {name!r}; there are {', '.join(processors)}"
            )
        logits = processors[name](logits, value, prompt, output)
    return logits


@dataclass(frozen=True)
class SamplerConfig:
    """What a request asks for. None, and temperature 1, change nothing."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None  # of prompt and output
    presence_penalty: float | None = None  # of output only, once
    frequency_penalty: float | None = None  # of output only, each time
    order: str = "transformers"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or positive"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < float("inf"):
            raise ValueError(f"repetition_penalty={penalty} must be above 0")
        if self.order not in ORDERS:
            raise ValueError(
                f"order={self.order!r} must be one of {', '.join(map(repr, ORDERS))}"
            )
        for name in PROCESSORS:
            value = getattr(self, name)
            if value is not None and name not in ORDERS[self.order]:
                raise ValueError(
                    f"{name}={value} needs another order: {self.order} does not have it"
                )

    @property
    def steps(self) -> list[Step]:
        """The processors as data, in the order of the library."""
        found = []
        for name in ORDERS[self.order]:
            value = getattr(self, name)
            if value is None or (name == "temperature" and value in (0.0, 1.0)):
                continue
            found.append((name, value))
        return found

    def probabilities(
        self,
        logits: Float[Tensor, "positions vocab"],
        tokens: Sequence[int],
        drafted: Sequence[int] = (),
        prompt: int | None = None,
        processors: Processors = PROCESSORS,
    ) -> Float[Tensor, "positions vocab"]:
        """What each of the next positions of one text is drawn from, in float64.

        Row i follows `tokens` and the first i drafted tokens. See `probabilities_of`.

        Args:
            prompt: how many of `tokens` are the prompt; None means all.
        """
        return self.probabilities_of(logits, [(tokens, drafted, prompt)], processors)

    def probabilities_of(
        self,
        logits: Float[Tensor, "positions vocab"],
        texts: Sequence[Text],
        processors: Processors = PROCESSORS,
    ) -> Float[Tensor, "positions vocab"]:
        """What each of the next positions of several texts is drawn from, in float64.

        A text has a row for each drafted token and one more. Row i of it follows its
        tokens and the first i drafted ones, so that penalties count what a plain
        sampler would count.

        Args:
            processors: as in `process`. Tokens are counted if the sampler has a
                penalty; without one the counts are 0.
        """
        vocab = logits.shape[-1]
        prompts = outputs = logits.new_zeros(1, vocab, dtype=torch.long)
        if any(name.endswith("penalty") for name, _ in self.steps):
            counts = zip(*(_counts(*text, vocab) for text in texts), strict=True)
            prompts, outputs = (torch.cat(each).to(logits.device) for each in counts)
        logits = process(logits.double(), self.steps, prompts, outputs, processors)
        return probabilities(logits, 0.0 if self.temperature == 0 else 1.0)


def _counts(
    tokens: Sequence[int], drafted: Sequence[int], prompt: int | None, vocab: int
) -> tuple[Counts, Counts]:
    """How often each token stands in the prompt and in the output, row by row."""
    rows = 1 + len(drafted)
    prompt = len(tokens) if prompt is None else prompt
    text = torch.tensor(list(tokens), dtype=torch.long)
    asked = torch.bincount(text[:prompt], minlength=vocab)
    output = torch.bincount(text[prompt:], minlength=vocab).repeat(rows, 1)
    for i, token in enumerate(drafted):
        output[i + 1 :, token] += 1  # row i does not see its own token
    return asked.repeat(rows, 1), output
