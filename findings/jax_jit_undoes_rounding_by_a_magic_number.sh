#!/usr/bin/env bash
# jax 0.10.2 on a CPU: jax.jit does not set fast-math, so one would expect a compiled
# function to round where the same function rounds operation by operation. XLA joins
# constants of floats: (x + c) − c becomes x, without a word. With c = 1.5 · 2^23 that is
# the well-known way to round to a whole number, and under jit it rounds nothing. In the
# same way (x · 1e30) · 1e-30 no longer overflows, log(exp(x)) is x, and exp(x) / exp(y) is
# exp(x − y). With c as an argument, or behind optimization_barrier, the rounding stays.
#
# Seen, x = 0.1, 0.5, 1.5, 2.7 and c = 12582912:
#   (x + c) − c: one by one 0, 0, 2, 3; under jit 0.1, 0.5, 1.5, 2.7; c as an argument 0, 0, 2, 3
#   log(exp(100)): one by one inf, under jit 100; exp(100) / exp(100): NaN, under jit 1
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

MAGIC = np.float32(1.5 * 2**23)
HUGE, TINY = np.float32(1e30), np.float32(1e-30)
NUMBERS = np.array([0.1, 0.5, 1.5, 2.7], np.float32)


def kept(x):
    return jax.lax.optimization_barrier(x + MAGIC) - MAGIC


CASES = {
    "(x + c) - c": (lambda x: (x + MAGIC) - MAGIC, NUMBERS, NUMBERS),
    "(x * 1e30) * 1e-30": (lambda x: (x * HUGE) * TINY, np.float32(1e10), 1e10),
    "log(exp(x))": (lambda x: jnp.log(jnp.exp(x)), np.float32(100), 100),
    "exp(x) / exp(x)": (lambda x: jnp.exp(x) / jnp.exp(x), np.float32(100), 1),
}
as_stated = True
for name, (function, x, wanted) in CASES.items():
    plain, compiled = function(jnp.asarray(x)), jax.jit(function)(x)
    print(f"{name:20} one by one {plain}, under jit {compiled}")
    as_stated &= np.allclose(compiled, wanted) and not np.allclose(plain, wanted)
rounded = np.rint(NUMBERS)
argument = jax.jit(lambda x, c: (x + c) - c)(NUMBERS, MAGIC)
barrier = jax.jit(kept)(NUMBERS)
print("jax", jax.__version__, "c as an argument", argument, "barrier", barrier)
as_stated &= np.array_equal(argument, rounded) and np.array_equal(barrier, rounded)
sys.exit(0 if as_stated else 1)
PYTHON
