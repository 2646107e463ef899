"""What marks the exercises of 06-compression/02-llm-int8."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmlab.checks.operations import Operations
from llmlab.compression import llm_int8
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/02-llm-int8")


# Exercise 1 ---------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "First a, one number for each row. Then every row is divided by its own a.",
        (
            "`amax` over the last dimension gives (rows,). To divide a (rows, n) matrix"
            " by it, it must become (rows, 1)."
        ),
        (
            "Divide by `torch.where(a > 0, a, 1.0)[:, None]`, round, and only then"
            " `.to(torch.int8)`."
        ),
    ),
)
def quantize_rows(answer):
    """The rows of a matrix as 8-bit codes, each with its own scale."""
    # square, so that a scale on the wrong axis fits; no row has its largest |x| above 0
    X = torch.randn(6, 6) * torch.logspace(-1, 1, 6)[:, None]
    # a power of two, so that x / a · 127 and 127 · x / a are both exactly −127
    X[:, 2] = -(2 ** (X.abs().amax(1).log2().ceil() + 1))
    codes, a = _pair(answer(X), (6, 6), "quantize_rows(X)")
    right = X.abs().amax(1)
    diagnose(a, right=right, mistakes=_wrong_sizes(X), what="your largest |x|")
    exact = 127 * X / right[:, None]
    mistakes = {
        "you cut off instead of rounding: call torch.round before the cast": (
            exact.trunc()
        ),
        "you rounded down: torch.round is to the nearest": exact.floor(),
        "you multiplied by 128: the largest code is 127": (
            (128 * X / right[:, None]).round().clamp(-128, 127)
        ),
        "128 does not fit an int8 and came out as −128: multiply by 127": (
            (128 * X / right[:, None]).round().to(torch.int8)
        ),
        "you multiplied by 255: symmetric codes end at 127": (
            (255 * X / right[:, None]).round().to(torch.int8)
        ),
        "your rows are divided by the a of other rows: a needs the shape (rows, 1)": (
            (127 * X / right).round().clamp(-128, 127)
        ),
        "your rows are divided by the a of other rows: make a of shape (rows, 1)": (
            (127 * X / right).round().to(torch.int8)
        ),
        "X is not divided by a: these are multiples of x itself": (
            (127 * X).round().to(torch.int8)
        ),
        "the codes are x / a, from −1 to 1: multiply by 127 before rounding": (
            (X / right[:, None]).round()
        ),
    }
    mistakes = {text: value.to(torch.int8) for text, value in mistakes.items()}
    diagnose(
        codes, right=exact.round().to(torch.int8), mistakes=mistakes, what="your codes"
    )
    _ties_and_zeros(answer)


def _ties_and_zeros(answer) -> None:
    """The half-way cases, a row of zeros, and a matrix that is not square."""
    X = torch.tensor([[127, 63.5, 0.5, -0.5, 1.5, -2.5], [0.0] * 6])
    codes, a = _pair(answer(X), (2, 6), "quantize_rows of a matrix with a row of zeros")
    if codes[1].any() or a[1] != 0:
        raise Mistake(
            "a row of zeros must get a = 0 and codes 0: divide it by something that is"
            " not 0, and return its a as it is"
        )
    with NaNIsNoInteger():
        lucky = answer(X)[0]
    if lucky[1].any():
        raise Mistake(
            "the codes of a row of zeros are 0 by luck: 0 / 0 is NaN, and what becomes"
            " of a NaN in an int8 is left open. Divide by something that is not 0"
        )
    if codes[0].tolist() == [127, 64, 1, -1, 2, -3]:
        raise Mistake("0.5 is rounded away from zero: ties go to the even integer")
    if codes[0].tolist() == [127, 64, 1, 0, 2, -2]:
        raise Mistake("0.5 is rounded up: ties go to the even integer, as torch.round")
    if codes[0].tolist() != [127, 64, 0, 0, 2, -2]:
        raise Mistake("right for the first matrix; where x · 127 / a ends in .5, wrong")


class NaNIsNoInteger(TorchFunctionMode):
    """Here a NaN that is cast to integers becomes 77: torch leaves open what it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and out.dtype == torch.int8
            and isinstance(args[0], Tensor)
            and args[0].is_floating_point()
            and args[0].shape == out.shape
        ):
            out = out.masked_fill(args[0].isnan(), 77)
        return out


