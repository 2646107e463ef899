"""The C file of this room as a library, made once on each machine.

Where there is no compiler, `library` says so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from llmlab.models import compiling
from llmlab.models.compiling import LONG, POINTER, NoCompiler

SOURCE = Path(__file__).parent / "products.c"
ARGUMENTS = {
    "matvec_4bit": [POINTER] * 5 + [LONG] * 3,
    "decode_4bit": [POINTER] * 4 + [LONG] * 3,
    "matvec_8bit": [POINTER] * 4 + [LONG] * 2,
}


def available() -> bool:
    """Whether the kernels can be used here."""
    try:
        library()
    except NoCompiler:
        return False
    return True


@cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        NoCompiler: there is none, or it failed, with what it said.
    """
    return compiling.library(SOURCE, ARGUMENTS)
