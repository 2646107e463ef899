"""Texts of unequal lengths as one list of tokens, and back."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.fused_transformers import padding
from llmlab.models.accounting import forward_flops
from tests.models.hugging_face import make

RIGHT = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
LEFT = [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]


def test_by_hand():
    x = torch.arange(12.0).view(3, 4, 1)
    tokens, places, starts = padding.remove_padding(x, torch.tensor(RIGHT))
    assert tokens.flatten().tolist() == [0, 1, 2, 4, 8, 9]
    assert places.tolist() == [0, 1, 2, 4, 8, 9]
    assert starts.tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize("mask", [RIGHT, LEFT, [[0, 0], [1, 1]], [[1, 1]], [[0]]])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_there_and_back(mask, kind):
    torch.manual_seed(0)
    mask = torch.tensor(mask).to(kind)
    x = torch.randn(*mask.shape, 5)
    tokens, places, starts = padding.remove_padding(x, mask)
    for i, row in enumerate(mask.bool()):
        torch.testing.assert_close(tokens[starts[i] : starts[i + 1]], x[i][row])
    back = padding.restore_padding(tokens, places, *mask.shape)
    torch.testing.assert_close(back, x * mask[..., None], rtol=0, atol=0)


def test_ids_have_no_last_axis():
    ids = torch.tensor([[3, 4], [5, 0]])
    tokens, places, _ = padding.remove_padding(ids, torch.tensor([[1, 1], [1, 0]]))
    assert tokens.tolist() == [3, 4, 5]
    assert padding.restore_padding(tokens, places, 2, 2).tolist() == [[3, 4], [5, 0]]


def test_flops():
    config = make().config
    padded, packed = padding.flops(config, [8, 2, 4])
    assert padded == forward_flops(config, 3, 8)
    assert packed == sum(forward_flops(config, 1, n) for n in (8, 2, 4))
    assert padding.flops(config, [6, 6])[0] == padding.flops(config, [6, 6])[1]
