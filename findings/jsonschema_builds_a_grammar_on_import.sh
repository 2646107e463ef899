#!/usr/bin/env bash
# jsonschema 4.26.0 beside rfc3987-syntax 1.1.0 (JupyterLab's event system brings it):
# every `import jsonschema`, and so every `import nbformat`, builds an LALR parser for
# international web addresses, which takes several times as long as all the rest. No
# schema need name a format, and no format checker need be asked for: the import of the
# optional package is what counts. Without it the same notebook is validated the same way.
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip jsonschema==4.26.0 nbformat==5.11.1

cat > "$work/measure.py" <<'PYTHON'
import subprocess
import sys
import time

CODE = """
import nbformat
from nbformat.v4 import new_code_cell, new_notebook
nbformat.validate(new_notebook(cells=[new_code_cell("1 + 1")]))
"""


def seconds() -> float:
    """Seconds of a Python that imports nbformat and validates a notebook."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", CODE], check=True)
    return time.perf_counter() - started


print(min(seconds() for _ in range(4)))
PYTHON
without=$("$work/venv/bin/python" "$work/measure.py")
pip rfc3987-syntax==1.1.0 lark==1.3.1
with=$("$work/venv/bin/python" "$work/measure.py")

"$work/venv/bin/python" - "$without" "$with" <<'PYTHON'
import sys

without, beside = map(float, sys.argv[1:])
print(f"validate a notebook: {without:.2f} s; rfc3987-syntax installed: {beside:.2f} s")
as_stated = beside > 3 * without
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
