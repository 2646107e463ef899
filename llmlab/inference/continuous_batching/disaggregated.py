"""Prefill on one machine, decoding on another; in between the cache travels.

Zhong et al. 2024 (DistServe), https://arxiv.org/abs/2401.09670; Patel et al. 2024
(Splitwise), https://arxiv.org/abs/2311.18677. A prompt keeps the arithmetic of a
machine busy, a token its memory; on one machine they are in each other's way. Apart,
no prompt stops a running text. The price: keys and values of the prompt,

    bytes = tokens · 2 · layers · K · D · bytes of a number

travel before the second token can be computed, and each machine does only one of two
jobs, also when it is idle and the other is not.

`prefill_rank` and `decode_rank` do it with two real processes: `comm` has `send` and
`recv`, as those of the parallelism part. `simulate_apart` and `simulate_together` do it
in virtual time, with two machines each.

Simplified: one machine on either side, one link, which carries one prompt after the
other; real systems send the layers while the next are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmlab.inference.continuous_batching.schedule import Limits
from llmlab.inference.continuous_batching.simulation import Cost, Served, simulate
from llmlab.inference.continuous_batching.traces import Request
from llmlab.inference.paged_attention import PagedCache, decode, prefill
from llmlab.models.llama import Llama


class Wire(Protocol):
    """What moves a tensor from one process to another."""

    def send(self, x: Tensor, dst: int) -> None: ...

    def recv(self, src: int) -> Tensor: ...


# Two real processes -------------------------------------------------------------------


def moved_bytes(
    tokens: int, layers: int, key_heads: int, head_dim: int, bytes_each: int
) -> int:
    """Of the keys and values of a prompt."""
    return tokens * 2 * layers * key_heads * head_dim * bytes_each


def read_out(cache: PagedCache, sequence: int) -> Tensor:
    """Keys and values of a sequence in the order of its text, (2, layers, S, K, D)."""
    manager = cache.manager
    table, length = manager.tables[sequence], len(manager.tokens[sequence])
    stores = [
        torch.stack([s[table] for s in kind]) for kind in (cache.keys, cache.values)
    ]
    # (2, layers, M, b, K, D) → (2, layers, M·b, K, D), without what is beyond the text
    return torch.stack(stores).flatten(2, 3)[:, :, :length].contiguous()


def write_in(cache: PagedCache, tokens: Sequence[int], values: Tensor) -> int:
    """A sequence whose keys and values were computed elsewhere; returns its number."""
    sequence, _ = cache.manager.add(tokens)
    b = cache.manager.block_size
    places = torch.arange(len(tokens))
    block = torch.tensor(cache.manager.tables[sequence])[places // b]
    for layer in range(len(cache.keys)):
        cache.keys[layer][block, places % b] = values[0, layer]
        cache.values[layer][block, places % b] = values[1, layer]
    cache.manager.stored(sequence)
    return sequence


def prefill_rank(
    comm: Wire,
    model: Llama,
    cache: PagedCache,
    prompts: Sequence[Sequence[int]],
    to: int = 1,
) -> int:
    """Compute each prompt and its first token, and send both with keys and values.

    Returns:
        Bytes of keys and values that were sent.
    """
    sent = 0
    for prompt in prompts:
        sequence, _, logits = prefill(model, cache, prompt)
        values = read_out(cache, sequence)
        cache.manager.free(sequence)
        comm.send(torch.tensor([*prompt, int(logits.argmax())]), to)
        comm.send(values, to)
        sent += values.numel() * values.element_size()
    return sent


def decode_rank(
    comm: Wire,
    model: Llama,
    cache: PagedCache,
    outputs: Sequence[int],
    source: int = 0,
) -> list[list[int]]:
    """Receive prompts with keys and values, and write the rest of each text.

    Returns:
        The tokens of each request, the first, which came with it, included.
    """
    written: list[list[int]] = []
    active: dict[int, int] = {}  # sequence in the cache → request
    for request, output in enumerate(outputs):
        *prompt, first = comm.recv(source).tolist()
        values = comm.recv(source)
        written.append([first])
        if output > 1:
            active[write_in(cache, prompt, values)] = request
    while active:
        rows = list(active)
        for sequence in rows:
            cache.append(sequence, written[active[sequence]][-1])
        tokens = decode(model, cache, rows).argmax(-1).tolist()
        for sequence, token in zip(rows, tokens, strict=True):
            request = active[sequence]
            written[request].append(token)
            if len(written[request]) == outputs[request]:
                cache.manager.free(sequence)
                del active[sequence]
    return written


# In virtual time ----------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Between the two machines.

    Attributes:
        bytes_per_second: of the link.
        bytes_per_token: of keys and values of one token.
    """

    bytes_per_second: float
    bytes_per_token: float

    def seconds(self, tokens: int) -> float:
        """To move a prompt."""
        return tokens * self.bytes_per_token / self.bytes_per_second


def simulate_apart(
    requests: Sequence[Request],
    cost: Cost,
    limits: Limits,
    link: Link,
    blocks: int = 10**6,
) -> Served:
    """One machine for prompts, one for the tokens after the first."""
    firsts = [replace(request, output=1) for request in requests]
    prompts = simulate(firsts, cost, limits, blocks)
    times = [list(written) for written in prompts.times]
    free = 0.0
    moved: list[tuple[float, int]] = []  # when the cache has come, request
    for id in sorted(range(len(requests)), key=lambda id: (times[id][0], id)):
        if requests[id].output > 1:
            free = max(free, times[id][0]) + link.seconds(requests[id].prompt)
            moved.append((free, id))
    # on the other machine the first token is the end of a prompt that is stored
    rest = [
        Request(arrival, r.prompt + 1, r.output - 1, stored=r.prompt)
        for arrival, r in ((arrival, requests[id]) for arrival, id in moved)
    ]
    steps = list(prompts.steps)
    if rest:
        decoded = simulate(rest, cost, limits, blocks)
        steps += decoded.steps
        for (_, id), written in zip(moved, decoded.times, strict=True):
            times[id] += written
    return Served(list(requests), times, steps)


def simulate_together(
    requests: Sequence[Request],
    cost: Cost,
    limits: Limits,
    machines: int = 2,
    blocks: int = 10**6,
) -> Served:
    """As many machines that each do both, the requests dealt out in turn."""
    times: list[list[float]] = [[] for _ in requests]
    steps = []
    for machine in range(machines):
        served = simulate(requests[machine::machines], cost, limits, blocks)
        times[machine::machines] = served.times
        steps += served.steps
    return Served(list(requests), times, steps)
