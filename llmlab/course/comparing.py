"""`compare(ours, theirs)` prints one verdict line, or says where the two differ.

The line reads the same on every machine.
"""

from __future__ import annotations

from typing import Any


def compare(ours: Any, theirs: Any, what: str = "values", tol: float = 1e-5) -> None:
    """Prints that two results are equal to within `tol`; fails where they are not.

    Args:
        ours, theirs: tensors, arrays, numbers, or (nested) lists of numbers, of one
            shape.
        what: the name of what is compared, as the line should call it.
        tol: the largest absolute difference allowed; 0 asks for equality.
    Raises:
        AssertionError: shapes differ, a value is not a number, or the largest
            difference exceeds `tol`.
        ValueError: `tol` is negative.

    >>> compare([1.0, 2.0], [1.0, 2.0], "means")
    means: equal to within 1e-05 (2 values)
    """
    if not tol >= 0:
        raise ValueError(f"tol={tol!r} must be 0 or more")
    a = _array(ours)
    b = _array(theirs)
    if a.shape != b.shape:
        raise AssertionError(
            f"{what}: shapes differ: ours {_shape(a.shape)}, theirs {_shape(b.shape)}"
        )
    _check(a, b, what, tol)
    agreement = f"equal to within {tol:g}" if tol else "equal"
    print(f"{what}: {agreement} ({_count(a.shape)})")


def _array(x: Any):
    """Any of the accepted things as a numpy array of float64, complex128 or int64."""
    import numpy as np

    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if x.is_floating_point():
            x = x.double()  # NumPy has no bfloat16
        x = x.numpy()
    elif isinstance(x, list | tuple) and x and hasattr(x[0], "detach"):
        x = [_array(e) for e in x]
    x = np.asarray(x)
    kind = x.dtype.kind
    if kind == "O":
        raise ValueError(
            "compare takes tensors, arrays, numbers and lists of them,"
            f" not {x.flat[0]!r}"
        )
    wide = {"f": np.float64, "c": np.complex128}
    return x.astype(wide.get(kind, np.int64))


def _check(a, b, what: str, tol: float) -> None:
    import numpy as np

    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, np.abs(a - b))  # so that ∞ equals ∞
    if not difference.size:
        return
    nan_as_largest = np.where(np.isnan(difference), np.inf, difference)
    worst = np.unravel_index(np.argmax(nan_as_largest), difference.shape)
    if not difference[worst] <= tol:  # `not <=`: NaN must fail
        place = ""
        if worst:
            indices = ", ".join(str(int(i)) for i in worst)
            place = f" at [{indices}]"
        raise AssertionError(
            f"{what}: differ by {difference[worst]:.3g}{place}, more than {tol:g}:"
            f" ours {a[worst]:.6g}, theirs {b[worst]:.6g} ({_count(a.shape)})"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a single number"


def _count(shape: tuple[int, ...]) -> str:
    return f"{_shape(shape)} values" if shape else "one value"
