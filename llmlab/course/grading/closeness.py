"""Whether two values are equal up to rounding, and where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(x: Any) -> Tensor | None:
    """`x` in float64, or as integers; None where it is no tensor, array or number."""
    if isinstance(x, Tensor):
        x = x.detach()
        x = x.to_dense() if x.layout != torch.strided else x
    elif isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        x = torch.from_numpy(np.ascontiguousarray(x))
    elif isinstance(x, bool | int | float | np.number | np.bool_):
        try:
            x = torch.tensor(
                x, dtype=torch.float64 if isinstance(x, float | np.floating) else None
            )
        except (OverflowError, RuntimeError, ValueError):  # an integer beyond 64 bits
            x = torch.tensor(float(x), dtype=torch.float64)
    else:
        return None
    return x.cpu().double() if x.is_floating_point() else x.cpu()


def limit(right: Tensor, tol: float) -> Tensor:
    """How far each element may be off: `tol` of its own size and of the mean size.

    Where all is zero, the mean size counts as 1.
    """
    size = right.double().abs()
    finite = size[size.isfinite()]
    mean = float(finite.mean()) if finite.numel() else 0.0
    typical = max(mean, 1e-3) if mean else 1.0
    return tol * (torch.where(size.isfinite(), size, 0.0) + typical)


def wrong_places(got: Tensor, right: Tensor, tol: float) -> Tensor:
    """Where two tensors of one shape differ by more than rounding, as booleans."""
    if not (got.is_floating_point() or right.is_floating_point()):
        return got != right
    got, right = got.double(), right.double()
    near = (got - right).abs() <= limit(right, tol)
    return ~(near | (got == right) | (got.isnan() & right.isnan()))


def close(got: Any, right: Any, tol: float = 1e-5) -> bool:
    """Whether two values are equal up to rounding.

    They may be tensors, arrays, numbers, and lists or dicts of them. Each element may
    be off by `tol` times (its own size + the mean size). Integers, truth values and
    text must be equal.
    """
    if isinstance(right, list | tuple) and isinstance(got, list | tuple):
        return len(got) == len(right) and all(
            close(g, r, tol) for g, r in zip(got, right, strict=True)
        )
    if isinstance(right, Mapping) and isinstance(got, Mapping):
        return got.keys() == right.keys() and all(
            close(got[k], right[k], tol) for k in right
        )
    g, r = as_tensor(got), as_tensor(right)
    if g is None or r is None:
        return type(got) is type(right) and bool(got == right)
    return g.shape == r.shape and not bool(wrong_places(g, r, tol).any())


def share(got: Any, right: Any, tol: float = 1e-5) -> float:
    """The share of a value that is right, from 0 to 1; 1 where the two are close."""
    if close(got, right, tol):
        return 1.0
    if isinstance(right, list | tuple) and isinstance(got, list | tuple):
        pairs = zip(got, right, strict=False)
        parts = [share(g, r, tol) for g, r in pairs]
        return sum(parts) / max(len(got), len(right))
    if isinstance(right, Mapping) and isinstance(got, Mapping):
        parts = [share(got[key], right[key], tol) for key in right.keys() & got.keys()]
        return sum(parts) / len(right.keys() | got.keys())
    g, r = as_tensor(got), as_tensor(right)
    if g is None or r is None or g.shape != r.shape or not r.numel():
        return 0.0
    return 1.0 - float(wrong_places(g, r, tol).double().mean())
