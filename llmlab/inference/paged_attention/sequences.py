"""Sequences by number: what block managers of any kind keep of them."""

from __future__ import annotations

from collections.abc import Sequence


class Sequences:
    """Each sequence with its tokens and its table.

    Attributes:
        tables: number → where its tokens lie.
        tokens: number → its tokens.
    """

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self._next = 0

    def _enter(self, table: Sequence[int], tokens: Sequence[int]) -> int:
        """A new sequence; returns its number."""
        sequence = self._next
        self._next += 1
        self.tables[sequence] = list(table)
        self.tokens[sequence] = list(tokens)
        return sequence

    def _leave(self, sequence: int) -> list[int]:
        """The sequence is gone; returns its table."""
        self._known(sequence)
        del self.tokens[sequence]
        return self.tables.pop(sequence)

    def _known(self, sequence: int) -> list[int]:
        """Its tokens.

        Raises:
            ValueError: there is no such sequence.
        """
        if sequence not in self.tokens:
            raise ValueError(
                f"sequence={sequence} is not known: these are {sorted(self.tokens)}"
            )
        return self.tokens[sequence]

    def _to_cut(self, sequence: int, length: int) -> list[int]:
        """Its tokens, of which the first `length` are to stay.

        Raises:
            ValueError: fewer than one token, or more than there are.
        """
        tokens = self._known(sequence)
        if not 1 <= length <= len(tokens):
            raise ValueError(
                f"length={length} must lie between 1 and the {len(tokens)} tokens of"
                f" sequence {sequence}"
            )
        return tokens


def check_prompt(tokens: Sequence[int]) -> None:
    """Raises ValueError where there is no token."""
    if len(tokens) == 0:
        raise ValueError("tokens is empty: a sequence has at least one token")
