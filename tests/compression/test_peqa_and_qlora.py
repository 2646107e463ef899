"""PEQA and QLoRA: against mathematics and against the library.

The syllabus names: bitsandbytes.
"""

from __future__ import annotations

import torch

from llmlab.compression import peqa_and_qlora


def test_apply():
    """TODO an oracle, forward and gradients; see this test fail once."""
    torch.testing.assert_close(peqa_and_qlora.apply(torch.zeros(2, 3)), torch.zeros(2, 3))