def _pair(value, shape: tuple[int, int], what: str) -> tuple[Tensor, Tensor]:
    pair = expect(value, kind=tuple, what=what)
    if len(pair) != 2:
        raise Mistake(f"{what} returned {len(pair)} things: return codes and a")
    if getattr(pair[1], "shape", None) == (shape[0], 1):
        raise Mistake("a has the shape (rows, 1): return it as (rows,), no keepdim")
    codes = expect(pair[0], shape=shape, dtype=torch.int8, what="your tensor of codes")
    a = expect(pair[1], shape=shape[:1], dtype=torch.float32, what="your largest |x|")
    return codes, a


def _wrong_sizes(X: Tensor) -> dict:
    """Values for a that usual mistakes give."""
    right = X.abs().amax(1)
    return {
        "you returned the step, a / 127: a itself is asked": right / 127,
        "you returned 127 / a, the paper's c: a itself is asked": 127 / right,
        "you took the largest x of a row, not the largest |x|": X.amax(1),
        "you took the largest |x| of each column: each row has its own": (
            X.abs().amax(0)
        ),
        "one a for the whole matrix: each row has its own": (
            X.abs().amax().expand(len(X))
        ),
        "you took the mean of |x|: the largest is asked": X.abs().mean(1),
        "you took max − min of a row: the largest |x| is asked": X.amax(1) - X.amin(1),
    }


# Exercise 2 ---------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Three steps: which columns leave, as a mask; the product of codes without"
            " them; the thin product of those columns, added to it."
        ),
        (
            "`X * ~out` makes the outlier columns zeros. Its rows go to your"
            " quantize_rows: then scales and codes are those of the other columns."
        ),
        (
            "The decoded columns are `codes[:, out] * (a_w / 127)[:, None]`. The"
            " integer sums are multiplied by `(a_x / 127)[:, None]` and by `a_w / 127`."
        ),
    ),
)
def mixed_product(answer):
    """A product of 8-bit codes, but for the columns that hold outliers."""
    X, W = _inputs()
    codes, a_w = llm_int8.quantize_rows(W)
    arguments = (X, codes, a_w)
    what = "mixed_product(X, codes, a_w, 6.0)"
    with Arithmetic() as seen:
        got = answer(*arguments, 6.0)
    got = expect(got, shape=(6, 6), dtype=torch.float32, what=what)
    right = _product(*arguments, 6.0)
    mistakes = _wrong_sets(*arguments) | _wrong_products(*arguments)
    diagnose(got, right=right, mistakes=mistakes, what=what)
    _borders(answer, *arguments)
    _other_shapes(answer)
    if not seen.integers:
        raise Mistake(
            "the values are right, but no integers are multiplied: multiply the codes,"
            " and scale what comes out"
        )


