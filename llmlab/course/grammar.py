"""Leaves out a grammar that nothing here needs and that takes three seconds to build.

nbformat imports jsonschema, and jsonschema the package rfc3987_syntax if it is there:
JupyterLab brings it. That builds a parser of international web addresses (IRIs) when it
is imported. No notebook has a field that is checked by it.
"""

import sys


def leave_out_grammar() -> None:
    """Makes jsonschema do without the grammar, in this process.

    Call it before nbformat is imported.
    """
    sys.modules.setdefault("rfc3987_syntax", None)
