"""The C file of this room as a library; see `llmlab.models.c_library`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from llmlab.models.c_library import LONG, POINTER, NoCompiler, build

SOURCE = Path(__file__).parent / "products.c"
ARGUMENTS = {
    "matvec_4bit": [POINTER] * 5 + [LONG] * 4,
    "decode_4bit": [POINTER] * 4 + [LONG] * 4,
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
    return build(SOURCE, ARGUMENTS)
