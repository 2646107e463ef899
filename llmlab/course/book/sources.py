"""`show(thing)` displays the reference source straight from the package.

So a lesson never holds a copy of it.
"""

from __future__ import annotations

import html
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any


def show(*objects: Any) -> None:
    """Displays the source of functions, classes or modules, highlighted.

    Each stands under its path in the package.

    The output holds no line numbers and no absolute path: it changes only when the
    source does.

    Raises:
        ValueError: nothing was given, or an object has no Python source.
    """
    if not objects:
        raise ValueError("show() needs at least one function, class or module")
    from IPython.display import display

    for thing in objects:
        where, source = _source(thing)
        data = {"text/html": _html(where, source), "text/plain": f"# {where}\n{source}"}
        display(data, raw=True)


def _source(thing: Any) -> tuple[str, str]:
    """('llmlab/peft/lora.py', its text without the common indent)."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if isinstance(thing, property):
        thing = thing.fget
    try:
        source = inspect.getsource(thing)
        file = inspect.getfile(thing)
    except (TypeError, OSError):
        raise ValueError(
            "show() needs functions, classes or modules written in Python,"
            f" not {thing!r}"
        ) from None
    module = inspect.getmodule(thing)
    name = module.__name__ if module else "__main__"
    top = name.split(".")[0]
    package = importlib.import_module(top)
    if top == "__main__" or not getattr(package, "__file__", None):
        where = "this notebook"
    else:
        home = Path(package.__file__).resolve().parent
        where = (Path(top) / Path(file).resolve().relative_to(home)).as_posix()
    return where, textwrap.dedent(source).rstrip("\n")


def _html(where: str, source: str) -> str:
    """The source as HTML, with the classes of Pygments.

    JupyterLab and the book both colour them for their light and dark themes.
    """
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    formatter = HtmlFormatter(cssclass="highlight", wrapcode=False)
    code = highlight(source, PythonLexer(), formatter).rstrip()
    return (
        '<div class="llmlab-source"><p style="margin:0.4em 0 0.3em">'
        f"<code>{html.escape(where)}</code></p>{code}</div>"
    )
