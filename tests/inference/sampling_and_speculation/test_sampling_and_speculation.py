"""Sampling and speculation: against mathematics and against the library.

The syllabus names: transformers processors; exact enumeration.
"""

from __future__ import annotations

import torch

from llmlab.inference.sampling_and_speculation import sampling_and_speculation


def test_apply():
    """TODO an oracle, forward and gradients; see this test fail once."""
    torch.testing.assert_close(sampling_and_speculation.apply(torch.zeros(2, 3)), torch.zeros(2, 3))
