"""Wrong answers to 06-compression/02-llm-int8, each with its diagnosis."""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.llm_int8 import check
from tests.checks.rejecting import Wrong, rejects, verdict


def rows(
    top=127,
    largest=lambda X: X.abs().amax(1),
    rounding=torch.round,
    gives=lambda a: a,
    empty=1.0,
    dtype=torch.int8,
):
    """quantize_rows with one thing changed."""

    def quantize_rows(X):
        a = largest(X)
        divisor = a if empty is None else torch.where(a > 0, a, empty)
        return rounding(top * X / divisor[:, None]).to(dtype), gives(a)

    return quantize_rows


def away_from_zero(x):
    return x.sign() * (x.abs() + 0.5).floor()


def by_columns_of_a(X):
    a = X.abs().amax(1)
    return torch.round(127 * X / torch.where(a > 0, a, 1.0)).to(torch.int8), a


def zero_gets_one(X):
    a = X.abs().amax(1)
    a = torch.where(a > 0, a, 1.0)
    return torch.round(127 * X / a[:, None]).to(torch.int8), a


def in_place_rows(X):
    a = X.abs().amax(1)
    return X.mul_(127).div_(a.clamp(min=1e-30)[:, None]).round().to(torch.int8), a


def cut_off_in_another_order(X):
    a = X.abs().amax(1)
    return (X / torch.where(a > 0, a, 1.0)[:, None] * 127).to(torch.int8), a


def keepdim_left(X):
    a = X.abs().amax(1, keepdim=True)
    return torch.round(127 * X / a.clamp(min=1e-30)).to(torch.int8), a


def codes_alone(X):
    return rows()(X)[0]


def not_divided(X):
    return torch.round(127 * X).to(torch.int8), X.abs().amax(1)


quantize = rows()


def mixed(
    out=lambda X, alpha: (X.abs() >= alpha).any(0),
    regular=lambda X, out: X * ~out,
    a_x=None,
    codes_as=torch.int32,
    thin=lambda X, out, codes, a_w: X[:, out] @ (codes[:, out] * a_w[:, None] / 127).T,
    scaled=lambda y, a_x, a_w: y * (a_x / 127)[:, None] * (a_w / 127),
    quantize=quantize,
):
    """mixed_product with one thing changed."""

    def mixed_product(X, codes, a_w, alpha):
        leaves = out(X, alpha)
        kept = regular(X, leaves)
        q, size = quantize(kept)
        if a_x is not None:
            size = a_x(X, leaves)
            divisor = torch.where(size > 0, size, 1.0)
            q = torch.round(127 * kept / divisor[:, None]).to(torch.int8)
        y = (q.to(codes_as) @ codes.to(codes_as).T).float()
        return scaled(y, size, a_w) + thin(X, leaves, codes, a_w)

    return mixed_product


def in_floats(X, codes, a_w, alpha):
    return X @ (codes * a_w[:, None] / 127).T


def only_the_values(X, codes, a_w, alpha):
    large = X.abs() >= alpha
    q, a_x = quantize(X * ~large)
    y = (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)
    return y + (X * large) @ (codes * a_w[:, None] / 127).T


def whole_tokens(X, codes, a_w, alpha):
    large = (X.abs() >= alpha).any(1)
    q, a_x = quantize(X * ~large[:, None])
    y = (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)
    return y + (X * large[:, None]) @ (codes * a_w[:, None] / 127).T


