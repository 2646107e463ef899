"""ZeroQuant: against mathematics and against the library.

The syllabus names: own ablation.
"""

from __future__ import annotations

import torch

from llmlab.compression import zeroquant


def test_apply():
    """TODO an oracle, forward and gradients; see this test fail once."""
    torch.testing.assert_close(zeroquant.apply(torch.zeros(2, 3)), torch.zeros(2, 3))
