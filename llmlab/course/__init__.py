"""What makes the package a course: sliders, figures, verdicts and `llmlab` itself.

A lesson opens with one line, `from llmlab.course import compare, explore, figure, plt,
show`. Each name is loaded when it is first asked for, so that `import llmlab.course`
stays light.
"""

import logging
from importlib import import_module

_HOMES = {
    "compare": "llmlab.course.comparing",
    "explore": "llmlab.course.sliders",
    "figure": "llmlab.course.figures",
    "palette": "llmlab.course.style",
    "plt": "llmlab.course.style",
    "predict": "llmlab.course.predicting",
    "show": "llmlab.course.book.sources",
    "steps": "llmlab.course.steppers",
    "your_turn": "llmlab.course.turn",
}
__all__ = list(_HOMES)

# Where a CPU has AVX-512-BF16, bitsandbytes, which peft imports, warns that an optional
# package is missing. The course needs none of it, and a page must not differ by CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
