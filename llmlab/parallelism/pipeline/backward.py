"""The backward pass of a linear in two halves: the input's gradient now, the weight's
gradient later.

    Y = X Wᵀ + b          I:  ∂X = ∂Y W                  what the stage before waits for
                          W:  ∂W = ∂Yᵀ X,  ∂b = Σ ∂Y     what nobody waits for

Qi et al. 2023 (https://arxiv.org/abs/2401.10241), section 2. Asking autograd twice
(once for the inputs, once for the weights) would give the same numbers, but walk
through the whole stage twice; here `backward()` does I and leaves each linear's W on a
list, with the X and ∂Y that it needs. Simplified: norms' and embeddings' gradients,
which are small, stay in I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, autograd, nn


class Late(NamedTuple):
    """One linear's W, to be done."""

    linear: LateLinear
    x: Tensor
    dy: Tensor


class WeightGradients:
    """The W that backward passes have left. `take()` hands over the list; `compute`
    does the work.

    `hold` wraps each tensor that is kept, so that a meter can count it.
    """

    def __init__(self, hold: Callable[[Tensor], object] | None = None) -> None:
        self.hold = hold or (lambda tensor: tensor)
        self._left: list[Late] = []
        self._holds: list[object] = []

    def leave(self, linear: LateLinear, x: Tensor, dy: Tensor) -> None:
        """Called by a linear's backward."""
        self._left.append(Late(linear, x, dy))
        self._holds += [self.hold(x), self.hold(dy)]

    def take(self) -> tuple[list[Late], list[object]]:
        """What has been left since the last call, and the holds on it."""
        left, self._left, self._holds = (self._left, self._holds), [], []
        return left


@torch.no_grad()  # X has a history, which must not become that of the gradient
def compute(left: list[Late]) -> None:
    """∂W = ∂Yᵀ X and ∂b = Σ ∂Y, added to `.grad`; frees X and ∂Y."""
    while left:
        linear, x, dy = left.pop()
        x, dy = x.flatten(0, -2), dy.flatten(0, -2)  # (B, T, ·) → (B·T, ·)
        _add(linear.weight, dy.T @ x)
        if linear.bias is not None:
            _add(linear.bias, dy.sum(0))


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.requires_grad:
        parameter.grad = (
            gradient if parameter.grad is None else parameter.grad + gradient
        )


class _Linear(autograd.Function):
    """Y = X Wᵀ + b, whose backward is I only."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, linear: LateLinear
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,), linear = ctx.saved_tensors, ctx.linear
        linear.late.leave(linear, x, dy)
        return dy @ linear.weight if ctx.needs_input_grad[0] else None, None, None, None


class LateLinear(nn.Module):
    """A linear with the parameters of another, whose weight gradient is left to
    `late`.
    """

    def __init__(self, linear: nn.Linear, late: WeightGradients) -> None:
        super().__init__()
        self.weight, self.bias, self.late = linear.weight, linear.bias, late

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """X Wᵀ + b."""
        return _Linear.apply(x, self.weight, self.bias, self)


def make_late(
    module: nn.Module, hold: Callable[[Tensor], object] | None = None
) -> WeightGradients:
    """Replace every linear in `module` by a `LateLinear`, in place; returns where they
    leave their weights' gradients.
    """
    late = WeightGradients(hold)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_module(leaf, LateLinear(linear, late))
    return late
