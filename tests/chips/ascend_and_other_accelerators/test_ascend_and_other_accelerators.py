"""Ascend and other accelerators: against mathematics and against the library.

The syllabus names: mindspore, paddlepaddle on CPU.
"""

from __future__ import annotations

import torch

from llmlab.chips.ascend_and_other_accelerators import ascend_and_other_accelerators


def test_apply():
    """TODO an oracle, forward and gradients; see this test fail once."""
    torch.testing.assert_close(ascend_and_other_accelerators.apply(torch.zeros(2, 3)), torch.zeros(2, 3))
