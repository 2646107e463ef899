"""Where an answer is wrong: the one change in the learner's own code that mends it.

A check foresees some mistakes, and `slips` finds those that a change of the worked
answer leads to. An answer written in another way is told from its own side: one place
of it is changed (another number, a factor more or less, another variable, a line in or
out of a loop, …) and the check is run again. Where that makes it right, the place and
the kind are said: "line 4, `range(p - 1)`: a border is off by one". What belongs there
is not shown.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import random
import textwrap
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch

from llmlab.course.grading.changes import Change, changes
from llmlab.course.grading.closeness import share
from llmlab.course.grading.diagnosis import Mistake
from llmlab.course.grading.slips import (
    plain_calls,
    result_of,
    worked_answer,
)
from llmlab.course.grading.state import neutral, silent

SECONDS = 5.0  # for all changes of an answer together
RUN = 1.0  # and for one of them
LIKELY = 2  # rounds of changes, of which any two are tried together
SECOND = 5  # rounds of changes for a second one
WRONG = 3  # calls, after which a change is given up
LARGE = 10**7  # a result that is longer is not made

Tree = ast.FunctionDef


def repaired(
    slug: str,
    exercise: str,
    run: Callable[[Callable], None],
    answer: Any,
    seed: int = 0,
) -> list[Change]:
    """The one or two changes in `answer` with which the check ends normally.

    Empty where none are found in time.

    Args:
        run: the exercise's check, of one answer.
    """
    tree = source_tree(answer)
    if tree is None:
        return []
    with silent(), neutral(seed):
        known, worked = worked_answer(slug, exercise) or ({}, None)
        judge = _Judge(run, answer, known.get(exercise))
        try:
            return _search(tree, worked, judge)
        except _TimeIsUp:
            return []


def _search(tree: Tree, worked: Tree | None, judge: _Judge) -> list[Change]:
    start = judge.reached(tree)
    if start is None:
        return []
    halves: list[tuple[float, Change, Tree]] = []
    for change in changes(tree, worked):
        reached = judge.reached(tree)
        if reached is None:
            return [change]
        if reached > start:
            halves.append((reached, change, copy.deepcopy(tree)))
    # without calls to compare, the whole check was run above
    for change in changes(tree, worked, LIKELY if judge.plain else 0):
        if judge.is_right(tree):
            return [change]
    halves.sort(key=lambda half: -half[0])
    for _, first, half in halves:
        for second in changes(half, worked, SECOND):
            if judge.reached(half) is None:
                return [first, second]
    for first in changes(tree, worked, LIKELY):
        half = copy.deepcopy(tree)
        for second in changes(half, worked, LIKELY):
            if judge.reached(half) is None:
                return [first, second]
    return []


def source_tree(answer: Any) -> Tree | None:
    """The code of a function; its line with `def` is line 1."""
    if not isinstance(answer, FunctionType):
        return None
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(answer))).body
    except (OSError, TypeError, SyntaxError):
        return None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return None
    tree = body[0]
    tree.decorator_list = []
    ast.increment_lineno(tree, 1 - tree.lineno)
    return tree


class _TimeIsUp(Exception):
    pass


class _TooLong(BaseException):
    """A change made a loop that does not end, or a number that is too large."""


class _Judge:
    """How far a check goes with a changed answer.

    Where the check's calls can be made again, their results are compared with those of
    the worked answer first: that is quicker than the check.
    """

    def __init__(
        self,
        run: Callable[[Callable], None],
        answer: FunctionType,
        worked: Callable | None,
    ) -> None:
        self.run = run
        self.end = time.monotonic() + SECONDS
        self.until = self.end
        self.states = _states()
        self.calls = 0
        names = {"math": math, "torch": torch, **answer.__globals__}
        names |= inspect.getclosurevars(answer).nonlocals
        names |= {"_tick": self.tick, "_ticking": self.ticking}
        self.names = names | {"_times": _times, "_power": _power}
        self.defaults = (answer.__defaults__, answer.__kwdefaults__)
        self.plain: list[tuple[list[Any], Any]] = []
        if worked is not None:
            calls = plain_calls(run, worked)
            self.plain = [(call, result_of(worked, call)) for call in calls]

    def tick(self, value: Any = None) -> Any:
        """Passes a value on, or ends a loop that takes too long."""
        if time.monotonic() > self.until:
            raise _TooLong
        return value

    def ticking(self, value: Any) -> Any:
        """Passes a call's result on; what `set` or `sum` would take in one go, without
        a look at the clock, has one in each step.
        """
        if type(value).__module__ == "itertools":
            return (self.tick(each) for each in value)
        if not isinstance(value, range):
            return value
        if abs(value.stop - value.start) > LARGE * abs(value.step):
            raise _TooLong
        return value

    def reached(self, tree: Tree) -> float | None:
        """How far the check comes with this code; None where it is right.

        Raises:
            _TimeIsUp: nothing more may be tried.
        """
        function = self._begun(tree)
        if function is None:
            return 0
        try:
            good = self._good_calls(function)
            if good < len(self.plain):
                return good
            checked = self._checked(function)
            return None if checked is None else good + checked
        except _TooLong:
            return 0

    def is_right(self, tree: Tree) -> bool:
        """Whether the check ends normally, though other values may be right, too."""
        function = self._begun(tree)
        try:
            return function is not None and self._checked(function) is None
        except _TooLong:
            return False

    def _begun(self, tree: Tree) -> Callable | None:
        """The function that code makes, and the clock set for it."""
        if time.monotonic() > self.end:
            raise _TimeIsUp
        self.until = min(time.monotonic() + RUN, self.end)
        return self._compiled(tree)

    def _good_calls(self, function: Callable) -> float:
        """The calls whose result is right; of those that are not, the share that is.

        Three that are wrong end the counting.
        """
        good = 0.0
        wrong = 0
        for call, right in self.plain:
            part = share(result_of(function, call), right)
            good += part
            wrong += part < 1
            if wrong == WRONG:
                break
        return good

    def _checked(self, function: Callable) -> int | None:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        answer.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        answer.__name__ = function.__name__
        self.calls = 0
        _put_back(self.states)
        try:
            self.run(answer)
        except Mistake:
            return self.calls
        except (Exception, SystemExit):
            return 0
        return None

    def _compiled(self, tree: Tree) -> FunctionType | None:
        module = ast.Module([bounded(tree)], type_ignores=[])
        own = dict(self.names)
        try:
            exec(compile(module, "<change>", "exec"), own)
        except Exception:
            return None
        function = own[tree.name]
        function.__defaults__, function.__kwdefaults__ = self.defaults
        return function


PLACE = {"lineno": 1, "col_offset": 0, "end_lineno": 1, "end_col_offset": 0}


def bounded(node: Any) -> Any:
    """A copy of code that looks at the clock in each round of a loop, at sizes, and
    at what calls give to loop over.
    """
    if isinstance(node, list):
        return [bounded(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    new = type(node)()
    for name in node._fields:
        setattr(new, name, bounded(getattr(node, name, None)))
    if isinstance(new, ast.While):
        new.test = _call("_tick", new.test)
    elif isinstance(new, ast.For):
        new.body = [ast.Expr(_call("_tick"), **PLACE), *new.body]
    elif isinstance(new, ast.comprehension):
        new.ifs = [_call("_tick", ast.Constant(True, **PLACE)), *new.ifs]
    elif isinstance(new, ast.BinOp) and isinstance(new.op, ast.Mult | ast.Pow):
        name = "_times" if isinstance(new.op, ast.Mult) else "_power"
        new = _call(name, new.left, new.right)
    elif isinstance(new, ast.Call):
        new = _call("_ticking", ast.Call(new.func, new.args, new.keywords, **PLACE))
    elif isinstance(new, ast.arguments):
        # they are the answer's own, and set later
        new.defaults = [ast.Constant(None, **PLACE) for _ in new.defaults]
        new.kw_defaults = [d and ast.Constant(None, **PLACE) for d in new.kw_defaults]
    elif isinstance(new, ast.arg):
        new.annotation = None
    elif isinstance(new, ast.FunctionDef):
        new.returns = None
    for name, value in PLACE.items():
        setattr(new, name, value)
    return new


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load(), **PLACE), [*args], [], **PLACE)


def _times(a: Any, b: Any) -> Any:
    for many, n in ((a, b), (b, a)):
        is_row = isinstance(many, list | tuple | str | bytes)
        if is_row and isinstance(n, int) and len(many) * n > LARGE:
            raise _TooLong
    return a * b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and b * a.bit_length() > 10_000:
        raise _TooLong
    return a**b


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _put_back(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
