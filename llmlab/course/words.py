"""Small helpers for sentences."""

from __future__ import annotations

from collections.abc import Sequence


def listed(words: Sequence[object], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'; `last` is the word before the last one."""
    texts = [str(word) for word in words]
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def did_you_mean(near: Sequence[object]) -> str:
    """'Did you mean a or b? ', to go before the next sentence; '' for none."""
    return f"Did you mean {listed(near, 'or')}? " if near else ""
