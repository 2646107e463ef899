"""The kernels as plugins of an engine."""

from __future__ import annotations

import pytest
import torch

from llmlab.compression.kernels import PLUGINS, Int4Linear, available
from llmlab.compression.kernels.plugins import GRID
from llmlab.compression.quantization_basics import QuantLinear

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler")


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9])
def test_a_product_is_that_with_the_decoded_weight(name, tokens):
    pack, product, weight = PLUGINS[name]
    torch.manual_seed(0)
    W, x = torch.randn(24, 96), torch.randn(1, tokens, 96)
    packed = pack(W)
    decoded = weight(packed)
    torch.testing.assert_close(product(x, packed), x @ decoded.T, atol=1e-4, rtol=1e-4)
    step = {"int8": W.abs().amax() / 127, "int4": (W.amax() - W.amin()) / 15}[name]
    assert (decoded - W).abs().max() < step
    assert torch.equal(weight(pack(decoded)), decoded) or name == "int4"


def test_int4_is_the_linear_of_this_room():
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 8, bias=False)
    pack, _, weight = PLUGINS["int4"]
    wanted = Int4Linear(QuantLinear(linear, GRID)).weight
    assert torch.equal(weight(pack(linear.weight)), wanted)
    assert pack(linear.weight)["packed"].shape == (8, 32)
