"""What the checks of this part share: counting products and what is kept, and judging
all cases together.
"""

import pytest
import torch

from llmlab.checks.parallelism.ranks import Products, Received, explained
from llmlab.course.grading.checking import Mistake


def test_products_are_counted_backward_too():
    x = torch.ones(2, 3, requires_grad=True)
    w = torch.ones(3, 5)
    with Products() as seen:
        (x @ w).sum().backward()
    assert seen.total == 2 * 3 * 5 * 2  # dx only: w needs no gradient


def test_counting_products_does_not_import_the_compiler():
    # wrapped, its first product would import torch._dynamo, which takes seconds
    assert not hasattr(Products.__torch_dispatch__, "__wrapped__")


class Mailbox:
    rank = 0

    def recv(self, source):
        return torch.full((4,), float(source))

    def barrier(self):
        return None


def test_what_is_kept_is_counted_views_too():
    comm = Received(Mailbox(), "recv")
    first = comm.recv(1)
    part = first[:2]
    del first
    comm.recv(2)
    assert (comm.most, comm.most_numbers) == (2, 8)
    del part
    for source in range(3):
        comm.recv(source)
    assert comm.most == 2
    assert comm.barrier() is None
    assert comm.rank == 0


def test_a_mistake_must_explain_every_case():
    found = [((2, 3), 6), ((2, 2), 4), ((1, 5), 5)]
    explained(found, {"a sum": lambda a, b: a + b})
    with pytest.raises(Mistake, match="a product"):
        explained(found, {"a sum": lambda a, b: a + b, "a product": lambda a, b: a * b})
