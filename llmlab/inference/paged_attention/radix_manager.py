"""Sequences whose prefixes are found in a radix tree: what SGLang does with its memory.

It stands in the place of a `BlockManager` with blocks of one token, so that
`PagedCache` and all that runs on it work as they are. Prompts are found token by token,
not block by block; two sequences that store the same text end up in the same places;
what nobody reads stays in the tree until its room is needed.

    table      the places of a sequence's tokens
    stored     how many of its tokens have their keys and values there
    node       where its text ends in the tree; locked, so that nothing above it goes

Zheng et al. 2023, https://arxiv.org/abs/2312.07104, section 3. As there, a text enters
the tree when its prompt has been computed, and once more when the sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmlab.inference.paged_attention.blocks import OutOfBlocks
from llmlab.inference.paged_attention.radix import Node, RadixTree, path
from llmlab.inference.paged_attention.sequences import Sequences, check_prompt


@dataclass
class Held:
    """What a sequence holds of the tree, beside its tokens and its table."""

    node: Node
    stored: int  # tokens with keys and values
    inserted: int = 0  # of these, those that lie in the tree


class RadixManager(Sequences):
    """A `BlockManager` whose blocks hold one token, and whose index is a tree.

    Raises:
        ValueError: no place at all.
    """

    block_size = 1

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        super().__init__()
        self.num_blocks = num_blocks
        self.tree = RadixTree()
        self.available = list(range(num_blocks))
        self._held: dict[int, Held] = {}

    @property
    def used(self) -> int:
        """Places that stand in a table."""
        return len({place for table in self.tables.values() for place in table})

    def can_add(self, tokens: Sequence[int]) -> bool:
        """Whether there is room for this prompt, now or after leaves have gone."""
        places, node = self.tree.match(tokens[:-1])
        self.tree.lock(node)
        room = len(self.available) + self._evictable()
        self.tree.unlock(node)
        return len(tokens) - len(places) <= room

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence.

        Returns:
            Its number, and how many of its tokens are stored already. One at least is
            left over, to say what comes next.
        Raises:
            ValueError: no token.
            OutOfBlocks: not enough room. Nothing has changed then.
        """
        check_prompt(tokens)
        places, node = self.tree.match(tokens[:-1])
        self.tree.lock(node)  # first of all: else its places may be given away
        try:
            own = self._take(len(tokens) - len(places))
        except OutOfBlocks:
            self.tree.unlock(node)
            raise
        found = len(places)
        sequence = self._enter([*places, *own], tokens)
        self._held[sequence] = Held(node, stored=found, inserted=found)
        return sequence, found

    def append(self, sequence: int, token: int) -> None:
        """One token more. Places are never shared before they are full: no copy.

        Raises:
            OutOfBlocks: no room. Nothing has changed then.
        """
        tokens = self._known(sequence)
        self.tables[sequence] += self._take(1)
        tokens.append(token)

    def stored(self, sequence: int) -> None:
        """Keys and values of all its tokens are stored; a prompt can be found now."""
        length = len(self._known(sequence))
        held = self._held[sequence]
        in_prefill = held.stored == held.inserted
        held.stored = length
        # a token at a time would be an edge for each of them: the rest waits for `free`
        if in_prefill and held.stored - held.inserted > 1:
            self._insert(sequence)

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, in the same places.

        Raises:
            ValueError: its last tokens have no keys and values yet.
        """
        tokens = self._known(sequence)
        if self._held[sequence].stored < len(tokens):
            raise ValueError(
                f"sequence={sequence} has {len(tokens)} tokens, and only"
                f" {self._held[sequence].stored} are stored: compute them first"
            )
        self._insert(sequence)
        held = self._held[sequence]
        self.tree.lock(held.node)
        again = self._enter(self.tables[sequence], tokens)
        self._held[again] = replace(held)
        return again

    def truncate(self, sequence: int, length: int) -> None:
        """Only its first `length` tokens stay. Nothing is shared that may be written.

        What lies in the tree stays there: it is stored, and somebody may ask for it.

        Raises:
            ValueError: fewer than one token, or more than there are.
        """
        tokens = self._to_cut(sequence, length)
        held, table = self._held[sequence], self.tables[sequence]
        self.available += table[max(length, held.inserted) :]
        del table[length:], tokens[length:]
        held.stored = min(held.stored, length)
        if length < held.inserted:
            _, node = self.tree.match(tokens)
            self.tree.lock(node)
            self.tree.unlock(held.node)
            held.node, held.inserted = node, length

    def free(self, sequence: int) -> list[int]:
        """The sequence is gone. What it stored stays in the tree, and can be found.

        Returns:
            The places that have become available at once: those of tokens that were
            not stored, or that the tree had already.
        """
        self._known(sequence)
        before = len(self.available)
        self._insert(sequence)
        held = self._held.pop(sequence)
        self.tree.unlock(held.node)
        self.available += self._leave(sequence)[held.inserted :]
        return self.available[before:]

    def check(self) -> None:
        """What holds after every call.

        Raises:
            RuntimeError: it does not.
        """
        self.tree.check()
        in_tree = [place for node in self.tree.nodes() for place in node.places]
        own = [
            place
            for sequence, table in self.tables.items()
            for place in table[self._held[sequence].inserted :]
        ]
        if sorted(in_tree + own + self.available) != list(range(self.num_blocks)):
            raise RuntimeError("a place is lost, or has two owners")
        for sequence, held in self._held.items():
            inserted = [p for n in reversed(list(path(held.node))) for p in n.places]
            if inserted != self.tables[sequence][: held.inserted]:
                raise RuntimeError(f"sequence {sequence} and the tree do not agree")

    def _insert(self, sequence: int) -> None:
        """Its stored tokens lie in the tree from now on.

        Where the tree has some of them from another sequence, those places are taken,
        and its own come back.
        """
        held, table = self._held[sequence], self.tables[sequence]
        text = self.tokens[sequence][: held.stored]
        known = self.tree.insert(text, table[: held.stored])
        places, node = self.tree.match(text)
        self.available += table[held.inserted : known]  # double
        table[: held.stored] = places
        self.tree.lock(node)
        self.tree.unlock(held.node)
        held.node, held.inserted = node, held.stored

    def _take(self, count: int) -> list[int]:
        """Places that nobody has; leaves that nobody reads go if it must be.

        Raises:
            OutOfBlocks: there are not enough. Nothing has changed then.
        """
        lacking = count - len(self.available)
        if lacking > self._evictable():
            raise OutOfBlocks(
                f"{count} places are needed, and {len(self.available)} are available"
            )
        if lacking > 0:
            self.available += self.tree.evict(lacking)
        taken, self.available = self.available[:count], self.available[count:]
        return taken

    def _evictable(self) -> int:
        """Tokens in the tree that no running sequence reads."""
        return sum(len(node.tokens) for node in self.tree.nodes() if not node.locks)