def decoded_first(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(0)
    q, a_x = quantize(X * ~out)
    rounded = q * (a_x / 127)[:, None]
    return (rounded + X * out) @ (codes * (a_w / 127)[:, None]).T


def zeroed_in_place(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(0)
    few = X[:, out] @ (codes[:, out] * a_w[:, None] / 127).T
    X[:, out] = 0
    q, a_x = quantize(X)
    return few + (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)


def nothing_left(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(0)
    a_x = (X * ~out).abs().amax(1)
    q = torch.round(127 * X * ~out / a_x[:, None])
    y = (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)
    # where nothing is left of a row
    y = torch.where(a_x[:, None] > 0, y, torch.nan)
    return y + X[:, out] @ (codes[:, out] * a_w[:, None] / 127).T


def always_six(X, codes, a_w, alpha):
    return mixed()(X, codes, a_w, 6.0)


def without_the_small_ones(X, out):
    return torch.where(X.abs() >= 6, 0.0, X).abs().amax(1)


def features(
    large=lambda h, alpha: h.abs() >= alpha,
    layers=lambda big: big.any(1).float().mean(0) >= 0.25,
    values=lambda big: big.float().mean((0, 1)) >= 0.06,
    joined=lambda a, b: a & b,
    gives=lambda found: torch.nonzero(found).flatten().tolist(),
):
    """outlier_features with one thing changed."""

    def outlier_features(hidden, alpha):
        big = large(hidden, alpha)
        return gives(joined(layers(big), values(big)))

    return outlier_features


def of_affected_layers(big):
    per_layer = big.float().mean(1)  # (layers, dimensions)
    return per_layer.sum(0) / big.any(1).sum(0).clamp(min=1) >= 0.06


Q, M, F = "quantize_rows", "mixed_product", "outlier_features"


def rows_one_by_one(X):
    codes = torch.zeros(X.shape, dtype=torch.int8)
    largest = []
    for i, row in enumerate(X):
        a = max(row.max().item(), -row.min().item())
        largest.append(a)
        if a > 0:
            codes[i] = (row / a).mul(127).round()
    return codes, torch.tensor(largest, dtype=torch.float32)


def by_gathering(X, codes, a_w, alpha):
    """Columns gathered, nothing masked."""
    largest = X.abs().max(dim=0).values
    stay = torch.nonzero(largest < alpha).flatten()
    leave = torch.nonzero(largest >= alpha).flatten()
    few = X.index_select(1, leave) @ codes.index_select(1, leave).float().T
    few = few * a_w / 127
    if len(stay) == 0:
        return few
    q, a_x = rows_one_by_one(X.index_select(1, stay))
    sums = torch.einsum("th,oh->to", q.long(), codes.index_select(1, stay).long())
    return few + sums * torch.outer(a_x, a_w) / 127**2


def by_int_mm(X, codes, a_w, alpha):
    out = X.abs().amax(0) >= alpha
    q, a_x = quantize(torch.where(out, 0.0, X))
    y = torch._int_mm(q, codes.T) * a_x.unsqueeze(1) * a_w / 16129
    return y.addmm(X * out, (codes * (a_w / 127).unsqueeze(1)).T)


def with_loops(hidden, alpha):
    found = []
    count, tokens, dimensions = hidden.shape
    for i in range(dimensions):
        per_layer = (hidden[:, :, i].abs() >= alpha).sum(1)
        enough_layers = int((per_layer > 0).sum()) >= 0.25 * count
        if enough_layers and int(per_layer.sum()) / (count * tokens) >= 0.06:
            found.append(i)
    return found


def by_numpy(hidden, alpha):
    big = abs(hidden.numpy()) >= alpha
    layers = big.max(axis=1).mean(axis=0)
    values = big.reshape(-1, big.shape[-1]).mean(axis=0)
    return [int(i) for i in ((layers >= 0.25) * (values >= 0.06)).nonzero()[0]]


def zeros_by_luck(X):
    a = X.abs().amax(1)
    return (127 * X / a[:, None]).round().to(torch.int8), a


def zeros_after_the_cast(X):
    codes, a = zeros_by_luck(X)
    codes[a == 0] = 0
    return codes, a


def zeros_before_the_cast(X):
    a = X.abs().amax(1)
    return torch.nan_to_num(127 * X / a[:, None]).round().to(torch.int8), a


def product_by_numpy(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(0)
    q, a_x = zeros_before_the_cast(X * ~out)
    sums = q.numpy().astype("int32") @ codes.numpy().astype("int32").T
    rest = torch.from_numpy(sums) * torch.outer(a_x / 127, a_w / 127)
    return X * out @ (codes * (a_w / 127)[:, None]).T + rest


def no_column_left(X, codes, a_w, alpha):
    out = (X.abs() >= alpha).any(0)
    q, a_x = zeros_before_the_cast(X[:, ~out])
    sums = q.int() @ codes[:, ~out].int().T
    thin = X[:, out] @ (codes[:, out] * (a_w / 127)[:, None]).T
    return thin + sums * torch.outer(a_x / 127, a_w / 127)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (Q, rows_one_by_one),
        (Q, rows(empty=1e-20)),
        (M, by_gathering),
        (Q, zeros_after_the_cast),
        (Q, zeros_before_the_cast),
        (M, by_int_mm),
        (M, product_by_numpy),
        (F, with_loops),
        (F, by_numpy),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


def scale(how):
    """Scales for `mixed`, each with one thing wrong, by name."""
    return {
        "no a_x": lambda y, a_x, a_w: y / 127 * (a_w / 127),
        "no a_w": lambda y, a_x, a_w: y * (a_x / 127)[:, None] / 127,
        "no scales": lambda y, a_x, a_w: y / 127**2,
        "127": lambda y, a_x, a_w: y * a_x[:, None] * a_w / 127,
        "127²": lambda y, a_x, a_w: y * a_x[:, None] * a_w,
        "a_w": lambda y, a_x, a_w: y * (a_x / 127)[:, None] * (a_w / 127)[:, None],
        "a_x": lambda y, a_x, a_w: y * (a_x / 127) * (a_w / 127),
        "none": lambda y, a_x, a_w: 0 * y,
    }[how]


def thin(how):
    """Products of the outliers for `mixed`, each with one thing wrong, by name."""
    return {
        "none": lambda X, out, codes, a_w: 0,
        "codes": lambda X, out, codes, a_w: X[:, out] @ codes[:, out].float().T,
        "no a_w": lambda X, out, codes, a_w: X[:, out] @ codes[:, out].float().T / 127,
        "127": lambda X, out, codes, a_w: X[:, out] @ (codes[:, out] * a_w[:, None]).T,
        "axis": lambda X, out, codes, a_w: (
            X[:, out] @ codes[:, out].float().T * a_w[:, None] / 127
        ),
    }[how]


test_wrong_answers = rejects(
    "06-compression/02-llm-int8",
    [
        Wrong(Q, rows(top=128), "127"),
        Wrong(Q, zeros_by_luck, "by luck"),
        Wrong(M, no_column_left, "no column is left"),
        Wrong(Q, rows(128, rounding=lambda q: q.round().clamp(-128, 127)), "by 128"),
        Wrong(Q, rows(top=255), "255"),
        Wrong(Q, rows(top=1), "multiply by 127"),
        Wrong(Q, rows(rounding=torch.trunc), "cut off"),
        Wrong(Q, rows(rounding=lambda q: q), "cut off"),
        Wrong(Q, cut_off_in_another_order, "cut off"),
        Wrong(Q, rows(rounding=torch.floor), "rounded down"),
        Wrong(Q, rows(rounding=away_from_zero), "away from zero"),
        Wrong(Q, rows(rounding=lambda q: (q + 0.5).floor()), "rounded up"),
        Wrong(Q, rows(largest=lambda X: X.amax(1)), "not the largest |x|"),
        Wrong(Q, rows(largest=lambda X: X.abs().amax(0)), "each column"),
        Wrong(Q, rows(largest=lambda X: X.abs().mean(1)), "mean"),
        Wrong(Q, rows(largest=lambda X: X.abs().max().expand(len(X))), "whole matrix"),
        Wrong(Q, rows(gives=lambda a: a / 127), "the step"),
        Wrong(Q, rows(gives=lambda a: 127 / a), "the paper's c"),
        Wrong(Q, rows(dtype=torch.int64), "int8"),
        Wrong(Q, zero_gets_one, "row of zeros"),
        Wrong(Q, by_columns_of_a, "(rows, 1)"),
        Wrong(Q, in_place_rows, "changes its argument"),
        Wrong(Q, keepdim_left, "no keepdim"),
        Wrong(Q, codes_alone, "tuple"),
        Wrong(Q, not_divided, "not divided by a"),
        Wrong(M, mixed(out=lambda X, alpha: (X.abs() > alpha).any(0)), ">="),
        Wrong(M, mixed(out=lambda X, alpha: X.amax(0) >= alpha), "compare |x|"),
        Wrong(M, mixed(out=lambda X, alpha: (X.abs() >= alpha).all(0)), "in any token"),
        Wrong(M, mixed(out=lambda X, alpha: X.abs().mean(0) >= alpha), "the mean"),
        Wrong(
            M, mixed(out=lambda X, alpha: torch.zeros(X.shape[1]).bool()), "no column"
        ),
        Wrong(M, mixed(out=lambda X, alpha: (X.abs() < alpha).all(0)), "wrong columns"),
        Wrong(M, in_floats, "nothing of X was rounded"),
        Wrong(M, only_the_values, "whole columns"),
        Wrong(M, whole_tokens, "whole tokens"),
        Wrong(M, decoded_first, "no integers are multiplied"),
        Wrong(M, zeroed_in_place, "changes its argument"),
        Wrong(M, nothing_left, "all columns are outliers"),
        Wrong(M, always_six, "take it from the argument"),
        Wrong(M, mixed(regular=lambda X, out: X), "count twice"),
        Wrong(M, mixed(a_x=lambda X, out: X.abs().amax(1)), "comes from all of X"),
        Wrong(M, mixed(a_x=without_the_small_ones), "small values of outlier columns"),
        Wrong(
            M,
            mixed(a_x=lambda X, out: (X * ~out).abs().max().expand(len(X))),
            "each token has its own",
        ),
        Wrong(M, mixed(codes_as=torch.int8), "overflowed 8 bits"),
        Wrong(M, mixed(codes_as=torch.int16), "overflow"),
        Wrong(M, mixed(thin=thin("none")), "16 bits is missing"),
        Wrong(M, mixed(thin=thin("codes")), "are codes"),
        Wrong(M, mixed(thin=thin("no a_w")), "lack a_w"),
        Wrong(M, mixed(thin=thin("127")), "127 times too large"),
        Wrong(M, mixed(thin=thin("axis")), "on the wrong axis"),
        Wrong(M, mixed(scaled=scale("no a_x")), "lacks a_x"),
        Wrong(M, mixed(scaled=scale("no a_w")), "lacks a_w"),
        Wrong(M, mixed(scaled=scale("no scales")), "lacks a_x and a_w"),
        Wrong(M, mixed(scaled=scale("127")), "127 times too large"),
        Wrong(M, mixed(scaled=scale("127²")), "127² times too large"),
        Wrong(M, mixed(scaled=scale("a_w")), "a_w is on the wrong axis"),
        Wrong(M, mixed(scaled=scale("a_x")), "a_x is on the wrong axis"),
        Wrong(M, mixed(scaled=scale("none")), "8 bits is missing"),
        Wrong(F, features(large=lambda h, alpha: h >= alpha), "compare |h|"),
        Wrong(F, features(large=lambda h, alpha: h.abs() > alpha), "alpha itself"),
        Wrong(F, features(large=lambda h, alpha: h.abs() >= 6), "is it used?"),
        Wrong(
            F,
            features(layers=lambda b: b.any(1).float().mean(0) > 0.25),
            "exactly 25%",
        ),
        Wrong(
            F, features(values=lambda b: b.float().mean((0, 1)) > 0.06), "exactly 6%"
        ),
        Wrong(F, features(joined=lambda a, b: a), "only the layers"),
        Wrong(F, features(joined=lambda a, b: b), "only the values"),
        Wrong(F, features(joined=lambda a, b: a | b), "both must hold"),
        Wrong(F, features(values=of_affected_layers), "affected layers"),
        Wrong(
            F,
            features(values=lambda b: b.any(0).float().mean(0) >= 0.06),
            "large in any layer",
        ),
        Wrong(
            F,
            features(layers=lambda b: b.all(1).float().mean(0) >= 0.25),
            "large for all tokens",
        ),
        Wrong(
            F,
            features(
                layers=lambda b: b.any(1).float().mean(0) >= 0.06,
                values=lambda b: b.float().mean((0, 1)) >= 0.25,
            ),
            "swapped",
        ),
        Wrong(F, features(layers=lambda b: b.any(1).sum(0) >= 2), "take shares"),
        Wrong(F, features(gives=lambda f: torch.nonzero(f).flatten()), "a tensor"),
        Wrong(F, features(gives=lambda f: f.tolist()), "whole numbers"),
        Wrong(
            F,
            features(gives=lambda f: torch.nonzero(f).flatten().tolist()[::-1]),
            "in order",
        ),
    ],
)
