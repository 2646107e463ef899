"""What stands between a check and the learner's function.

It finds calls that do not fit and inputs changed in place, and words errors in the
learner's terms.
"""

from __future__ import annotations

import copy
import dis
import inspect
import linecache
import traceback
from collections.abc import Iterable, Mapping
from functools import update_wrapper
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor

from llmlab.course.grading.diagnosis import Mistake, describe
from llmlab.course.grading.gradients import Call, copied, cut, fits

PACKAGE = str(Path(__file__).resolve().parents[2])


def guarded(
    answer: Any,
    exercise: str,
    watch: bool = True,
    grads: Mapping[str, int] | None = None,
) -> Any:
    """`answer` with its calls checked, when it is a function.

    Classes and objects are given to the check as they are.

    Args:
        watch: whether changing an argument in place is a mistake.
        grads: name → position of the arguments that a gradient must reach.
    Raises:
        Mistake: `answer` cannot be called; later, when called: it takes other
            arguments, or changed one in place.
    """
    if not callable(answer):
        raise Mistake(
            f"`{exercise}` is {describe(answer)}, where a function is asked:"
            " was its name used for a value?"
        )
    if not isinstance(answer, FunctionType):
        return answer
    return _Guarded(answer, exercise, watch, grads or {})


def lost_gradient(answer: Any) -> str | None:
    """What is wrong with the gradient of a guarded answer whose values are right.

    None when nothing is, or when no gradient is asked for.
    """
    if not isinstance(answer, _Guarded) or answer.call is None:
        return None
    return cut(answer.__wrapped__, answer.call, answer.grads)


class _Guarded:
    def __init__(
        self,
        answer: FunctionType,
        exercise: str,
        watch: bool,
        grads: Mapping[str, int],
    ) -> None:
        update_wrapper(self, answer)
        self._answer = answer
        self._name = exercise if answer.__name__ == "<lambda>" else answer.__name__
        self._watch = watch
        self.grads = grads
        self.call: Call | None = None  # the first whose gradient can be looked at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        if self.grads and self.call is None and fits(args, self.grads):
            self.call = Call([copied(a) for a in args], copied(kwargs))
        before = {}
        if self._watch:
            before = {name: snapshot(value) for name, value in arguments.items()}
        try:
            result = self._answer(*args, **kwargs)
        except Exception as error:
            error._llmlab_call = _called(self._name, arguments)  # type: ignore[attr-defined]
            raise
        for name, value in before.items():
            if not unchanged(value, arguments[name]):
                raise Mistake(
                    f"{self._name} changes its argument `{name}` in place:"
                    " work on a copy, callers still need it"
                )
        return result

    def _bind(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        signature = inspect.signature(self._answer)
        try:
            return dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            given = [_short(a) for a in args]
            given += [f"{k}={_short(v)}" for k, v in kwargs.items()]
            call = f"{self._name}({', '.join(given)})"
            raise Mistake(
                f"{self._name}{signature} cannot be called as {call}: {error}."
                " Keep the arguments that the exercise gives"
            ) from None


def snapshot(value: Any) -> Any:
    """A copy to compare with later; None for objects that are not copied.

    Tensors and arrays are copied, and lists, tuples and dicts of them.
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
        if before.shape != now.shape or before.dtype != now.dtype:
            return False
        return _same_values(before, now.detach())
    if isinstance(before, np.ndarray):
        return before.shape == now.shape and _same_values(before, now)
    if isinstance(before, list):
        return len(before) == len(now) and all(
            unchanged(b, n) for b, n in zip(before, now, strict=True)
        )
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(
            unchanged(before[k], now[k]) for k in before
        )
    return before is None or before == now


def _same_values(a: Any, b: Any) -> bool:
    """Whether all values are equal; NaN equals NaN here."""
    both_nan = (a != a) & (b != b)
    return bool(((a == b) | both_nan).all())


def _short(value: Any) -> str:
    """A value in a few characters: a tensor by its shape."""
    if isinstance(value, Tensor | np.ndarray):
        return describe(value).removeprefix("a ")
    text = repr(value)
    return text if len(text) <= 40 else describe(value)


def _called(name: str, arguments: dict[str, Any]) -> str:
    given = ", ".join(f"{k}={_short(v)}" for k, v in arguments.items())
    return f"{name}({given})"


def unwritten(error: BaseException, answers: Iterable[Any]) -> str | None:
    """What to say when `error` comes from a stub that is still there; else None.

    A stub is a `raise` of NotImplementedError in an answer's own code, or in another
    function of theirs that it calls. torch raises the same error for a dtype that it
    cannot handle, and a class for a method that is missing: those are errors.
    """
    if not isinstance(error, NotImplementedError) or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return None  # raised inside of something that this line calls
    if code in _codes(answers):
        return str(error)
    in_notebook = last.tb_frame.f_globals.get("__name__") == "__main__"
    if in_notebook and code.co_qualname == code.co_name and not str(error):
        return f"it calls `{code.co_name}`, which is not done yet"
    return None


def _codes(answers: Iterable[Any]) -> list[CodeType]:
    """The code of the answers, and of the methods of those that are classes."""
    functions: list[Any] = []
    for answer in answers:
        functions += vars(answer).values() if isinstance(answer, type) else [answer]
    return [f.__code__ for f in functions if isinstance(f, FunctionType)]


def learners_error(error: BaseException) -> tuple[str, str]:
    """What an exception in the learner's code was, and where: (message, detail).

    No frame of the course's own code is shown.

    Without a frame of theirs, the check tripped over what they returned; that is said
    instead.
    """
    theirs = []
    for frame in traceback.extract_tb(error.__traceback__):
        is_library = "site-packages" in frame.filename
        if not is_library and not frame.filename.startswith((PACKAGE, "<frozen")):
            theirs.append(frame)
    call = getattr(error, "_llmlab_call", "")
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    if not theirs and not call:
        return f"the check cannot work with what your answer returned ({text})", ""
    lines = [f"called as {call}"] if call else []
    for frame in theirs[-3:]:
        line = frame.line
        if not line:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        lines.append(f"line {frame.lineno}, in {frame.name}: {line}")
    return text[:2000], "\n".join(lines)
