#!/usr/bin/env bash
# paddlepaddle 3.3.1 on a CPU: the softmax of a score far below the largest is 0 in float32,
# and a masked key weighs nothing: so one would expect. Here it never falls below exp(−64):
# scores are cut off at 64 below the largest, in log_softmax and cross_entropy, too. A
# loss of 1000 is told as 64, and a masked key keeps a weight of 1.6e-28, which shows
# where the row that it lets through is alone (a token whose embedding is zero, before a
# norm).
#
# Seen for scores 0 and −1000: softmax 1.6038e-28, log_softmax −64, cross entropy 64
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==1.26.4 setuptools paddlepaddle==3.3.1

"$work/venv/bin/python" - <<'PYTHON'
import math
import sys

import paddle
import paddle.nn.functional as F

x = paddle.to_tensor([[0.0, -1000.0]])
seen = {
    "softmax": float(F.softmax(x)[0, 1]),
    "log_softmax": float(F.log_softmax(x)[0, 1]),
    "cross_entropy": float(F.cross_entropy(x, paddle.to_tensor([1]))),
}
print(paddle.__version__, seen)
wanted = {"softmax": math.exp(-64), "log_softmax": -64.0, "cross_entropy": 64.0}
same = all(math.isclose(seen[k], wanted[k], rel_tol=1e-4) for k in wanted)
sys.exit(not same)
PYTHON
