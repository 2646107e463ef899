#!/usr/bin/env bash
# xdsl 0.74.0: MLIR writes a float that has no decimal form by its bits, −∞ as 0xFF800000,
# alone (0xFF800000 : f32) and in a list of elements (dense<0xFF800000>). One would expect
# both to be read as −∞. xDSL does so alone; in a list it takes the same digits for a whole
# number, 4286578688.0, without a word. Its own printer writes −∞ that way: an attribute
# that is printed and read again is another one. Bytes in quotes are read as they should.
# (A maximum begins with −∞, and so does a mask.)
#
# Seen:
#   0xFF800000 : f32                        −∞            as IREE's MLIR
#   dense<0xFF800000> : tensor<1xf32>       4286578688.0  IREE's MLIR: −∞
#   dense<[0x3F800000, 2.0]> : …2xf32       1065353216.0, 2.0    IREE's MLIR: 1.0, 2.0
#   dense<"0x000080FF"> : tensor<1xf32>     −∞            and printed as dense<0xff800000>
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 xdsl==0.74.0 iree-base-compiler==3.13.0

"$work/venv/bin/python" - <<'PYTHON'
import math
import sys
from importlib.metadata import version
from io import StringIO

import numpy as np
from iree.compiler import ir
from xdsl.context import Context
from xdsl.dialects.builtin import Builtin
from xdsl.parser import Parser
from xdsl.printer import Printer


def by_xdsl(text):
    """The numbers of an attribute, and how it is printed."""
    context = Context()
    context.load_dialect(Builtin)
    attribute = Parser(context, text).parse_attribute()
    out = StringIO()
    Printer(out).print_attribute(attribute)
    several = hasattr(attribute, "get_values")
    numbers = attribute.get_values() if several else [attribute.value.data]
    return list(numbers), out.getvalue()


def by_mlir(text):
    with ir.Context():
        attribute = ir.Attribute.parse(text)
        if isinstance(attribute, ir.FloatAttr):
            return [attribute.value]
        return np.array(ir.DenseFPElementsAttr(attribute)).tolist()


INF = math.inf
CASES = {
    "0xFF800000 : f32": ([-INF], [-INF]),
    "dense<0xFF800000> : tensor<1xf32>": ([4286578688.0], [-INF]),
    "dense<[0x3F800000, 2.0]> : tensor<2xf32>": ([1065353216.0, 2.0], [1.0, 2.0]),
    'dense<"0x000080FF"> : tensor<1xf32>': ([-INF], [-INF]),
}
print("xdsl", version("xdsl"), "iree-base-compiler", version("iree-base-compiler"))
as_stated = True
for text, wanted in CASES.items():
    found, printed = by_xdsl(text)
    right = by_mlir(text)
    print(f"{text:42} xdsl {found}, printed {printed}; MLIR {right}")
    as_stated &= (found, right) == wanted
as_stated &= printed == "dense<0xff800000> : tensor<1xf32>"
as_stated &= by_xdsl(printed)[0] == [4286578688.0]
sys.exit(0 if as_stated else 1)
PYTHON
