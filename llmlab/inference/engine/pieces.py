"""The functions that the engine is made of, each of which can be another: a learner's.

What a piece gives back is looked at before it is used. One that raises, or says
something that cannot be, ends in a `PieceError` with its name; the engine then starts
over with an empty cache, and no request is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llmlab.inference import continuous_batching, sampling_and_speculation
from llmlab.inference import paged_attention as paged
from llmlab.inference.continuous_batching import Job, Limits, Plan, blocks_needed
from llmlab.inference.engine import attention
from llmlab.inference.paged_attention import Pool, blocks_for
from llmlab.inference.sampling_and_speculation import samplers
from llmlab.models import generation


class PieceError(RuntimeError):
    """A piece raised, or gave something that cannot be. `piece` is its name."""

    def __init__(self, piece: str, what: str) -> None:
        super().__init__(f"the piece {piece!r} {what}")
        self.piece = piece


@dataclass(frozen=True)
class Pieces:
    """One function for each place; the lessons say what each must do.

    Attributes:
        allocate, append_slot, free, paged_attention: lesson 07/03.
        schedule: lesson 07/04.
        keep_top_k, keep_top_p, keep_min_p, keep_typical, penalise_repetition, accept,
        lookup: lesson 07/05.
    """

    allocate: Callable = paged.allocate
    append_slot: Callable = paged.append_slot
    free: Callable = paged.free
    paged_attention: Callable = attention.paged_attention
    schedule: Callable = continuous_batching.schedule
    keep_top_k: Callable = generation.keep_top_k
    keep_top_p: Callable = generation.keep_top_p
    keep_min_p: Callable = samplers.keep_min_p
    keep_typical: Callable = samplers.keep_typical
    penalise_repetition: Callable = samplers.penalise_repetition
    accept: Callable = sampling_and_speculation.accept
    lookup: Callable = sampling_and_speculation.lookup

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not callable(value):
                raise ValueError(f"{each.name}={value!r} must be a function")

    @property
    def replaced(self) -> list[str]:
        """The names of those that are not the lessons' own."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not f.default]


