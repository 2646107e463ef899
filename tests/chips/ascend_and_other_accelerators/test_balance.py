"""Cube and vector cycles of a layer against its FLOPs, and closed forms."""

from __future__ import annotations

import math

import pytest

from llmlab.chips.ascend_and_other_accelerators import balance, core
from llmlab.models.accounting import forward_flops
from llmlab.models.presets import preset

ASCEND = core.core("Ascend 910")


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-13b", "llama-3.1-8b"])
def test_cube_cycles_are_the_flops_of_the_layers(name):
    """All sizes are multiples of 16, so nothing is padded."""
    config = preset(name)
    parts = balance.layer(ASCEND, config, 512, 512)
    cube = sum(part.cube for part in parts) * config.num_hidden_layers
    head = 2 * 512 * config.vocab_size * config.hidden_size
    assert cube * 8192 == forward_flops(config, 1, 512) - head


@pytest.mark.parametrize(("width", "bound"), [(64, "vector"), (128, "cube")])
def test_attention_waits_for_the_vector_unit_where_heads_are_narrow(width, bound):
    """2 D / 4096 against 5 / 128 cycles: equal at D = 80."""
    config = preset("smollm2-135m" if width == 64 else "llama-3.1-8b")
    assert config.head_dim == width
    attention = balance.layer(ASCEND, config, 1024, 2048)[2]
    assert attention.cube / attention.vector == pytest.approx(width / 80)
    assert attention.bound == bound


def test_two_vector_units_per_cube_halve_the_wait():
    config = preset("smollm2-135m")
    old = balance.layer(ASCEND, config, 256, 256)
    new = balance.layer(core.core("Ascend 910B"), config, 256, 256)
    for a, b in zip(old, new, strict=True):
        assert (a.cube, a.vector) == (b.cube, 2 * b.vector)
    assert new[2].bound == "cube"


def test_numbers_are_taken_128_at_a_time():
    cycles = [balance.vector_cycles(ASCEND, "residual", n) for n in (1, 128, 129)]
    assert cycles == [1, 1, 2]
    for what, done in balance.INSTRUCTIONS.items():
        assert balance.vector_cycles(ASCEND, what, 1000) == len(done) * math.ceil(
            1000 / 128
        )


def test_one_token_keeps_a_sixteenth_of_the_cube_busy():
    config = preset("smollm2-135m")
    one, sixteen = (balance.layer(ASCEND, config, n, 512) for n in (1, 16))
    for a, b in zip(one, sixteen, strict=True):
        assert a.cube == b.cube


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: balance.layer(ASCEND, preset("tiny"), 0, 4), "tokens=0"),
        (lambda: balance.layer(ASCEND, preset("tiny"), 4, -1), "keys=-1"),
        (lambda: balance.vector_cycles(ASCEND, "conv", 4), "what='conv'"),
    ],
)
def test_nonsense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
