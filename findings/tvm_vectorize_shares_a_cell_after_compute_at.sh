#!/usr/bin/env bash
# apache-tvm 0.27.0.post1: compute_at(P, j) gives P room for one number, which each
# iteration of j computes for itself. vectorize(j) then runs eight iterations at once, so
# one would expect a refusal, or room for eight. The schedule is accepted, all lanes share
# the one cell, and the program returns the last lane's number eight times. Nothing is
# said.
#
# Seen, row 1 of C = 2 A + 1 with A = 0, 1, 2, …: 31 in all eight places, where 17, 19, …
# 31 are right (and come without vectorize)
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 apache-tvm==0.27.0.post1

"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import tvm
from tvm import s_tir, te


def run(vectorize):
    A = te.placeholder((4, 8), name="A")
    P = te.compute((4, 8), lambda i, j: A[i, j] * 2.0, name="P")
    C = te.compute((4, 8), lambda i, j: P[i, j] + 1.0, name="C")
    schedule = s_tir.Schedule(te.create_prim_func([A, C]))
    c, p = schedule.get_sblock("C"), schedule.get_sblock("P")
    schedule.compute_at(p, schedule.get_loops(c)[1])
    if vectorize:
        schedule.vectorize(schedule.get_loops(c)[1])
    given = tvm.runtime.tensor(np.arange(32, dtype="float32").reshape(4, 8))
    result = tvm.runtime.tensor(np.zeros((4, 8), "float32"))
    tvm.compile(schedule.mod, target="llvm")["main"](given, result)
    return result.numpy()


right = 2 * np.arange(32, dtype="float32").reshape(4, 8) + 1
plain, lanes = run(False), run(True)
print("tvm", tvm.__version__, "plain", plain[1], "vectorized", lanes[1])
shared = np.repeat(right[:, -1:], 8, axis=1)
sys.exit(not ((plain == right).all() and (lanes == shared).all()))
PYTHON