class Guarded:
    """Pieces that are called with a look at what they give back."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self.pieces, name)(*args)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise PieceError(name, f"raised {said}") from error

    # Blocks -------------------------------------------------------------------------

    def allocate(self, pool: Pool, tokens: Sequence[int]) -> tuple[list[int], int]:
        """A table of the right length, of blocks that are either fresh or really hold
        the beginning of the text.
        """
        counts = pool.counts.copy()
        answer = self._call("allocate", pool, tokens)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise PieceError(
                "allocate", f"gave {answer!r}: a table and a number is due"
            )
        table, found = answer
        size = pool.block_size
        _check_table("allocate", pool, table, blocks_for(len(tokens), size))
        if not isinstance(found, int) or not 0 <= found < len(tokens) or found % size:
            raise PieceError(
                "allocate",
                f"gave found={found!r}: it must be a multiple of {size} from 0, below"
                f" the {len(tokens)} tokens",
            )
        keys = paged.block_keys(tokens[:found], size)
        for place, (block, key) in enumerate(zip(table, keys, strict=False)):
            if pool.cached.get(key) != block:
                raise PieceError(
                    "allocate", f"found block {block} at place {place}: it is another's"
                )
        for place, block in enumerate(table):
            shared = place < found // size
            if counts[block] and not shared:
                raise PieceError(
                    "allocate", f"took block {block}, which is in use already"
                )
            if pool.counts[block] != counts[block] + 1:
                raise PieceError(
                    "allocate",
                    f"left block {block} with counts={pool.counts[block]}, not"
                    f" {counts[block] + 1}",
                )
        _check_available("allocate", pool, table)
        return list(table), found

    def append_slot(self, pool: Pool, table: list[int], length: int):
        """Room for one token more, in a block that nobody else reads."""
        before = list(table)
        copy = self._call("append_slot", pool, table, length)
        wanted = blocks_for(length + 1, pool.block_size)
        if len(table) == len(before) == wanted and copy is None:
            if table != before:
                raise PieceError(
                    "append_slot", f"changed the table {before} to {table}"
                )
            if pool.counts[table[-1]] != 1:
                raise PieceError(
                    "append_slot",
                    f"gave no copy of block {table[-1]}, which others read, too",
                )
            return None
        _check_table("append_slot", pool, table, wanted)
        last = table[-1]
        pair = (before[-1], last) if len(before) == wanted else None
        if copy != pair or table[: wanted - 1] != before[: wanted - 1]:
            raise PieceError(
                "append_slot",
                f"gave {copy!r} and the table {table} after {before}, length={length}",
            )
        if pool.counts[last] != 1:
            raise PieceError(
                "append_slot",
                f"left the new block {last} with counts={pool.counts[last]}, not 1",
            )
        _check_available("append_slot", pool, [last])
        return copy

    def free(self, pool: Pool, table: Sequence[int]) -> list[int]:
        """Each block of the table stands in one table less."""
        table = list(table)
        counts = pool.counts.copy()
        again = self._call("free", pool, list(table))
        unused = [block for block in table if counts[block] == 1]
        for block in table:
            if pool.counts[block] != counts[block] - 1:
                raise PieceError(
                    "free",
                    f"left block {block} with counts={pool.counts[block]}, not"
                    f" {counts[block] - 1}",
                )
        if not isinstance(again, list) or sorted(again) != sorted(unused):
            raise PieceError("free", f"gave {again!r}; available again are {unused}")
        missing = set(unused) - set(pool.available)
        if missing:
            raise PieceError("free", f"did not make {sorted(missing)} available")
        return again

    @property
    def attention(self) -> Callable[..., Tensor]:
        """Attention over blocks. Our own is called as it is, in each layer."""
        if self.pieces.paged_attention is attention.paged_attention:
            return attention.unchecked
        return self.paged_attention

    def paged_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
    ) -> Tensor:
        """Numbers, of the shape of q."""
        out = self._call("paged_attention", q, keys, values, tables, lengths)
        if not isinstance(out, Tensor) or out.shape != q.shape:
            shape = tuple(out.shape) if isinstance(out, Tensor) else repr(out)
            raise PieceError(
                "paged_attention", f"gave {shape}: it must be {tuple(q.shape)}"
            )
        if not bool(out.isfinite().all()):
            raise PieceError("paged_attention", "gave numbers that are not finite")
        return out.to(q.dtype)

    # The plan -----------------------------------------------------------------------

    def schedule(
        self,
        running: Sequence[Job],
        waiting: Sequence[Job],
        available: int,
        limits: Limits,
    ) -> Plan:
        """A plan that can be carried out, and that goes on."""
        plan = self._call("schedule", list(running), list(waiting), available, limits)
        if not isinstance(plan, Plan):
            raise PieceError("schedule", f"gave {plan!r}: a Plan is due")
        why = _impossible(plan, running, waiting, available, limits)
        if why:
            raise PieceError("schedule", f"gave {plan}: {why}")
        return plan

    # Tokens -------------------------------------------------------------------------

    @property
    def processors(self) -> Mapping[str, Callable[..., Tensor]]:
        """The samplers' steps, with the pieces in their places."""

        def logits(name: str, given: Tensor, *more: Any) -> Tensor:
            out = self._call(name, given, *more)
            if not isinstance(out, Tensor) or out.shape != given.shape:
                raise PieceError(name, f"gave {out!r}: logits of shape {given.shape}")
            if bool(out.isnan().any()) or bool((out == -torch.inf).all(-1).any()):
                raise PieceError(name, "left no token that can be drawn")
            return out

        return {
            **samplers.PROCESSORS,
            "repetition_penalty": lambda x, a, p, o: logits(
                "penalise_repetition", x, a, p, o
            ),
            "top_k": lambda x, k, *_: logits("keep_top_k", x, int(k)),
            "top_p": lambda x, p, *_: logits("keep_top_p", x, p),
            "min_p": lambda x, p, *_: logits("keep_min_p", x, p),
            "typical_p": lambda x, p, *_: logits("keep_typical", x, p),
        }

    def accept(self, p: Tensor, q: Tensor, drafted: list[int], u: Tensor) -> list[int]:
        """A beginning of the drafted tokens, and one token more."""
        kept = self._call("accept", p, q, list(drafted), u)
        if isinstance(kept, list | tuple):
            kept = [int(token) for token in kept]
        right = (
            isinstance(kept, list)
            and 1 <= len(kept) <= len(drafted) + 1
            and kept[:-1] == drafted[: len(kept) - 1]
            and 0 <= kept[-1] < p.shape[-1]
        )
        if not right:
            raise PieceError(
                "accept",
                f"gave {kept!r}: it must be a beginning of {drafted} and one token from"
                f" 0 to {p.shape[-1] - 1}",
            )
        return kept

    def lookup(self, tokens: Sequence[int], count: int, longest: int) -> list[int]:
        """At most `count` tokens that stand in the text."""
        found = self._call("lookup", list(tokens), count, longest)
        if not isinstance(found, list | tuple) or not set(found) <= set(tokens):
            raise PieceError("lookup", f"gave {found!r}: tokens of the text are due")
        if len(found) > count:
            raise PieceError("lookup", f"gave {len(found)} tokens, above count={count}")
        return list(found)


