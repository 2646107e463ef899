#!/usr/bin/env bash
# triton 3.7.1: prune_configs_by takes early_config_prune and then perf_model with top_k.
# With top_k = 0.5 one would expect half of the configurations that early_config_prune
# left to be timed. It is half of all that were given: with 4 given and 3 left, 2 are
# timed, and with 4 given and 2 left both are, so that perf_model decides nothing.
#
# Seen, timed of 4 given: 3 left → 2, 2 left → 2
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 triton==3.7.1

cat > "$work/tune.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner


def kernel(n, B: tl.constexpr):
    pass


def timed(left):
    given = [triton.Config({"B": b}) for b in (16, 32, 64, 128)]
    tuner = Autotuner(
        triton.JITFunction(kernel),
        ["n", "B"],
        given,
        ["n"],
        None,
        None,
        prune_configs_by={
            "early_config_prune": lambda configs, args, **rest: configs[:left],
            "perf_model": lambda **named: named["B"],
            "top_k": 0.5,
        },
        do_bench=lambda call, quantiles: 1.0,
    )
    tuner.nargs = {"n": 1}
    return len(tuner.prune_configs({}))


found = {left: timed(left) for left in (3, 2)}
print("triton", triton.__version__, "left → timed", found)
sys.exit(found != {3: 2, 2: 2})
PYTHON
"$work/venv/bin/python" "$work/tune.py"
