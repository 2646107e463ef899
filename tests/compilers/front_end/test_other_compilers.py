"""Rules that are not exact, and that another compiler uses unasked."""

from __future__ import annotations

import numpy as np
import pytest

from tests.libraries import seen_in


@seen_in("jax", "0.10.2")
def test_under_jit_a_rounding_by_a_magic_number_rounds_nothing():
    """The lesson says so; findings/ has more of it."""
    pytest.importorskip("jax")
    from llmlab.chips.tpu.interpreter import start_jax

    jax = start_jax()
    magic, x = np.float32(1.5 * 2**23), np.array([0.1, 1.5, 2.7], np.float32)
    known = jax.jit(lambda x: (x + magic) - magic)
    given = jax.jit(lambda x, c: (x + c) - c)
    np.testing.assert_array_equal(known(x), x)
    np.testing.assert_array_equal(given(x, magic), np.rint(x))