def _check_table(piece: str, pool: Pool, table: Any, length: int) -> None:
    """A list of that many different blocks of the pool."""
    blocks = range(len(pool.counts))
    if not isinstance(table, list) or len(table) != length:
        raise PieceError(piece, f"gave the table {table!r}: {length} blocks are due")
    for block in table:
        if not isinstance(block, int) or block not in blocks:
            raise PieceError(
                piece, f"gave block {block!r}: there are 0 to {len(blocks) - 1}"
            )
    if len(set(table)) != length:
        raise PieceError(piece, f"gave the table {table}: a block stands in it twice")


def _check_available(piece: str, pool: Pool, table: Sequence[int]) -> None:
    """What stands in a table can be given to nobody else."""
    twice = set(table) & set(pool.available)
    if twice:
        raise PieceError(piece, f"left {sorted(twice)} available while they are in use")


def _impossible(
    plan: Plan,
    running: Sequence[Job],
    waiting: Sequence[Job],
    available: int,
    limits: Limits,
) -> str:
    """Why a plan cannot be carried out; "" if it can."""
    jobs = {job.id: job for job in (*running, *waiting)}
    run = {job.id for job in running}
    wait = {job.id for job in waiting}
    if not isinstance(plan.tokens, dict):
        return "tokens must be a dictionary"
    unknown = {*plan.tokens, *plan.admitted, *plan.preempted} - set(jobs)
    if unknown:
        return f"there is no request {sorted(unknown)}"
    if not set(plan.preempted) <= run or len(set(plan.preempted)) < len(plan.preempted):
        return "preempted must be running requests, each once"
    if not set(plan.admitted) <= wait or len(set(plan.admitted)) < len(plan.admitted):
        return "admitted must be waiting requests, each once"
    if set(plan.tokens) & set(plan.preempted):
        return "a request is sent away and gets tokens"
    if set(plan.tokens) & wait != set(plan.admitted):
        return "a waiting request gets tokens if it is admitted, and only then"
    for id, count in plan.tokens.items():
        if not isinstance(count, int) or not 1 <= count <= jobs[id].left:
            return f"request {id} gets {count!r} tokens and has {jobs[id].left} left"
        if not limits.chunked and id in wait and count < jobs[id].left:
            return f"request {id} gets a part of its prompt, with chunked=False"
    if sum(plan.tokens.values()) > limits.max_tokens:
        return f"more than max_tokens={limits.max_tokens}"
    if len(run) - len(plan.preempted) + len(plan.admitted) > limits.max_sequences:
        return f"more than max_sequences={limits.max_sequences}"
    size = limits.block_size
    needed = sum(blocks_needed(jobs[id], n, size) for id, n in plan.tokens.items())
    back = sum(jobs[id].own for id in plan.preempted)
    if needed > available + back:
        return f"it needs {needed} blocks, and there are {available} + {back}"
    if not plan.tokens and not plan.preempted:
        return "nobody gets a token, so nothing would ever end"
    return ""
