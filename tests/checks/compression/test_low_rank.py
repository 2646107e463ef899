"""Wrong answers to the exercises of 06-compression/14-low-rank, each with the diagnosis
that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.low_rank import check
from llmlab.compression.low_rank import E2M1, MXFP4, block_formats, float_formats
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def svd_with(u=lambda s: s, v=lambda s: torch.ones_like(s), last=False, change=None):
    """truncate with other powers of σ in A and B."""

    def answer(W, rank):
        W = W if change is None else change(W)
        U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
        kept = slice(-rank, None) if last else slice(rank)
        return U[:, kept] * u(sigma[kept]), v(sigma[kept])[:, None] * Vt[kept]

    return answer


def by_eigenvectors(W, rank):
    """A projection on the first eigenvectors of W Wᵀ."""
    _, vectors = torch.linalg.eigh(W.double() @ W.T.double())
    A = vectors[:, -rank:].float()
    return A, A.T @ W


def transposed_v(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    if W.shape[0] != W.shape[1]:
        return svd_with()(W, rank)
    return U[:, :rank] * sigma[:rank], Vt.T[:rank]


def rows_of_u(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    if W.shape[0] != W.shape[1]:
        return svd_with()(W, rank)
    return U[:rank].T * sigma[:rank], Vt[:rank]


def without_largest(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, 1 : rank + 1] * sigma[1 : rank + 1], Vt[1 : rank + 1]


def rows_scaled(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return (sigma[:, None] * U)[:, :rank], Vt[:rank]


def by_qr(W, rank):
    Q, _ = torch.linalg.qr(W)
    return Q[:, :rank], Q[:, :rank].T @ W


def one_less(W, rank):
    A, B = svd_with()(W, rank)
    A[:, -1] = 0
    return A, B


def rank_of_three(W, rank):
    A, B = svd_with()(W, min(3, *W.shape))
    return A, B


def swapped(W, rank):
    return svd_with()(W, rank)[::-1]


def all_of_them(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U * sigma, Vt


def only_product(W, rank):
    A, B = svd_with()(W, rank)
    return A @ B


def in_place(W, rank):
    A, B = svd_with()(W, rank)
    W.sub_(A @ B)
    return A, B


# 2 ------------------------------------------------------------------------------------


def whiten(
    factor=torch.linalg.cholesky,
    there=lambda S: S,
    back=torch.linalg.inv,
    power=1.0,
    last=False,
):
    """truncate_whitened with one thing changed."""

    def answer(W, gram, rank):
        S = factor(gram)
        U, sigma, Vt = torch.linalg.svd(W @ there(S), full_matrices=False)
        kept = slice(-rank, None) if last else slice(rank)
        return U[:, kept] * sigma[kept] ** power, Vt[kept] @ back(S)

    return answer


def symmetric_root(gram):
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.sqrt() @ vectors.T).float()


def by_projection(W, gram, rank):
    """The best A B is a projection of W on directions of its outputs."""
    wide, gram = W.double(), gram.double()
    _, vectors = torch.linalg.eigh(wide @ gram @ wide.T)
    A = vectors[:, -rank:].float()
    return A, A.T @ W


def solved(W, gram, rank):
    S = torch.linalg.cholesky(gram)
    U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    B = torch.linalg.solve(S.T, Vt[:rank].T).T
    return U[:, :rank], sigma[:rank, None] * B


def identity(S):
    return torch.eye(len(S))


def s_on_the_left(W, gram, rank):
    S = torch.linalg.cholesky(gram)
    A, B = svd_with()(S @ W, rank)
    return torch.linalg.solve(S, A), B


def undone_on_the_left(W, gram, rank):
    S = torch.linalg.cholesky(gram)
    A, B = svd_with()(W @ S, rank)
    return torch.linalg.solve(S, A), B


def whitened_one_less(W, gram, rank):
    A, B = whiten()(W, gram, rank)
    A[:, -1] = 0
    return A, B


def diagonal_root(gram):
    return gram.diagonal().sqrt().diag()


# 3 ------------------------------------------------------------------------------------

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDDLE = (LEVELS[1:] + LEVELS[:-1]) / 2


def codes_of(code, sign=lambda x: 8 * x.signbit()):
    """e2m1_codes from a rule for |x| and one for the sign."""

    def answer(x):
        return (code(x.abs()) + sign(x)).to(torch.uint8)

    return answer


def even(size):
    return float_formats.encode(size, E2M1).int()


def by_distance(x):
    """The nearest of all levels, even codes first."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    distance = (x.abs()[..., None].double() - LEVELS[order].double()).abs()
    code = torch.tensor(order)[distance.argmin(-1)]
    return (code | (x.signbit().int() << 3)).to(torch.uint8)


