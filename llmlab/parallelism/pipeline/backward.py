"""The backward pass of a linear in two halves: input's gradient now, weight's later.

    Y = X Wᵀ + b          I:  ∂X = ∂Y W                  what the stage before waits for
                          W:  ∂W = ∂Yᵀ X,  ∂b = Σ ∂Y     what nobody waits for

    x   X (…, in)         dy  ∂Y (…, out)        weight  W (out, in)

Qi et al. 2023 (https://arxiv.org/abs/2401.10241), section 2. Asking autograd twice
(once for the inputs, once for the weights) would give the same numbers, but walk
through the whole stage twice. Here `backward()` does I and leaves each linear's W on a
list, with the X and ∂Y that it needs.

Simplified: the gradients of norms and embeddings, which are small, stay in I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, autograd, nn


class PendingWeightGrad(NamedTuple):
    """One linear's W that is still to be computed."""

    linear: LateLinear
    x: Float[Tensor, "... in"]
    dy: Float[Tensor, "... out"]


class WeightGradients:
    """The list of W that backward passes have left.

    `take()` hands the list over; `compute` does the work. `hold` wraps each tensor that
    is kept, so that a meter can count it.
    """

    def __init__(self, hold: Callable[[Tensor], object] | None = None) -> None:
        self.hold = hold
        self._pending: list[PendingWeightGrad] = []
        self._holds: list[object] = []

    def leave(
        self,
        linear: LateLinear,
        x: Float[Tensor, "... in"],
        dy: Float[Tensor, "... out"],
    ) -> None:
        """Add one W to the list. A linear's backward calls this."""
        self._pending.append(PendingWeightGrad(linear, x, dy))
        if self.hold is not None:
            self._holds.append(self.hold(x))
            self._holds.append(self.hold(dy))

    def take(self) -> tuple[list[PendingWeightGrad], list[object]]:
        """What has been left since the last call, and the holds on it."""
        taken = (self._pending, self._holds)
        self._pending = []
        self._holds = []
        return taken


@torch.no_grad()  # X has a history, which must not become that of the gradient
def compute(pending: list[PendingWeightGrad]) -> None:
    """Add ∂W = ∂Yᵀ X and ∂b = Σ ∂Y to `.grad`. Empties the list: X and ∂Y are freed."""
    while pending:
        linear, x, dy = pending.pop()
        # under autocast Y, and so ∂Y, is narrower than X and W may be
        x = x.flatten(0, -2).to(dy.dtype)  # (B, T, in) → (B·T, in)
        dy = dy.flatten(0, -2)  # (B, T, out) → (B·T, out)
        add_gradient(linear.weight, dy.T @ x)  # (out, B·T) (B·T, in) → (out, in)
        if linear.bias is not None:
            add_gradient(linear.bias, dy.sum(0))


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to `.grad`, in the parameter's type, as autograd would.

    A frozen parameter gets nothing.
    """
    if not parameter.requires_grad:
        return
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad = parameter.grad + gradient


class InputGradientLinear(autograd.Function):
    """Y = X Wᵀ + b, whose backward is I only."""

    @staticmethod
    def forward(
        ctx,
        x: Float[Tensor, "... in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        linear: LateLinear,
    ) -> Float[Tensor, "... out"]:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Float[Tensor, "... out"]):
        (x,) = ctx.saved_tensors
        linear = ctx.linear
        linear.weight_gradients.leave(linear, x, dy)  # W, for later
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ linear.weight.to(dy.dtype)  # (…, out) (out, in) → (…, in)
            dx = dx.to(x.dtype)
        return dx, None, None, None


class LateLinear(nn.Module):
    """A linear with another's parameters, whose W is left to `weight_gradients`."""

    def __init__(self, linear: nn.Linear, weight_gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.weight_gradients = weight_gradients

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """X Wᵀ + b."""
        return InputGradientLinear.apply(x, self.weight, self.bias, self)


def make_late(
    module: nn.Module, hold: Callable[[Tensor], object] | None = None
) -> WeightGradients:
    """Replace every linear in `module` by a `LateLinear`, in place.

    Returns the list on which they leave their weights' gradients.
    """
    weight_gradients = WeightGradients(hold)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            late = LateLinear(linear, weight_gradients)
            module.get_submodule(parent).register_module(leaf, late)
    return weight_gradients
