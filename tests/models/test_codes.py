"""Products of codes: exact, whatever this machine's instructions do."""

import pytest
import torch

from llmlab.models import codes


@pytest.mark.parametrize("exact", [True, False])
def test_sums_are_exact(exact, monkeypatch):
    """By PyTorch's product where that is right, and by the one that takes its place."""
    if not exact:
        monkeypatch.setattr(codes, "sums_are_exact", lambda: False)
    for m, n, k in ((1, 2, 3), (3, 2001, 8), (17, 64, 33)):
        a = torch.full((m, n), 127, dtype=torch.int8)
        b = torch.full((n, k), -127, dtype=torch.int8)
        b[0, 0] = 1
        for right in (b, b.t().contiguous().t()):
            found = codes.product(a, right)
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), a.long() @ b.long())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 8), (5, 1, 8), (1, 1, 8), (1, 3, 1)])
def test_one_row_may_be_a_column_transposed(m, n, k):
    a = torch.arange(1, 1 + m * n, dtype=torch.int8).view(n, m).t()
    b = torch.arange(1, 1 + n * k, dtype=torch.int8).view(k, n).t()
    assert torch.equal(codes.product(a, b).long(), a.long() @ b.long())