def by_steps(x):
    """Round to half steps, whole steps and double steps."""
    size = x.abs()
    half = torch.round(size * 2)
    whole = torch.round(size) + 2
    double = torch.round(size / 2) + 4
    code = torch.where(size < 2, half, torch.where(size < 4, whole, double))
    return (code.clamp(max=7) + 8 * x.signbit()).to(torch.uint8)


def below(size):
    return (size[..., None] >= LEVELS[1:]).sum(-1)


def integers(size):
    return size.round().clamp(max=7).int()


def above(size):
    return (size[..., None] > LEVELS[:-1]).sum(-1)


def lowest_bit(x):
    return (2 * even(x.abs()) + x.signbit()).to(torch.uint8)


def twos_complement(x):
    code = even(x.abs())
    return torch.where(x < 0, -code % 16, code).to(torch.uint8)


def below_256(x):
    code = even(x.abs())
    return torch.where(x < 0, -code, code).to(torch.uint8)


def in_order(x):
    code = even(x.abs())
    return torch.where(x < 0, 7 - code, 8 + code).to(torch.uint8)


def no_subnormal(size):
    return (size[..., None] > MIDDLE[2:]).sum(-1) + 2 * (size > 0.5)


def one_more(size):
    return torch.where(size > 7, 8, even(size))


def wraps(size):
    return torch.where(size > 7, 0, even(size))


def no_negative_zero(x):
    code = even(x.abs())
    return torch.where((x < 0) & (code > 0), code + 8, code).to(torch.uint8)


def even_level(size):
    up = (size[..., None] >= MIDDLE).sum(-1)
    return torch.where(LEVELS[up] % 2 == 0, up, (size[..., None] > MIDDLE).sum(-1))


def ties_to(of_positive, of_negative):
    """e2m1_codes whose ties depend on the sign."""

    def answer(x):
        size = x.abs()[..., None]
        passed = {"up": (size >= MIDDLE).sum(-1), "down": (size > MIDDLE).sum(-1)}
        code = torch.where(x < 0, passed[of_negative], passed[of_positive])
        return (code + 8 * x.signbit()).to(torch.uint8)

    return answer


def the_levels(x):
    value = LEVELS[even(x.abs())]
    return torch.where(x.signbit(), -value, value).to(torch.uint8)


def matrix_only(x):
    code = by_distance(x)
    return code if x.dim() == 2 else torch.zeros_like(code)


# 4 ------------------------------------------------------------------------------------


def blocks(
    top=lambda x: x.abs().amax(1, keepdim=True),
    exponent=lambda top: torch.frexp(top)[1] - 3,
    bias=127,
    pack=lambda c: c[:, 0::2] | c[:, 1::2] << 4,
    divide=torch.div,
    clamp=True,
    low=0,
    encode=lambda x: float_formats.encode(x, E2M1),
    zero=0,
    stored_scale=True,
):
    """encode_mxfp4 with one thing changed."""

    def answer(x):
        largest = top(x)
        e = exponent(largest)
        X = torch.ldexp(torch.ones_like(largest), e)
        if clamp:
            e = torch.where(largest == 0, zero - 127, e.clamp(min=low - 127))
        if clamp and stored_scale:
            X = block_formats.e8m0_values((e + 127).to(torch.uint8))
        codes = encode(divide(x, X).nan_to_num(0))
        scale = (e + bias) % 256
        return pack(codes), scale.expand(len(x), 1)[:, 0].to(torch.uint8)

    return answer


def by_the_package(x):
    stored = block_formats.encode(x, MXFP4)
    return block_formats.pack_nibbles(stored.codes), stored.scale[:, 0]


def block_by_block(x):
    """Python numbers, one block after the other."""
    packed, scales = [], []
    for row in x.double():
        top = float(row.abs().max())
        e = -127
        while top > 0 and e < 127 and 2.0 ** (e + 3) <= top:
            e += 1
        scales.append(e + 127)
        codes = by_distance((row * 2.0**-e).float()).tolist()
        packed.append([codes[i] + 16 * codes[i + 1] for i in range(0, 32, 2)])
    return (
        torch.tensor(packed, dtype=torch.uint8),
        torch.tensor(scales, dtype=torch.uint8),
    )


def wraps_below(x):
    """A block of zeros is minded, a small one is not."""
    packed, scale = blocks(clamp=False)(x)
    return packed, torch.where((x == 0).all(1), 0, scale.int()).to(torch.uint8)


def floor_of_log(top):
    return top.log2().floor().nan_to_num(0, 0, -200).int() - 2


