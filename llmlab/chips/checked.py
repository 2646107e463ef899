"""Numbers that cannot be: refused by name."""

from __future__ import annotations

import math


def positive(**values: float) -> None:
    """Nothing, if all are above 0 and finite.

    Raises:
        ValueError: the first that is not, by its name.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0, and finite")


def not_negative(**values: float) -> None:
    """Nothing, if all are at least 0 and finite.

    Raises:
        ValueError: the first that is not, by its name.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must not be negative, and be finite")


def share(**values: float) -> None:
    """Nothing, if all are above 0 and at most 1.

    Raises:
        ValueError: the first that is not, by its name.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is a share: above 0, and at most 1")


def counts(least: int = 1, **values: int) -> None:
    """Nothing, if all are whole numbers of at least `least`.

    Raises:
        ValueError: the first that is not, by its name.
    """
    for name, value in values.items():
        if not (value % 1 == 0 and value >= least):
            raise ValueError(f"{name}={value} must be a whole number, at least {least}")


def overhead(pue: float) -> None:
    """Nothing, if it is a power usage effectiveness.

    Raises:
        ValueError: it is below 1: a building cannot take less than what is in it.
    """
    if not 1 <= pue < math.inf:
        raise ValueError(
            f"pue={pue} must be at least 1: what the building takes, over what its"
            " computers take"
        )
