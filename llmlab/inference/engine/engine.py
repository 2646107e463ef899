"""The engine: requests come and go, and each step computes what the scheduler says.

In the spirit of nano-vllm and vLLM (Kwon et al. 2023,
https://arxiv.org/abs/2309.06180). One step:

    1  plan      who gets how many tokens, who is admitted, who is sent away
    2  blocks    room for these tokens in the tables; what is found needs no computing
    3  draft     tokens that may follow, where the engine speculates
    4  compute   one forward pass over all tokens of all requests
    5  sample    a token, or several, for each request that has none left to compute
    6  keep      rejected drafts are forgotten, full blocks can be found by others

What one adapter stores cannot serve another: the block manager sees the tokens of
adapter number a shifted by a · vocab_size, so that their blocks have other keys.

Simplified: one process and one device; a request has one continuation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.inference.continuous_batching import Job, Limits, Plan
from llmlab.inference.engine.adapters import Adapter, Adapters
from llmlab.inference.engine.batch import Chunk, compute
from llmlab.inference.engine.pieces import Guarded, PieceError, Pieces
from llmlab.inference.engine.request import Event, Request, SamplingParams
from llmlab.inference.engine.speculate import FromModel, FromText, Nobody
from llmlab.inference.paged_attention import (
    BlockManager,
    PagedCache,
    block_keys,
    register,
)
from llmlab.inference.sampling_and_speculation import SamplerConfig
from llmlab.models.llama import Llama


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        num_blocks: of the cache, `block_size` tokens each.
        max_tokens: computed in one step.
        max_sequences: that run at one time.
        chunked: whether a prompt may be computed in parts.
        prefix_caching: whether stored blocks serve others with the same beginning.
        gamma: tokens drafted for a request per step; 0 is no speculation.
        longest: of the endings that prompt lookup looks for.
        seed: of requests without one.
    """

    num_blocks: int = 256
    block_size: int = 16
    max_tokens: int = 256
    max_sequences: int = 16
    chunked: bool = True
    prefix_caching: bool = True
    gamma: int = 0
    longest: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"num_blocks": 1, "gamma": 0, "longest": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name}={value!r} must be a whole number from {least}"
                )
        _ = self.limits  # the others raise here

    @property
    def limits(self) -> Limits:
        """What the scheduler is told."""
        return Limits(
            self.max_tokens, self.max_sequences, self.block_size, self.chunked
        )

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for."""
        return self.num_blocks * self.block_size


@dataclass
class Stats:
    """Counted since the engine was made.

    Attributes:
        steps: forward passes of the model.
        computed: tokens that went through it.
        found: tokens that did not, for their blocks were there.
        written: tokens put out.
        preemptions: how often a request was sent back to wait.
        drafted: tokens proposed.
        accepted: of these, those that stayed.
        blocks: the most in use at one time.
        stored: tokens in these blocks, summed over the steps.
        room: tokens that they had room for, summed over the steps.
    """

    steps: int = 0
    computed: int = 0
    found: int = 0
    written: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    blocks: int = 0
    stored: int = 0
    room: int = 0

    @property
    def waste(self) -> float:
        """The share of the room in blocks in use that held nothing, over the steps."""
        return 1 - self.stored / self.room if self.room else 0.0


class Engine:
    """Serves requests on one model.

    >>> engine = Engine(model, EngineConfig(num_blocks=64))
    >>> engine.add([1, 2, 3], SamplingParams(max_new_tokens=8))
    0
    >>> while not engine.idle:
    ...     for event in engine.step():
    ...         print(event.id, event.token, event.finished)

    Args:
        pieces: the functions that it is made of.
        adapters: LoRA by name, which requests can ask for.
        draft: a small model with the same vocabulary that drafts `gamma` tokens; None
            looks them up in the text.
    Raises:
        ValueError: an adapter that does not fit the model, or a draft that does not.
    """

    def __init__(
        self,
        model: Llama,
        config: EngineConfig | None = None,
        *,
        pieces: Pieces | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        draft: Llama | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.pieces = Guarded(pieces or Pieces())
        self.adapters = Adapters(model, adapters or {}) if adapters else None
        if draft is not None:
            _check_draft(model, draft, self.config)
        self.draft = draft
        self.stats = Stats()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self._next = 0
        self.cache = self._new_cache(model)
        self._caches = [self.cache]
        self.drafter = self._drafter()

    # From outside -------------------------------------------------------------------

    def add(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> int:
        """A new request, at the end of the queue.

        Returns:
            Its number, which its events carry.
        Raises:
            ValueError: no token, or one that is none; a text too long for the model or
                the cache; an adapter that there is not.
        """
        tokens = list(tokens)
        params = params or SamplingParams()
        self._check(tokens, params, adapter)
        generator = self._generator
        if params.seed is not None:
            generator = torch.Generator().manual_seed(params.seed)
        id = self._next
        self._next += 1
        request = Request(id, tokens, params, params.sampler, generator, adapter)
        self.waiting.append(request)
        return id

    def step(self) -> list[Event]:
        """One forward pass. What was written, in the order in which requests came.

        Raises:
            PieceError: a piece of the engine does not do what it must. All requests
                wait again then, and the cache is empty.
        """
        if self.idle:
            return []
        before = [(each, len(each.tokens)) for each in (*self.running, *self.waiting)]
        try:
            return self._step()
        except BaseException:
            self._start_over(before)
            raise

    def abort(self, id: int) -> Event | None:
        """The request is gone, and its blocks are free. None: it had ended before.

        Raises:
            ValueError: there never was such a request.
        """
        if not isinstance(id, int) or not 0 <= id < self._next:
            raise ValueError(f"id={id!r} is not known: numbers up to {self._next - 1}")
        for request in (*self.running, *self.waiting):
            if request.id == id:
                self._leave(request)
                return Event(id, None, "abort")
        return None

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self.running and not self.waiting

    @property
    def blocks_in_use(self) -> int:
        return self.cache.manager.used

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """What is written after each prompt, when all have ended.

        Raises:
            ValueError: as `add`. No request is left behind then.
        """
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        adapters = adapters or [None] * len(prompts)
        written: dict[int, list[int]] = {}
        try:
            for each in zip(prompts, params, adapters, strict=True):
                written[self.add(*each)] = []
            while not self.idle:
                for event in self.step():
                    if event.id in written:
                        written[event.id].append(event.token)
        except BaseException:
            for id in written:
                self.abort(id)
            raise
        return list(written.values())

    def check(self) -> None:
        """What holds between two steps.

        Raises:
            RuntimeError: it does not; the text says what.
        """
        manager = self.cache.manager
        manager.check()
        sequences = {request.sequence for request in self.running}
        if sequences != set(manager.tables):
            raise RuntimeError(
                f"the running requests have the sequences {sorted(sequences)}, and"
                f" tables are there for {sorted(manager.tables)}"
            )
        for request in self.running:
            stored = len(manager.tokens[request.sequence])
            if stored != request.computed:
                raise RuntimeError(
                    f"request {request.id} has {request.computed} tokens computed, and"
                    f" its table holds {stored}"
                )
        for request in self.waiting:
            if request.sequence is not None or request.computed:
                raise RuntimeError(f"request {request.id} waits and has blocks")
        if not self.running and manager.used:
            raise RuntimeError(f"nobody runs, and {manager.used} blocks are in use")

    def close(self) -> None:
        """Take the adapters' hooks off the model."""
        if self.adapters is not None:
            self.adapters.remove()

    # One step -----------------------------------------------------------------------

    def _step(self) -> list[Event]:
        plan = self._plan()
        self._send_away(plan.preempted)
        by_id = {request.id: request for request in (*self.waiting, *self.running)}
        # first of all, while what they found is still there
        for id in plan.admitted:
            self._admit(by_id[id], plan.tokens[id])
        granted = [(by_id[id], count) for id, count in plan.tokens.items()]
        work = self._make_room(granted)
        if not work:
            return []
        logits = compute(
            self.model,
            self.cache,
            [chunk for _, chunk, _ in work],
            self.pieces.attention,
            self.adapters,
        )
        self.drafter.follow([(request, chunk) for request, chunk, _ in work])
        self._count(work)
        events = self._sample(work, logits)
        if self.pieces.pieces.replaced:
            self._check_pieces()
        return events

    def _plan(self) -> Plan:
        """What the scheduler says to what it sees."""
        manager = self.cache.manager
        counts = manager.pool.counts
        running = []
        for request in self.running:
            wanted = self.drafter.want(request) if request.left == 1 else 0
            table = manager.tables[request.sequence]
            own = sum(counts[block] == 1 for block in table)
            running.append(
                Job(
                    request.id,
                    request.computed,
                    request.left + wanted,
                    blocks=len(table),
                    own=own,
                )
            )
        return self.pieces.schedule(
            running,
            self._waiting_jobs(),
            len(manager.pool.available),
            self.config.limits,
        )

    def _waiting_jobs(self) -> list[Job]:
        """Those that can be admitted now.

        Where somebody is computing the very block that a request needs next, it is
        held back until that one can be found.
        """
        pool = self.cache.manager.pool
        coming: set[bytes] = set()
        for request in self.running:
            if request.left > 1:
                done = request.computed // pool.block_size
                coming.update(self._keys(request)[done:])
        jobs = []
        for request in self.waiting:
            if len(jobs) == self.config.max_sequences:
                break  # no more can be admitted in a step
            keys = self._keys(request)
            # one token at least is left to compute
            keys = keys[: (len(request.tokens) - 1) // pool.block_size]
            found = []
            for key in keys:
                if key not in pool.cached:
                    break
                found.append(pool.cached[key])
            if len(found) < len(keys) and keys[len(found)] in coming:
                continue
            coming.update(keys[len(found) :])
            computed = len(found) * pool.block_size
            in_use = sum(pool.counts[block] > 0 for block in found)
            left = len(request.tokens) - computed
            jobs.append(Job(request.id, computed, left, blocks=in_use))
        return jobs

    def _keys(self, request: Request) -> list[bytes]:
        """The keys of its full blocks."""
        size = self.config.block_size
        if not self.config.prefix_caching:
            return []
        if len(request.keys) != len(request.tokens) // size:
            request.keys = block_keys(self._shifted(request, request.tokens), size)
        return request.keys

    def _shifted(self, request: Request, tokens: Sequence[int]) -> list[int]:
        """Tokens as the block manager sees them: those of each adapter are others."""
        if request.adapter is None:
            return list(tokens)
        number = self.adapters.number(request.adapter)
        shift = number * self.model.config.vocab_size
        return [token + shift for token in tokens]

    def _send_away(self, ids: Sequence[int]) -> None:
        """Pre-empted requests wait again, in front, and recompute all they have."""
        for id in ids:
            request = next(each for each in self.running if each.id == id)
            self._leave(request)
            self.waiting.appendleft(request)
            self.stats.preemptions += 1

    def _admit(self, request: Request, count: int) -> None:
        """It gets a table for what is found and what is computed now."""
        manager = self.cache.manager
        size = self.config.block_size
        pool = manager.pool
        keys = self._keys(request)[: (len(request.tokens) - 1) // size]
        blocks = 0
        while blocks < len(keys) and keys[blocks] in pool.cached:
            blocks += 1
        text = request.tokens[: blocks * size + count]
        request.sequence, found = manager.add(self._shifted(request, text))
        request.computed = found
        request.draft_computed = found
        self.stats.found += found
        self.waiting.remove(request)
        self.running.append(request)

    def _make_room(
        self, granted: Sequence[tuple[Request, int]]
    ) -> list[tuple[Request, Chunk, Tensor]]:
        """Slots for the tokens of a plan, drafted ones included: what is computed."""
        manager = self.cache.manager
        asked = []
        for request, count in granted:
            stored = manager.tokens[request.sequence]
            if len(stored) == request.computed:  # it ran before: its table grows
                new = request.tokens[request.computed : request.computed + count]
                new = self._shifted(request, new)
                # what is drafted is not known yet
                for token in [*new, *[-1] * (count - len(new))]:
                    self._copy(manager.append(request.sequence, token))
            drafts = max(0, len(stored) - len(request.tokens))
            asked.append((request, drafts))
        proposals = self.drafter.propose(asked, manager)
        work = []
        for (request, _), (drafted, q) in zip(asked, proposals, strict=True):
            stop = len(manager.tokens[request.sequence])
            tokens = [*request.tokens[request.computed : stop], *drafted]
            wanted = 0
            if request.computed + len(tokens) >= len(request.tokens):
                wanted = 1 + len(drafted)
            table = manager.tables[request.sequence]
            chunk = Chunk(tokens, request.computed, table, wanted, request.adapter)
            work.append((request, chunk, q))
        return work

    def _copy(self, pair: tuple[int, int] | None) -> None:
        """What stood in a block that others read stands in one of its own, too."""
        if pair is not None:
            for cache in self._caches:
                cache.copy(pair)

    def _count(self, work: Sequence[tuple[Request, Chunk, Tensor]]) -> None:
        stats = self.stats
        stats.steps += 1
        stats.computed += sum(len(chunk.tokens) for _, chunk, _ in work)
        stats.blocks = max(stats.blocks, self.blocks_in_use)
        manager = self.cache.manager
        filled: dict[int, int] = {}  # block → tokens in it
        for sequence, table in manager.tables.items():
            length = len(manager.tokens[sequence])
            for place, block in enumerate(table):
                full = min(self.config.block_size, length - place * manager.block_size)
                filled[block] = full
        stats.stored += sum(filled.values())
        stats.room += len(filled) * self.config.block_size

    def _sample(
        self, work: Sequence[tuple[Request, Chunk, Tensor]], logits: Tensor
    ) -> list[Event]:
        """New tokens of all requests that have computed all they had."""
        events = []
        largest = logits.argmax(-1).tolist()
        drawn_from = self._drawn_from(work, logits)
        row = 0
        for request, chunk, q in work:
            if not chunk.wanted:
                request.computed = chunk.stop
                self._register(request)
                continue
            drafted = chunk.drafted
            kept = [largest[row]]
            if request.id in drawn_from:
                p = drawn_from[request.id]
                kept = self._accept(request, p, drafted, q)
            row += chunk.wanted
            events += self._write(request, drafted, kept)
        return events

    def _drawn_from(
        self, work: Sequence[tuple[Request, Chunk, Tensor]], logits: Tensor
    ) -> dict[int, Tensor]:
        """What the next tokens of each request are drawn from: id → (wanted, vocab).
        Those who sample alike are one matrix. Who takes the largest logit and drafted
        nothing is not among them.
        """
        groups: dict[SamplerConfig, list[tuple[Request, Chunk, range]]] = {}
        row = 0
        for request, chunk, _ in work:
            rows = range(row, row + chunk.wanted)
            row = rows.stop
            if chunk.wanted > 1 or (chunk.wanted and not request.greedy):
                members = groups.setdefault(request.sampler, [])
                members.append((request, chunk, rows))
        found = {}
        for sampler, members in groups.items():
            p = sampler.probabilities_of(
                logits[[row for _, _, rows in members for row in rows]],
                [(r.tokens, chunk.drafted, r.prompt) for r, chunk, _ in members],
                self.pieces.processors,
            )
            sizes = [chunk.wanted for _, chunk, _ in members]
            ids = [request.id for request, _, _ in members]
            found |= zip(ids, p.split(sizes), strict=True)
        return found

    def _accept(
        self, request: Request, p: Tensor, drafted: list[int], q: Tensor
    ) -> list[int]:
        """What stays of the drafted tokens, and one token more."""
        u = torch.rand(
            len(drafted) + 1, generator=request.generator, dtype=torch.float64
        )
        if not drafted:
            q = p[:0]
        kept = self.pieces.accept(p, q, drafted, u)
        self.stats.drafted += len(drafted)
        self.stats.accepted += len(kept) - 1
        return kept

    def _write(
        self, request: Request, drafted: Sequence[int], kept: Sequence[int]
    ) -> list[Event]:
        """The kept tokens belong to the text; the drafted ones that do not are
        forgotten.
        """
        finished = None
        events = []
        for token in kept:
            request.tokens.append(token)
            if token in request.params.stop_tokens:
                finished = "stop"
            elif request.to_write == 0:
                finished = "length"
            events.append(Event(request.id, token, finished))
            if finished:
                break
        self.stats.written += len(events)
        # the last token was only written, and is computed in the next step
        request.computed = len(request.tokens) - 1
        request.draft_computed = min(request.draft_computed, request.computed)
        if drafted:
            manager = self.cache.manager
            self._copy(manager.truncate(request.sequence, request.computed))
            stored = manager.tokens[request.sequence]
            start = max(0, len(stored) - len(drafted))
            stored[start:] = self._shifted(
                request, request.tokens[start : request.computed]
            )
        self._register(request)
        if finished:
            self._leave(request)
        return events

    def _register(self, request: Request) -> None:
        """Full blocks can be found, when the draft has stored its part of them, too."""
        size = self.config.block_size
        stored = request.computed
        if self.draft is not None and self.config.gamma:
            stored = min(stored, request.draft_computed)
        full = stored // size
        if not self.config.prefix_caching or full <= request.registered:
            return
        request.registered = full
        manager = self.cache.manager
        table = manager.tables[request.sequence]
        tokens = manager.tokens[request.sequence][: full * size]
        register(manager.pool, table, tokens)

    def _leave(self, request: Request) -> None:
        """It neither runs nor waits, and has no block."""
        if request.sequence is not None:
            self.cache.manager.free(request.sequence)
        request.forget()
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    # What goes wrong ----------------------------------------------------------------

    def _check_pieces(self) -> None:
        """A piece may have changed what it has no business with."""
        try:
            self.check()
        except RuntimeError as error:
            names = ", ".join(self.pieces.pieces.replaced)
            raise PieceError(names, f"left the blocks in disorder: {error}") from error

    def _start_over(self, before: Sequence[tuple[Request, int]]) -> None:
        """All requests wait, with nothing computed; no block is in use or found.

        Args:
            before: the requests, and their lengths: what a step has written since was
                told to nobody.
        """
        for request, length in before:
            del request.tokens[length:]
            request.forget()
            request.keys = []
            request.looked_up = (0, [])
        self.waiting = deque(request for request, _ in before)
        self.running = []
        manager = self._new_manager()
        for cache in self._caches:
            cache.manager = manager

    def _check(
        self, tokens: list[int], params: SamplingParams, adapter: str | None
    ) -> None:
        vocab = self.model.config.vocab_size
        if not tokens:
            raise ValueError("tokens is empty: a request has at least one token")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise ValueError(f"tokens has {token!r}: tokens are 0 to {vocab - 1}")
        if adapter is not None and (
            self.adapters is None or adapter not in self.adapters
        ):
            known = [] if self.adapters is None else list(self.adapters.adapters)
            raise ValueError(f"adapter={adapter!r} is not known: there are {known}")
        # the last token that is written need not be stored
        longest = len(tokens) + params.max_new_tokens - 1
        asked = f"{len(tokens)} tokens and max_new_tokens={params.max_new_tokens}"
        most = self.model.config.max_position_embeddings
        if longest > most:
            raise ValueError(f"{asked} are too many for a model of {most} positions")
        if longest > self.config.capacity:
            raise ValueError(
                f"{asked} are too many for a cache of {self.config.capacity} tokens"
            )
        if not self.config.chunked and longest > self.config.max_tokens:
            raise ValueError(
                f"{asked} are too many for max_tokens={self.config.max_tokens} with"
                " chunked=False"
            )

    # The memory ---------------------------------------------------------------------

    def _new_manager(self) -> BlockManager:
        return BlockManager(
            self.config.num_blocks,
            self.config.block_size,
            prefix_caching=self.config.prefix_caching,
            allocate=self.pieces.allocate,
            append_slot=self.pieces.append_slot,
            free=self.pieces.free,
        )

    def _new_cache(self, model: Llama) -> PagedCache:
        return PagedCache(
            model.config, self._new_manager(), model.model.norm.weight.dtype
        )

    def _drafter(self) -> Nobody:
        config = self.config
        if config.gamma == 0:
            return Nobody()
        if self.draft is None:
            vocab = self.model.config.vocab_size
            return FromText(config.gamma, config.longest, vocab, self.pieces)
        dtype = self.draft.model.norm.weight.dtype
        cache = PagedCache(self.draft.config, self.cache.manager, dtype)
        self._caches.append(cache)
        return FromModel(self.draft, config.gamma, cache, self.pieces)


def cache_blocks(model: Llama, memory: int, block_size: int = 16) -> int:
    """How many blocks of keys and values fit into `memory` bytes.

    Raises:
        ValueError: not a single one.
    """
    dtype = model.model.norm.weight.dtype
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    block = token * dtype.itemsize * block_size
    if memory < block:
        raise ValueError(f"memory={memory} is less than one block of {block} bytes")
    return memory // block


def _check_draft(model: Llama, draft: Llama, config: EngineConfig) -> None:
    if config.gamma == 0:
        raise ValueError("draft is given and gamma=0: nothing would be drafted")
    ours, theirs = model.config, draft.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"draft has a vocabulary of {theirs.vocab_size}, the model of"
            f" {ours.vocab_size}: they must be the same"
        )
    if theirs.max_position_embeddings < ours.max_position_embeddings:
        raise ValueError(
            f"draft has {theirs.max_position_embeddings} positions, fewer than the"
            f" model's {ours.max_position_embeddings}"
        )
