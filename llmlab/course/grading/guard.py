"""Between a check and the learner's function: calls that do not fit, inputs changed in
place, errors told as theirs.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import traceback
from functools import update_wrapper
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor

from llmlab.course.grading.diagnosis import Mistake, describe

PACKAGE = str(Path(__file__).resolve().parents[2])


def guarded(answer: Any, exercise: str, watch: bool = True) -> Any:
    """`answer` with its calls checked, when it is a function; classes and objects are
    given to the check as they are.

    Args:
        watch: whether changing an argument in place is a mistake.
    Raises:
        Mistake: `answer` cannot be called; later, when called: it takes other
            arguments, or changed one in place.
    """
    if not callable(answer):
        raise Mistake(
            f"`{exercise}` is {describe(answer)}, where a function is asked: was its"
            " name used for a value?"
        )
    return (
        _Guarded(answer, exercise, watch)
        if isinstance(answer, FunctionType)
        else answer
    )


class _Guarded:
    def __init__(self, answer: FunctionType, exercise: str, watch: bool) -> None:
        update_wrapper(self, answer)
        self._answer, self._name, self._watch = (
            answer,
            answer.__name__ if answer.__name__ != "<lambda>" else exercise,
            watch,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        before = (
            {name: snapshot(value) for name, value in arguments.items()}
            if self._watch
            else {}
        )
        try:
            result = self._answer(*args, **kwargs)
        except Exception as error:
            error._llmlab_call = _called(self._name, arguments)  # type: ignore[attr-defined]
            raise
        for name, value in before.items():
            if not unchanged(value, arguments[name]):
                raise Mistake(
                    f"{self._name} changes its argument `{name}` in place: work on a"
                    " copy, callers still need it"
                )
        return result

    def _bind(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        signature = inspect.signature(self._answer)
        try:
            return dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            given = [_short(a) for a in args] + [
                f"{k}={_short(v)}" for k, v in kwargs.items()
            ]
            raise Mistake(
                f"{self._name}{signature} cannot be called as"
                f" {self._name}({', '.join(given)}): {error}. Keep the arguments that"
                " the exercise gives"
            ) from None


def snapshot(value: Any) -> Any:
    """A copy to compare with later: of tensors, arrays, and lists, tuples and dicts of
    them; None for other objects.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list | tuple):
        return [snapshot(v) for v in value]
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return copy.copy(value) if isinstance(value, set | bytearray) else None


def unchanged(before: Any, now: Any) -> bool:
    """Whether `now` still is what `snapshot` saw."""
    if isinstance(before, Tensor):
        same = before.shape == now.shape and before.dtype == now.dtype
        return same and bool(
            ((before == now.detach()) | ((before != before) & (now != now))).all()
        )
    if isinstance(before, np.ndarray):
        return before.shape == now.shape and bool(
            ((before == now) | ((before != before) & (now != now))).all()
        )
    if isinstance(before, list):
        return len(before) == len(now) and all(
            unchanged(b, n) for b, n in zip(before, now, strict=True)
        )
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(
            unchanged(before[k], now[k]) for k in before
        )
    return before is None or before == now


def _short(value: Any) -> str:
    """A value in a few characters: a tensor by its shape."""
    if isinstance(value, Tensor | np.ndarray):
        return describe(value).removeprefix("a ")
    text = repr(value)
    return text if len(text) <= 40 else describe(value)


def _called(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"


def learners_error(error: BaseException) -> tuple[str, str]:
    """What an exception in the learner's code was, and where: (message, detail) without
    a frame of ours.

    Without a frame of theirs, the check tripped over what they returned; that is said
    instead.
    """
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(PACKAGE)
    ]
    theirs = [
        f
        for f in frames
        if "site-packages" not in f.filename and not f.filename.startswith("<frozen")
    ]
    call = getattr(error, "_llmlab_call", "")
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    if not theirs and not call:
        return f"the check cannot work with what your answer returned ({text})", ""
    lines = [f"called as {call}"] if call else []
    for frame in theirs[-3:]:
        line = (
            frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
        )
        lines.append(f"line {frame.lineno}, in {frame.name}: {line}")
    return text[:2000], "\n".join(lines)