class Arithmetic(Operations):
    """Operations whose `integers` does not count comparisons: codes are compared to see
    that they stay as they were.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.integers
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self.integers = before
        return out


def _inputs() -> tuple[Tensor, Tensor]:
    """6 tokens, 10 features, 6 outputs. Outliers are column 1, negative; 4, for one
    token; and 6, which reaches 6.0 exactly.
    """
    X = torch.randn(6, 10).clamp(-2, 2) * torch.linspace(0.5, 1, 6)[:, None]
    X[:, 1] = -9 - torch.rand(6)
    X[2, 4] = 20
    X[3, 4] = 5.5
    X[4, 6] = 6.0
    X[0, 6] = -4.5
    X[5] /= 4
    X[5, 1] = -5.7  # the largest of its row, once the outliers have left
    W = torch.randn(6, 10) * torch.linspace(0.2, 3, 6)[:, None]
    return X, W


def _product(X, codes, a_w, alpha: float) -> Tensor:
    """What is asked for, written with a mask."""
    out = (X.abs() >= alpha).any(0)
    return _parts(X, X.masked_fill(out, 0), X.masked_fill(~out, 0), codes, a_w)


def _parts(X, regular, outliers, codes, a_w, a_x=None) -> Tensor:
    """The sum of a rounded part and of one that is not rounded."""
    a_x = regular.abs().amax(1) if a_x is None else a_x
    step = (a_x / 127)[:, None].double()
    divisor = torch.where(step > 0, step, 1.0)
    decoded = codes.double() * (a_w.double() / 127)[:, None]
    rounded = torch.round(regular.double() / divisor) * step
    return ((rounded + outliers.double()) @ decoded.T).float()


def _with(X, codes, a_w, out: Tensor) -> Tensor:
    """The product when the columns in `out` leave."""
    return _parts(X, X.masked_fill(out, 0), X.masked_fill(~out, 0), codes, a_w)


def _wrong_sets(X, codes, a_w) -> dict:
    """What comes out when something else is taken for the outliers."""
    large = X.abs() >= 6.0
    none = torch.zeros(10, dtype=torch.bool)
    rows = large.any(1, keepdim=True)
    single = _parts(X, X.masked_fill(large, 0), X.masked_fill(~large, 0), codes, a_w)
    return {
        "6.0 is an outlier when alpha is 6.0: compare with >=": _with(
            X, codes, a_w, (X.abs() > 6.0).any(0)
        ),
        "negative outliers stay in: compare |x| with alpha": _with(
            X, codes, a_w, (X >= 6.0).any(0)
        ),
        "you compare the mean of |x| with alpha: one large value is enough": _with(
            X, codes, a_w, X.abs().mean(0) >= 6.0
        ),
        "no column leaves: one value of at least alpha, in any token, is enough": _with(
            X, codes, a_w, none
        ),
        "all columns leave: nothing of X was rounded": _with(X, codes, a_w, ~none),
        "the wrong columns are rounded: the outliers are to stay as they are": _with(
            X, codes, a_w, ~large.any(0)
        ),
        "whole tokens leave: it is columns of X that hold the outliers": _parts(
            X, X.masked_fill(rows, 0), X.masked_fill(~rows, 0), codes, a_w
        ),
        "only the large values leave: their whole columns have to": single,
    }


def _wrong_products(X, codes, a_w) -> dict:
    """What comes out when the columns are right and the arithmetic is not."""
    large = X.abs() >= 6.0
    out = large.any(0)
    regular = X.masked_fill(out, 0)
    outliers = X.masked_fill(~out, 0)
    nothing = torch.zeros_like(X)
    all_of_x = X.abs().amax(1)
    small_ones = X.masked_fill(large, 0).abs().amax(1)
    first = _parts(X, regular, nothing, codes, a_w)
    second = _parts(X, nothing, outliers, codes, a_w)
    raw = outliers @ codes.float().T  # codes that are not decoded
    a_x = regular.abs().amax(1)[:, None]
    return {
        "the part in 16 bits is missing: add the product of the outlier columns": first,
        "the part in 8 bits is missing: add the scaled product of the codes": second,
        (
            "the outlier columns count twice: they must be zeros in the part of 8 bits"
        ): _parts(X, X, outliers, codes, a_w),
        "the scale of a row comes from all of X: leave the outlier columns out": (
            _parts(X, regular, outliers, codes, a_w, all_of_x)
        ),
        (
            "the scale of a row still counts the small values of outlier columns: the"
            " whole columns leave before a_x is taken"
        ): _parts(X, regular, outliers, codes, a_w, small_ones),
        "one scale for all of X: each token has its own": (
            _parts(X, regular, outliers, codes, a_w, a_x.amax().expand(6))
        ),
        "the weights of the outlier columns are codes: multiply them by a_w / 127": (
            first + raw
        ),
        "the weights of the outlier columns lack a_w": first + raw / 127,
        "the weights of the outlier columns are 127 times too large": (
            first + 127 * second
        ),
        "the outlier columns' a_w is on the wrong axis: it belongs to outputs": (
            first + raw * (a_w / 127)[:, None]
        ),
        "the part in 8 bits lacks a_x": first / a_x + second,
        "the part in 8 bits lacks a_w": first / a_w + second,
        "the part in 8 bits lacks a_x and a_w": first / a_x / a_w + second,
        "the part in 8 bits is 127 times too large: 1 / 127 belongs to both scales": (
            127 * first + second
        ),
        "the part in 8 bits is 127² times too large: divide both scales by 127": (
            127**2 * first + second
        ),
        "in the part of 8 bits a_w is on the wrong axis: outputs are columns of Y": (
            first / a_w * a_w[:, None] + second
        ),
        "in the part of 8 bits a_x is on the wrong axis: tokens are rows of Y": (
            first / a_x * a_x.T + second
        ),
        "X was not rounded: its regular columns go through codes": (
            _parts(X, nothing, X, codes, a_w)
        ),
        "the product overflowed 8 bits: cast the codes to int32 or wider first": (
            _overflowed(regular, codes, torch.int8) * (a_x / 127) * (a_w / 127) + second
        ),
        "the product overflowed 16 bits: cast the codes to int32 or wider first": (
            _overflowed(regular, codes, torch.int16) * (a_x / 127) * (a_w / 127)
            + second
        ),
    }


def _overflowed(regular, codes, dtype: torch.dtype) -> Tensor:
    """The sums of products of codes, each kept in `dtype`."""
    q, _ = llm_int8.quantize_rows(regular)
    return (q.long() @ codes.long().T).to(dtype).float()


def _borders(answer, X, codes, a_w) -> None:
    """No outliers, nothing but outliers, and another threshold."""
    for alpha, case in (
        (20.0, "for alpha = 20: take it from the argument"),
        (1e4, "when no column is an outlier"),
        (1e-9, "when all columns are outliers: their rows of zeros need a scale, too"),
    ):
        what = f"mixed_product {case.split(':')[0]}"
        try:
            got = answer(X, codes, a_w, alpha)
        except (IndexError, RuntimeError) as error:
            none = " (no column is left to be rounded)" if alpha < 1 else ""
            name = type(error).__name__
            raise Mistake(f"{what}{none} raises {name}: {error}") from error
        expect(got, shape=(6, 6), dtype=torch.float32, what=what, finite=False)
        if not close(got, _product(X, codes, a_w, alpha)):
            raise Mistake(f"right for alpha = 6.0, wrong {case}")


def _other_shapes(answer) -> None:
    """More features than tokens and outputs; sums that 16 bits do not hold."""
    X = torch.ones(2, 70)
    X[0, 3] = 50
    codes = torch.full((3, 70), 127, dtype=torch.int8)
    a_w = torch.tensor([0.5, 1.0, 2.0])
    what = "mixed_product with 2 tokens, 70 features and 3 outputs"
    got = expect(answer(X, codes, a_w, 6.0), shape=(2, 3), what=what)
    if close(got, _product(X, codes, a_w, 6.0)):
        return
    q, a_x = llm_int8.quantize_rows(X.index_fill(1, torch.tensor([3]), 0))
    sums = (q.long() @ codes.long().T).to(torch.int16).float()
    scaled = sums * (a_x / 127)[:, None] * (a_w / 127) + X[:, 3:4] * a_w
    if close(got, scaled):
        raise Mistake(
            "wrong for 69 codes that are all 127: their sum, 69 · 127² = 1,112,901,"
            " overflows 16 bits. Multiply in int32 or wider"
        )
    raise Mistake(
        f"right for 6 tokens and 6 outputs, wrong for {what.partition(' with ')[2]}"
    )


# Exercise 3 ---------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=3,
    hints=(
        "Start with a tensor of True and False: where is |h| at least alpha?",
        (
            "For the share of layers a layer counts once, however many tokens are large"
            " in it: `any` over the tokens, then `mean` over the layers."
        ),
        (
            "`large.float().mean(dim=(0, 1))` is the share of values. Both conditions"
            " are joined by `&`; `torch.nonzero(…).flatten().tolist()` lists them."
        ),
    ),
)
def outlier_features(answer):
    """The dimensions that are outliers again and again."""
    hidden = _hidden()
    what = "outlier_features(hidden, 6.0)"
    got = _list(answer(hidden.clone(), 6.0), what)
    right = [f.dimension for f in llm_int8.outlier_features(list(hidden), 6.0)]
    if got != right:
        for text, wrong in _wrong_features(hidden).items():
            if got == wrong:
                raise Mistake(text)
        if sorted(got) == right:
            raise Mistake("these are the right dimensions: list them in order")
        extra, missed = set(got) - set(right), set(right) - set(got)
        raise Mistake(
            f"{len(missed)} outlier features are missing, and {len(extra)} dimensions"
            " are listed that are none",
            foreseen=False,
        )
    for alpha, scale in ((3.0, 0.5), (12.0, 2.0)):
        if _list(answer(hidden * scale, alpha), what) != right:
            raise Mistake(f"right for alpha = 6.0, wrong for {alpha}: is it used?")
    few = hidden[4:, :, 1:3]  # dimension 2 is large in one layer of these four
    right = [f.dimension for f in llm_int8.outlier_features(list(few), 6.0)]
    if _list(answer(few, 6.0), "outlier_features with 4 layers") != right:
        raise Mistake("right for 8 layers, wrong for 4: take shares, not numbers")


def _list(value, what: str) -> list[int]:
    if isinstance(value, Tensor):
        raise Mistake(
            f"{what} returned a tensor: a list of numbers is asked (.tolist())"
        )
    found = expect(value, kind=list, what=what)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise Mistake(f"{what}: the list must hold whole numbers, the dimensions")
    return found


def _hidden() -> Tensor:
    """8 layers, 50 tokens, 11 dimensions, most at a border of one condition."""
    hidden = torch.rand(8, 50, 11) * 4 - 2
    hidden[:2, :, 0] = -8  # 25% of the layers, 25% of the values: both just enough
    hidden[:, 0, 1] = 300  # every layer, one token: 2%
    hidden[4, :, 2] = 40  # one layer of eight: 12.5%
    hidden[:4, :6, 3] = 7  # half of the layers, 24 of 400 values: 6% exactly
    hidden[2:4, ::2, 4] = 6.0  # alpha exactly
    hidden[:, :2, 5] = 9  # every layer, 4% of the values
    hidden[:2, :6, 6] = 9  # 12% of the values of two layers, 3% of all
    hidden[:, :3, 7] = -6.5  # every layer, 6% of the values
    hidden[1, :45, 8] = 11  # 11% of the values, one layer
    for layer in range(8):  # every layer, each time for another token: 2%
        hidden[layer, 4 * layer, 9] = 12
    hidden[::2, :30, 10] = 8  # half of the layers, 30% of the values; no layer's all
    return hidden


def _wrong_features(hidden: Tensor) -> dict[str, list[int]]:
    """The lists that usual mistakes give."""
    large = hidden.abs() >= 6.0
    layers = large.any(1).float().mean(0)
    values = large.float().mean((0, 1))
    of_layers = large.float().sum((0, 1)) / large.any(1).sum(0).clamp(min=1) / 50
    positive = hidden >= 6.0
    strict = hidden.abs() > 6.0

    def where(mask: Tensor) -> list[int]:
        return torch.nonzero(mask).flatten().tolist()

    def both(large: Tensor) -> list[int]:
        shares = large.any(1).float().mean(0), large.float().mean((0, 1))
        return where((shares[0] >= 0.25) & (shares[1] >= 0.06))

    return {
        "negative values are left out: compare |h| with alpha": both(positive),
        "alpha itself counts: compare with >=": both(strict),
        "exactly 25% of the layers and exactly 6% of the values are enough: >=": where(
            (layers > 0.25) & (values > 0.06)
        ),
        "exactly 25% of the layers is enough: compare with >=": where(
            (layers > 0.25) & (values >= 0.06)
        ),
        "exactly 6% of the values is enough: compare with >=": where(
            (layers >= 0.25) & (values > 0.06)
        ),
        "only the layers are looked at: 6% of the values is the other condition": where(
            layers >= 0.25
        ),
        "only the values are looked at: 25% of the layers is the other condition": (
            where(values >= 0.06)
        ),
        "one of the two conditions is enough for you: both must hold": where(
            (layers >= 0.25) | (values >= 0.06)
        ),
        "25% and 6% are swapped: 25% of the layers, 6% of the values": where(
            (layers >= 0.06) & (values >= 0.25)
        ),
        (
            "6% is taken of the affected layers alone: it is 6% of all values of the"
            " dimension"
        ): where((layers >= 0.25) & (of_layers >= 0.06)),
        (
            "a token counts for you when it is large in any layer: count the values of"
            " all layers"
        ): where((layers >= 0.25) & (large.any(0).float().mean(0) >= 0.06)),
        "a layer must be large for all tokens for you: one token is enough": where(
            (large.all(1).float().mean(0) >= 0.25) & (values >= 0.06)
        ),
        "these are the dimensions that are large anywhere": where(large.any(1).any(0)),
    }
