"""What a figure that moves brings into the page with it: style, script, data.

They stand in the output itself, since a notebook and a book fetch nothing.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"


def style(name: str) -> str:
    """The style sheet `static/<name>`, on one line."""
    return " ".join((STATIC / name).read_text(encoding="utf-8").split())


def script(name: str) -> str:
    """The script `static/<name>`."""
    return (STATIC / name).read_text(encoding="utf-8").strip()


def heading(title: str) -> str:
    """The line above a figure; nothing where there is no title."""
    return f'<p class="llmlab-title">{html.escape(title)}</p>' if title else ""


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "\\u003c!--")
