"""Saying what is wrong with an answer, without saying the right one.

`expect` judges the kind of thing that came back (None, a float, a wrong shape, NaN),
`close` whether two values are equal up to rounding, `diagnose` names the mistake: first
those that the exercise foresaw, then the usual ways in which a tensor is nearly right
(a factor, a transpose, one wrong row, …).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmlab.course.grading.closeness import as_tensor, close
from llmlab.course.grading.resemblance import resemblances


class Mistake(Exception):
    """What is wrong with an answer, in words for the learner.

    `foreseen` is False where only the value was looked at, not how it may have come
    about.
    """

    def __init__(self, message: str, foreseen: bool = True) -> None:
        super().__init__(message)
        self.foreseen = foreseen


def is_number(x: Any) -> bool:
    """A plain Python (or NumPy) number; True and False do not count."""
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def _shape(x: Tensor | np.ndarray) -> str:
    return f"({', '.join(map(str, x.shape))}{',' if x.ndim == 1 else ''})"


def describe(x: Any) -> str:
    """What kind of thing `x` is, as in 'a float32 tensor of shape (2, 3)'."""
    if x is None:
        return "None"
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {_shape(x)}"
    if isinstance(x, np.ndarray):
        return f"a NumPy array of shape {_shape(x)}"
    if isinstance(x, list | tuple | dict | set):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, str):
        return f"a text of {len(x)} characters"
    article = "an" if type(x).__name__[0] in "aeiou" else "a"
    return f"{article} {type(x).__name__}"


def expect(
    value: Any,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | None = None,
    kind: type | tuple[type, ...] | None = None,
    what: str = "your answer",
    finite: bool = True,
) -> Any:
    """`value` itself when it is the kind of thing that was asked for.

    Args:
        shape: the tensor's shape; None stands for any size.
        dtype: the tensor's dtype.
        kind: for answers that are not tensors: `float` (an int is as good), `int`,
            `list`, a class, or several.
        what: how the learner would name the value, as in "lora_forward(x)".
        finite: whether NaN and infinity are mistakes.
    Raises:
        Mistake: it is something else; the message says what, and what was asked.
    """
    if value is None:
        raise Mistake(f"{what} returned None: is there a `return` at its end?")
    if kind is not None:
        _expect_kind(value, kind, what)
    if shape is not None or dtype is not None:
        _expect_tensor(value, shape, dtype, what)
    if finite:
        _expect_finite(value, what)
    return value


def _expect_kind(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if (
        good
        or (float in kinds and is_number(value))
        or (int in kinds and isinstance(value, np.integer))
    ):
        return
    names = " or ".join(k.__name__ for k in kinds)
    one = isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1
    cure = (
        ": `.item()` makes a Python number of it"
        if one and {int, float} & set(kinds)
        else ""
    )
    if int in kinds and isinstance(value, float):
        cure = ": an integer division is `//`, and `math.ceil` rounds up"
    raise Mistake(
        f"{what} is {describe(value)}, where {describe_kind(names)} is asked{cure}"
    )


def describe_kind(names: str) -> str:
    """'a float', 'an int'."""
    return f"{'an' if names[0] in 'aeiou' else 'a'} {names}"


def _expect_tensor(
    value: Any, shape: tuple | None, dtype: torch.dtype | None, what: str
) -> None:
    if not isinstance(value, Tensor):
        cure = (
            ": keep to torch, or use `torch.from_numpy`"
            if isinstance(value, np.ndarray)
            else ""
        )
        raise Mistake(f"{what} is {describe(value)}, where a tensor is asked{cure}")
    if shape is not None and not _fits(value.shape, shape):
        asked = _asked_shape(shape)
        raise Mistake(
            f"{what} has shape {_shape(value)}, where {asked} is"
            f" asked{_shape_cure(value.shape, shape)}",
            foreseen=False,
        )
    if dtype is not None and value.dtype != dtype:
        got, asked = (str(d).removeprefix("torch.") for d in (value.dtype, dtype))
        raise Mistake(f"{what} has dtype {got}, where {asked} is asked")


def _asked_shape(shape: tuple[int | None, ...]) -> str:
    sizes = ["any" if size is None else str(size) for size in shape]
    comma = "," if len(shape) == 1 else ""
    return f"({', '.join(sizes)}{comma})"


def _fits(got: tuple[int, ...], asked: tuple[int | None, ...]) -> bool:
    return len(got) == len(asked) and all(
        a in (None, g) for g, a in zip(got, asked, strict=True)
    )


def _shape_cure(got: tuple[int, ...], asked: tuple[int | None, ...]) -> str:
    got, asked = tuple(got), tuple(asked)
    if len(got) == len(asked) >= 2:
        for i, j in itertools.combinations(range(len(got)), 2):
            swapped = list(got)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            if _fits(tuple(swapped), asked):
                return f": dimensions {i} and {j} are swapped"
    if len(got) == len(asked) + 1 and 1 in got:
        return ": there is a dimension of size 1 too many"
    if math.prod(got) == math.prod(a or 0 for a in asked):
        return ": the number of elements is right, their arrangement is not"
    if len(got) == len(asked) - 1:
        return (
            ": one dimension is missing; was it summed or indexed away, or is"
            " `keepdim=True` wanted?"
        )
    return ""


def _expect_finite(value: Any, what: str) -> None:
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise Mistake(f"{what} is {value}, not a finite number")
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        for name, bad in (("NaN", value.isnan()), ("infinity", value.isinf())):
            if bad.any():
                raise Mistake(
                    f"{what} holds {name} in {int(bad.sum())} of {value.numel()}"
                    " places",
                    foreseen=False,
                )
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _expect_finite(item, f"{what}[{i}]")


def diagnose(
    got: Any,
    *,
    right: Any,
    mistakes: Mapping[str, Any | Callable[[], Any]] | None = None,
    tol: float = 1e-5,
    what: str = "your answer",
    parts: Mapping[str, Any] | None = None,
    terms: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Returns when `got` is close to `right`; else says what the mistake was.

    Args:
        mistakes: diagnosis → the value that this mistake leads to, or a function
            without arguments that computes it.
        tol: how far each element may be off, relative to its size and the mean size.
        parts: name → index, where the check joined several tensors of the answer: what
            is generally said is said of the first of them that is wrong.
        terms: ways to see `right` as a sum, name → term: where the answer is a sum of
            the same terms, it is said which of them is missing, or too large.
    Raises:
        Mistake: the first foreseen mistake that leads to `got`; else what is generally
            recognised; else by how much it differs. The right value is never told.
    """
    if close(got, right, tol):
        return
    for diagnosis, value in (mistakes or {}).items():
        if close(got, value() if callable(value) else value, tol):
            raise Mistake(diagnosis)
    for one_way in terms:
        text = wrong_terms(got, one_way, tol)
        if text:
            raise Mistake(f"{what}: {text}", foreseen=False)
    for name, index in (parts or {}).items():
        if not close(got[index], right[index], tol):
            text = difference(got[index], right[index], tol, name)
            raise Mistake(text, foreseen=False)
    raise Mistake(difference(got, right, tol, what), foreseen=False)


