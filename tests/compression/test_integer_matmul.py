"""Products of 8-bit codes: exact."""

import torch

from llmlab.compression.integer_matmul import multiply_codes, multiply_padded


def test_sums_are_exact_where_float32_is_not():
    x = torch.full((3, 2001), 127, dtype=torch.int8)
    x[0, 0] = 1
    sums = multiply_codes(x, x)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), x.long() @ x.long().T)
    assert not torch.equal((x.float() @ x.float().T).long(), sums.long())


def test_what_cublas_asks_for_changes_nothing():
    for tokens, features, out in ((1, 5, 3), (17, 8, 8), (20, 13, 9)):
        x = torch.randint(-127, 128, (tokens, features), dtype=torch.int8)
        w = torch.randint(-127, 128, (out, features), dtype=torch.int8)
        padded = multiply_padded(x, w)
        assert torch.equal(padded, multiply_codes(x, w))