def ceil_of_log(top):
    return top.log2().ceil().nan_to_num(0, 0, -200).int() - 2


def rounded_log(top):
    return top.log2().round().nan_to_num(0, 0, -200).int() - 2


def largest(x):
    return x.amax(1, keepdim=True)


def carried(top):
    return block_formats.carry_rule(top, E2M1)


def never_clipped(top):
    return block_formats.ceil_rule(top, E2M1)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("truncate", by_eigenvectors),
        ("truncate", svd_with(u=torch.ones_like, v=lambda s: s)),
        ("truncate_whitened", whiten(symmetric_root)),
        ("truncate_whitened", by_projection),
        ("truncate_whitened", solved),
        ("e2m1_codes", by_distance),
        ("e2m1_codes", by_steps),
        ("encode_mxfp4", by_the_package),
        ("encode_mxfp4", block_by_block),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


T, W, C, M = "truncate", "truncate_whitened", "e2m1_codes", "encode_mxfp4"
test_wrong_answers = rejects(
    "06-compression/14-low-rank",
    [
        Wrong(T, svd_with(u=torch.ones_like), "the singular values are missing"),
        Wrong(T, svd_with(v=lambda s: s), "counted twice"),
        Wrong(T, svd_with(u=torch.sqrt), "only one of the factors has the root"),
        Wrong(T, svd_with(last=True), "the smallest singular values"),
        Wrong(T, without_largest, "the largest singular value is left out"),
        Wrong(T, rows_scaled, "the rows of U: they belong"),
        Wrong(T, by_qr, "as with QR"),
        Wrong(T, one_less, "one singular value too few"),
        Wrong(T, transposed_v, "do not transpose it"),
        Wrong(T, rows_of_u, "rows of U"),
        Wrong(T, svd_with(change=lambda m: m - m.mean(0)), "took the mean off"),
        Wrong(T, all_of_them, "keep the first `rank` alone"),
        Wrong(T, rank_of_three, "shape"),
        Wrong(T, swapped, "dimensions 0 and 1 are swapped"),
        Wrong(T, only_product, "tuple"),
        Wrong(T, in_place, "in place"),
        Wrong(W, lambda m, g, r: svd_with()(m, r), "plain truncation"),
        Wrong(W, whiten(back=identity), "S is not taken out again"),
        Wrong(W, whiten(back=lambda S: S), "multiplied by S again"),
        Wrong(
            W,
            whiten(there=lambda S: S.T, back=lambda S: torch.linalg.inv(S).T),
            "this is Sᵀ",
        ),
        Wrong(W, whiten(back=lambda S: torch.linalg.inv(S).T), "taken out transposed"),
        Wrong(W, whiten(factor=lambda g: g), "X Xᵀ itself: its factor"),
        Wrong(W, whiten(factor=lambda g: g, back=identity), "did not take it out"),
        Wrong(W, whiten(back=lambda S: S.T), "multiplied by Sᵀ"),
        Wrong(
            W, whiten(there=torch.linalg.inv, back=lambda S: S), "S and S⁻¹ are swapped"
        ),
        Wrong(
            W,
            lambda m, g, r: whiten()(m @ torch.linalg.cholesky(g), g, r),
            "S comes in twice",
        ),
        Wrong(
            W,
            whiten(factor=lambda g: torch.linalg.cholesky(torch.linalg.inv(g))),
            "the inverse of X Xᵀ in the place",
        ),
        Wrong(W, s_on_the_left, "S stands on the left"),
        Wrong(W, undone_on_the_left, "at the side of A"),
        Wrong(W, whitened_one_less, "one singular value too few"),
        Wrong(W, whiten(diagonal_root), "only the diagonal"),
        Wrong(W, whiten(power=0), "the singular values are missing"),
        Wrong(W, whiten(power=2), "counted twice"),
        Wrong(W, whiten(power=0.5), "only one of the factors"),
        Wrong(W, whiten(last=True), "the smallest singular values"),
        Wrong(C, codes_of(lambda s: (s[..., None] >= MIDDLE).sum(-1)), "the larger"),
        Wrong(C, codes_of(lambda s: (s[..., None] > MIDDLE).sum(-1)), "the smaller"),
        Wrong(C, codes_of(even_level), "the even *code* is asked"),
        Wrong(C, ties_to("down", "up"), "the smaller number"),
        Wrong(C, ties_to("up", "down"), "the larger number"),
        Wrong(C, the_levels, "their codes are asked"),
        Wrong(C, codes_of(even, sign=lambda x: 4 * x.signbit()), "the sign adds 4"),
        Wrong(C, codes_of(even, sign=lambda x: 8 * ~x.signbit()), "wrong way round"),
        Wrong(C, below_256, "256 − code"),
        Wrong(C, codes_of(even, sign=lambda x: 8 * (x <= 0)), "the code of −0"),
        Wrong(
            C, codes_of(lambda size: (2 * size).round().clamp(max=7)), "round(2 |x|)"
        ),
        Wrong(C, codes_of(even, sign=lambda x: 0), "the sign is missing"),
        Wrong(C, lowest_bit, "the sign is the lowest bit"),
        Wrong(C, twos_complement, "two's complement"),
        Wrong(C, in_order, "in the order of the values"),
        Wrong(
            C,
            codes_of(lambda s: (s[..., None] >= LEVELS[1:]).sum(-1)),
            "the level below",
        ),
        Wrong(C, codes_of(above), "the level above"),
        Wrong(C, codes_of(integers), "these are integers"),
        Wrong(C, codes_of(one_more), "values beyond 6 must become 6"),
        Wrong(C, codes_of(wraps), "wrap around"),
        Wrong(C, codes_of(no_subnormal), "the level 0.5 is missing"),
        Wrong(C, no_negative_zero, "loses its sign"),
        Wrong(C, lambda x: by_distance(x).int(), "dtype"),
        Wrong(C, matrix_only, "right for a matrix"),
        Wrong(M, blocks(pack=lambda c: c[:, 0::2] << 4 | c[:, 1::2]), "high half"),
        Wrong(M, blocks(pack=lambda c: c[:, :16] | c[:, 16:] << 4), "i and i + 16"),
        Wrong(M, blocks(exponent=never_clipped), "nothing is clipped"),
        Wrong(M, blocks(exponent=carried), "carries over at 7"),
        Wrong(
            M,
            blocks(exponent=rounded_log),
            "log2 is rounded to nearest",
        ),
        Wrong(M, blocks(exponent=lambda t: torch.frexp(t)[1] - 1), "e_max is missing"),
        Wrong(M, blocks(exponent=lambda t: torch.frexp(t)[1] - 7), "not the largest"),
        Wrong(M, blocks(bias=0), "the bias is missing"),
        Wrong(M, blocks(bias=128), "the bias is 128"),
        Wrong(M, blocks(top=largest), "that of x, not of |x|"),
        Wrong(
            M,
            blocks(top=lambda x: x.abs().max().expand(len(x), 1)),
            "the largest |x| of all blocks",
        ),
        Wrong(M, blocks(top=lambda x: x.abs().mean(1, keepdim=True)), "the mean |x|"),
        Wrong(M, blocks(divide=lambda x, X: x), "not divided by the scale"),
        Wrong(M, blocks(divide=torch.mul), "multiplied by the scale"),
        Wrong(M, blocks(clamp=False), "a block of zeros is to have code 0"),
        Wrong(M, blocks(zero=127), "a block of zeros is to have code 0"),
        Wrong(M, blocks(pack=lambda c: c[:, 0::2]), "two codes share it"),
        Wrong(
            M,
            blocks(divide=lambda x, X: 6 * x / x.abs().amax(1, keepdim=True)),
            "divide by the power of two",
        ),
        Wrong(M, blocks(exponent=lambda t: torch.frexp(t)[1] - 5), "subtracted twice"),
        Wrong(M, wraps_below, "clamp it to 0"),
        Wrong(M, blocks(low=1), "clamp it to 0"),
        Wrong(M, blocks(stored_scale=False), "divide by the scale that is stored"),
        Wrong(M, blocks(exponent=floor_of_log), "just below a power of two"),
        Wrong(M, blocks(exponent=ceil_of_log), "the exponent is one too large"),
        Wrong(
            M, blocks(exponent=lambda t: torch.frexp(t)[1] - 2), "torch.frexp is one"
        ),
        Wrong(M, blocks(exponent=lambda t: torch.frexp(t)[1] - 4), "one too small"),
        Wrong(M, blocks(pack=lambda c: c[:, 0::2] | c[:, 1::2] << 3), "at bit 4"),
        Wrong(M, blocks(encode=lambda x: even(x.abs()).to(torch.uint8)), "the signs"),
        Wrong(
            M,
            blocks(encode=codes_of(lambda s: (s[..., None] > MIDDLE).sum(-1))),
            "ties of the elements go to the smaller",
        ),
        Wrong(
            M,
            blocks(encode=codes_of(lambda s: (s[..., None] >= MIDDLE).sum(-1))),
            "ties of the elements go to the larger",
        ),
        Wrong(M, lambda x: blocks()(x)[::-1], "shape"),
    ],
)