def wrong_terms(got: Any, terms: Mapping[str, Tensor], tol: float) -> str | None:
    """Which terms of a sum have a wrong factor; None when `got` is no such sum."""
    g = as_tensor(got)
    if g is None:
        return None
    columns = [as_tensor(t).double().expand(g.shape).flatten() for t in terms.values()]
    table = torch.stack(columns, 1)  # [numbers, terms]
    numbers, count = table.shape
    if numbers < count + 3 or torch.linalg.matrix_rank(table) < count:
        return None
    values = g.double().flatten()
    if not values.isfinite().all():
        return None
    factors = torch.linalg.lstsq(table, values[:, None]).solution
    if not close((table @ factors)[:, 0], values, tol):
        return None
    if float(factors.max() - factors.min()) < 1e-3 * float(factors.abs().max()):
        return None  # one factor for all, which is said of the whole
    wrong = []
    for name, factor in zip(terms, factors[:, 0].tolist(), strict=True):
        phrase = _wrong_factor(factor, max(1e-3, 3 * tol))
        if phrase:
            wrong.append(f"{name} {phrase}")
    return "; ".join(wrong) or None


def _wrong_factor(factor: float, tol: float) -> str:
    """What a factor that should be 1 does to a term; "" where it is 1."""
    if abs(factor - 1) < tol:
        return ""
    if abs(factor) < tol:
        return "is missing"
    sign = " and has the wrong sign" if factor < 0 else ""
    size = abs(factor)
    if abs(size - 1) < tol:
        return "has the wrong sign"
    if size > 1:
        return f"is {size:.4g} times too large{sign}"
    return f"is {1 / size:.4g} times too small{sign}"


def difference(got: Any, right: Any, tol: float, what: str) -> str:
    """In what way `got` differs from `right`, in one sentence."""
    if isinstance(right, list | tuple) and isinstance(got, list | tuple):
        if len(got) != len(right):
            return f"{what} holds {len(got)} items, where {len(right)} are asked"
        pairs = dict(enumerate(zip(got, right, strict=True)))
        return _difference_of_items(pairs, tol, what)
    if isinstance(right, Mapping) and isinstance(got, Mapping):
        missing = len(right.keys() - got.keys())
        extra = len(got.keys() - right.keys())
        if missing or extra:
            return f"{what} has {missing} of its keys missing and {extra} too many"
        pairs = {key: (got[key], right[key]) for key in right}
        return _difference_of_items(pairs, tol, what)
    if isinstance(got, str) and isinstance(right, str):
        return _difference_of_texts(got, right, what)
    g, r = as_tensor(got), as_tensor(right)
    if g is None or r is None:
        if type(got) is type(right):
            return f"{what} is {describe(got)}, and not the right one"
        return f"{what} is {describe(got)}, where {describe(right)} is asked"
    if g.shape != r.shape:
        cure = _shape_cure(g.shape, r.shape)
        return f"{what} has shape {_shape(g)}, where {_shape(r)} is asked{cure}"
    return next(resemblances(g, r, tol, what))


def _difference_of_items(pairs: dict[Any, tuple], tol: float, what: str) -> str:
    """What is wrong with the first item that differs; `pairs` holds (got, right)."""
    for key, (got, right) in pairs.items():
        if not close(got, right, tol):
            return difference(got, right, tol, f"{what}[{key!r}]")
    return f"{what} differs"


def _difference_of_texts(got: str, right: str, what: str) -> str:
    """Up to where a text is right, with what stands around that place."""
    same = 0
    while same < min(len(got), len(right)) and got[same] == right[same]:
        same += 1
    around = got[max(0, same - 12) : same + 12]
    return (
        f"{what} is right up to character {same} of {len(got)}; from there it differs"
        f" (…{around!r}…)"
    )
