"""Whether a result can be trained through: what `.detach()` leaves of its gradient.

A value may be right and carry no gradient. Where an exercise says which arguments are
trained (`grads=`), the runner repeats one call of its check with them as leaves, and
compares autograd's derivative along a few random directions with that of two nearby
values of the answer itself. The values are right by then, so those differences are what
the reference's gradient would give.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmlab.course.words import listed

CUTS = (".detach()", ".data", "no_grad", "inference_mode", ".item()", ".tolist()")
DIRECTIONS = 3


@dataclass
class Call:
    """The arguments of one call, copied before it was made."""

    args: list[Any]
    kwargs: dict[str, Any]


def copied(value: Any) -> Any:
    """Tensors copied, in lists, tuples and dicts too; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)([copied(v) for v in value])
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value


def is_real(value: Any) -> bool:
    """Whether `value` is a tensor that can have a gradient."""
    return isinstance(value, Tensor) and value.is_floating_point()


def fits(args: Sequence[Any], trained: Mapping[str, int]) -> bool:
    """Whether each trained argument of a call is a tensor with finite numbers."""
    for place in trained.values():
        if place >= len(args) or not is_real(args[place]):
            return False
        if not args[place].isfinite().all():
            return False
    return True


def cut(answer: Callable, call: Call, trained: Mapping[str, int]) -> str | None:
    """What is wrong with the gradient of a right value, in one sentence; or None.

    Args:
        call: arguments for which the value of `answer` is right.
        trained: name → position of the arguments that a gradient must reach.
    """
    try:
        try:
            slopes = _slopes(answer, call, trained, torch.float64, step=1e-3)
        except Exception:  # it mixes our numbers with float32 of its own
            slopes = _slopes(answer, call, trained, torch.float32, step=1e-2)
    except (RuntimeError, TypeError) as error:
        return (
            "the value is right, but no gradient can be computed through it"
            f" ({str(error).splitlines()[0]}): stay in torch, and change nothing in"
            " place on the way"
        )
    unreached = []
    partly = []
    for name, (found, wanted, loose) in slopes.items():
        if _agree(found, wanted, loose):
            continue
        (partly if found.any() else unreached).append(f"`{name}`")
    if unreached:
        return (
            f"the value is right, but no gradient reaches {listed(unreached)}:"
            f" training goes through this result. {_cure(answer)}"
        )
    if partly:
        return (
            f"the value is right, but the gradient of {listed(partly)} is not: a part"
            f" of the way back is cut, or made up by hand. {_cure(answer)}"
        )
    return None


def _slopes(
    answer: Callable,
    call: Call,
    trained: Mapping[str, int],
    dtype: torch.dtype,
    step: float,
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """name → derivatives along random directions, by autograd and by differences.

    The third is by how much the two may differ, relatively.
    """
    args = [_as(value, dtype) for value in call.args]
    kwargs = {key: _as(value, dtype) for key, value in call.kwargs.items()}
    generator = torch.Generator().manual_seed(0)
    weights: list[Tensor] = []

    def total(given: list[Any]) -> Tensor:
        """A random mixture of all numbers that come out."""
        results = _reals(answer(*copied_leaves(given), **kwargs))
        if not weights:
            for t in results:
                w = torch.randn(t.shape, generator=generator, dtype=torch.float64)
                weights.append(w)
        parts = [(w * t).sum() for w, t in zip(weights, results, strict=True)]
        return sum(parts, torch.zeros((), dtype=torch.float64))

    leaves = {}
    for name, place in trained.items():
        args[place] = args[place].clone().requires_grad_()
        leaves[name] = args[place]
    value = total(args)
    gradients = [None] * len(leaves)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
    slopes = {}
    for (name, place), gradient in zip(trained.items(), gradients, strict=True):
        found = []
        wanted = []
        for _ in range(DIRECTIONS):
            leaf = args[place]
            way = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            way = way.to(dtype)
            nearby = []
            for sign in (1, -1):
                moved = [*args]
                moved[place] = leaf.detach() + sign * step * way
                with torch.no_grad():
                    nearby.append(float(total(moved)))
            slope = 0.0 if gradient is None else float((gradient * way).sum())
            found.append(slope)
            wanted.append((nearby[0] - nearby[1]) / (2 * step))
        loose = 0.01 if dtype == torch.float64 else 0.05
        slopes[name] = torch.tensor(found), torch.tensor(wanted), loose
    return slopes


def copied_leaves(args: list[Any]) -> list[Any]:
    """The arguments for one more call; leaves stay the same objects."""
    return [v if is_real(v) else copied(v) for v in args]


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Real tensors in `dtype`, in lists and dicts too."""
    if is_real(value):
        return value.detach().to(dtype)
    if isinstance(value, list | tuple):
        return type(value)([_as(v, dtype) for v in value])
    if isinstance(value, dict):
        return {k: _as(v, dtype) for k, v in value.items()}
    return value


def _reals(result: Any) -> list[Tensor]:
    """The tensors with real numbers in a result."""
    if is_real(result):
        return [result]
    if isinstance(result, list | tuple):
        return [t for item in result for t in _reals(item)]
    if isinstance(result, dict):
        return _reals(list(result.values()))
    return []


def _agree(found: Tensor, wanted: Tensor, loose: float) -> bool:
    """Whether most directions agree: one of them may lie across a kink."""
    if not wanted.isfinite().all():
        return True
    typical = wanted.abs().mean()
    near = (found - wanted).abs() <= loose * (wanted.abs() + typical)
    return int(near.sum()) > DIRECTIONS // 2


def _cure(answer: Callable) -> str:
    """What to take out: what stands in the answer's own code, when it can be read."""
    try:
        source = inspect.getsource(answer)
    except (OSError, TypeError):
        source = ""
    there = [f"`{c}`" for c in CUTS if c in source]
    if there:
        return f"Take {listed(there)} out of its way"
    return (
        "What cuts the way is a `.detach()`, `.data`, `torch.no_grad()`, `.item()` or a"
        " new `torch.tensor(…)`"
    )
