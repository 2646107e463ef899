"""The four ways on a real model: the smallest loop that serves several requests.

Prompts are computed one by one, then all running requests decode together, over the
blocks of the PagedAttention lesson. The engine of this part plans with `schedule` and
computes parts of prompts and tokens in one pass; here only *who is in the batch*
differs:

    alone       one request at a time
    static      so many at a time, until the longest has ended; who has ended is
                computed on, and what comes out is thrown away
    continuous  who has ended leaves, and the next comes in, before every pass
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmlab.inference.paged_attention import PagedCache, decode, prefill
from llmlab.models.llama import Llama

WAYS = ("alone", "static", "continuous")


@dataclass
class Run:
    """What `serve_trace` did.

    Attributes:
        tokens: of each request, those that were written.
        rows: of each decoding pass, which request each row was of; -1 where it was
            computed for nobody.
        seconds: in all.
    """

    tokens: list[list[int]]
    rows: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the computed rows that somebody wanted."""
        rows = [row for step in self.rows for row in step]
        return sum(row >= 0 for row in rows) / max(1, len(rows))


def serve_trace(
    model: Llama,
    cache: PagedCache,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    way: str = "continuous",
    slots: int = 4,
) -> Run:
    """Greedy tokens for all requests, which are there from the start.

    Args:
        prompts: token ids of each.
        outputs: how many tokens each one gets.
        way: "alone", "static" or "continuous".
        slots: requests in a batch; 1 for "alone".
    Raises:
        ValueError: another way, unequal numbers of prompts and outputs, or no tokens.
        OutOfBlocks: the cache is too small for the batch. Its blocks are freed.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r} must be one of {', '.join(WAYS)}")
    if len(prompts) != len(outputs) or min(outputs) < 1 or slots < 1:
        raise ValueError(
            f"{len(prompts)} prompts with outputs={list(outputs)} and slots={slots}:"
            " one number from 1 for each, and a slot at least"
        )
    slots = 1 if way == "alone" else slots
    run = Run([[] for _ in prompts])
    waiting = deque(range(len(prompts)))
    active: dict[int, int] = {}  # sequence in the cache → request
    last: dict[int, int] = {}  # sequence → its last token
    begin = time.perf_counter()
    try:
        while waiting or active:
            if way == "continuous" or not active:
                while waiting and len(active) < slots:
                    request = waiting.popleft()
                    sequence, _, logits = prefill(model, cache, prompts[request])
                    active[sequence] = request
                    last[sequence] = int(logits.argmax())
                    run.tokens[request].append(last[sequence])
            ended = [
                sequence
                for sequence, request in active.items()
                if len(run.tokens[request]) == outputs[request]
            ]
            if len(ended) == len(active) or (way == "continuous" and ended):
                for sequence in ended:
                    cache.manager.free(sequence)
                    del active[sequence]
                continue  # there is room for others now
            rows = list(active)
            for sequence in rows:
                cache.append(sequence, last[sequence])
            tokens = decode(model, cache, rows).argmax(-1).tolist()
            last.update(zip(rows, tokens, strict=True))
            run.rows.append([-1 if s in ended else active[s] for s in rows])
            for sequence in rows:
                if sequence not in ended:
                    run.tokens[active[sequence]].append(last[sequence])
    finally:
        for sequence in active:
            cache.manager.free(sequence)
    run.seconds = time.perf_counter() - begin
    return run
