#!/usr/bin/env bash
# paddlepaddle 3.3.1: F.cross_entropy ignores the label −100 by default, as torch does, and
# one would expect its mean to be over the labels that count. With −100 the mean is over
# all of them, so a batch with padding has too small a loss and too small gradients; with
# ignore_index=99 and label 99 it is over those that count. Only an ignore_index of 0 or
# more is left out of the count. Nothing is said.
#
# Seen, two rows, the second one ignored: −100 gives 0.703803 (half), 99 gives 1.407606;
# torch gives 1.407606 for both
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

rows = [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]]
x = paddle.to_tensor(rows)
by_hand = math.log(sum(map(math.exp, rows[0]))) - rows[0][1]  # of the first row alone
seen = {
    -100: float(F.cross_entropy(x, paddle.to_tensor([1, -100]))),
    99: float(F.cross_entropy(x, paddle.to_tensor([1, 99]), ignore_index=99)),
}
print(paddle.__version__, seen, by_hand)
wanted = {-100: by_hand / 2, 99: by_hand}
same = all(math.isclose(seen[k], wanted[k], rel_tol=1e-5) for k in wanted)
sys.exit(not same)
PYTHON
