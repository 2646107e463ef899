"""Marks an exercise inside the kernel that ran a learner's notebook.

`llmlab check` puts calls of `mark` into the copy that it runs.

The learner's cells ran in this process and may have replaced anything. So this file is
run from disk (`runpy`), loads the checks afresh from disk, refuses a kernel in which
the course's functions were replaced, and signs what it says with the number that the
grader drew for this one cell, which came with the request to run it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

MIME = "application/vnd.llmlab.verdict+json"


def mark(
    module: str,
    exercise: str,
    names: dict[str, Any],
    expression: str,
    seed: int = 0,
) -> None:
    """Marks the objects that `expression` names, and publishes the verdict.

    The names are looked up in the learner's namespace.

    Args:
        module: the lesson's checks, as in "llmlab.checks.peft.lora".
        names: the learner's globals.
        expression: what the check cell hands over, as in "(lora_forward,)".

    Raises:
        AssertionError: the verdict is not "right", so that nbval's and ours are one.
    """
    verdict = {"exercise": exercise, "token": take_number()}
    verdict |= _judge(module, exercise, names, expression, seed)
    publish(verdict)
    if verdict["outcome"] != "right":
        raise AssertionError(f"{exercise}: {verdict['outcome']}")


def _judge(
    module: str, exercise: str, names: dict[str, Any], expression: str, seed: int
) -> dict[str, Any]:
    replaced = replaced_functions()
    if replaced:
        message = (
            f"the notebook replaces {replaced[0]}: take that out, and its kernel is"
            " fair again"
        )
        return {"outcome": "tampered", "message": message}
    try:
        answers = eval(expression, dict(names))
    except NameError as error:
        message = _missing(error.name or exercise, names)
        return {"outcome": "missing", "message": message}
    check = fresh(module).check
    try:
        verdict = check.exercises[exercise].verdict(*answers, seed=seed)
    except KeyboardInterrupt:
        message = "it was stopped while the check ran your function"
        return {"outcome": "timeout", "message": message}
    return {
        "outcome": verdict.outcome,
        "message": verdict.message,
        "detail": verdict.detail,
    }


def hidden(
    module: str, exercise: str, *answers: Any, seeds: tuple[int, ...] = (1, 2, 3)
) -> None:
    """The same check on other inputs: what an nbgrader submission meets, unseen.

    Raises:
        AssertionError: the answer fails, or the course's code was replaced.
    """
    replaced = replaced_functions()
    if replaced:
        raise AssertionError(f"{exercise}: the notebook replaces {replaced[0]}")
    marks = fresh(module)
    for seed in seeds:
        verdict = marks.check.exercises[exercise].verdict(*answers, seed=seed)
        if verdict.outcome != "right":
            raise AssertionError(str(verdict))


def _missing(name: str, names: dict[str, Any]) -> str:
    own = []  # the functions and classes that the notebook defines
    for key, value in names.items():
        is_definition = isinstance(value, FunctionType | type)
        if is_definition and getattr(value, "__module__", "") == "__main__":
            own.append(key)
    message = f"the notebook does not define `{name}`"
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
    if near:
        message += f": did you rename it to `{near[0]}`?"
    return message


def fresh(module: str) -> ModuleType:
    """The module of checks, read from disk anew.

    The course's modules that it marks with are read anew, too, with torch as it is
    at its start: the learner's default dtype reaches none of their tensors.
    """
    for name in list(sys.modules):
        if name.startswith(("llmlab.checks.", "llmlab.course.")):
            del sys.modules[name]
    state = importlib.import_module("llmlab.course.grading.state")
    with state.neutral():
        return importlib.import_module(module)


def replaced_functions() -> list[str]:
    """The functions of loaded llmlab modules that are not those in their files."""
    out = []
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not name.startswith("llmlab.") or not path or not path.endswith(".py"):
            continue
        for key in _defined(path):
            if not _from_file(getattr(module, key, None), path):
                out.append(f"{name}.{key}")
    return out


def _defined(path: str) -> list[str]:
    """The undecorated functions that a file defines at its top level."""
    import ast

    with open(path, encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    out = []
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            out.append(node.name)
    return out


def _from_file(thing: Any, path: str) -> bool:
    if not callable(thing):
        return False
    code: Callable = inspect.unwrap(thing)
    return not isinstance(code, FunctionType) or code.__code__.co_filename == path


def take_number() -> str:
    """The number that came with this request; it is taken out of the message."""
    from IPython.core.interactiveshell import InteractiveShell

    request = InteractiveShell.instance().get_parent()
    return request.get("metadata", {}).pop("llmlab_number", "")


def publish(verdict: dict[str, Any]) -> None:
    """Shows the verdict as an output of the cell, past whatever became of `print`."""
    from IPython.core.interactiveshell import InteractiveShell

    verdict = {key: _sendable(value) for key, value in verdict.items()}
    data = {MIME: verdict, "text/plain": str(verdict.get("outcome"))}
    publisher = InteractiveShell.instance().display_pub
    # the class's own method: the learner may have replaced the instance's
    type(publisher).publish(publisher, data=data, metadata={})


def _sendable(value: Any) -> Any:
    """A text without lone surrogates, which no message to the grader can hold."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode("utf-8")
