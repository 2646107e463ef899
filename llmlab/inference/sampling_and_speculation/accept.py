"""Which drafted tokens stay, so that the output has the target's distribution.

Leviathan, Kalman & Matias 2022, https://arxiv.org/abs/2211.17192, algorithm 1, and Chen
et al. 2023, https://arxiv.org/abs/2302.01318. A draft proposes x_1 … x_γ, drawn from
its distributions q_1 … q_γ; one pass of the target gives p_1 … p_γ+1. From first to
last

    x_i stays with probability min(1, p_i(x_i) / q_i(x_i))
    the first that does not is replaced by a draw from norm(max(p_i − q_i, 0)), the end
    when all stay, one token more is drawn from p_γ+1 (the bonus)

    then  P(x) = min(p, q) + (1 − Σ min(p, q)) · max(p − q, 0) / Σ max(p − q, 0) = p

whatever q is, as long as the token was drawn from it. What q decides is how many stay:
α = Σ min(p, q) = 1 − the total variation distance. When both are one-hot (greedy), a
token stays if it is the target's; when q is one-hot (a token looked up, not drawn), it
stays with probability p(x).

    p  target, (γ+1, V)      q  draft, (γ, V)      u  uniforms in [0, 1), (γ+1,)
    γ  drafted tokens        V  vocabulary         α  probability that a token stays
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# (p, q, drafted, u) → the tokens that are kept
Rule = Callable[[Tensor, Tensor, list[int], Tensor], list[int]]
ROUNDING = 1e-12  # what two sums of the same probabilities may differ by
# A model as a table: the text so far → probabilities of the next token, (V,)
Table = Callable[[tuple[int, ...]], Tensor]


def draw(p: Float[Tensor, "vocab"], u: float | Tensor) -> int:
    """The token whose stretch of [0, 1) holds u, when all lie end to end with length p.

    The cumulative sum may end a rounding error below 1: then the last token that has
    any probability is taken.
    """
    token = int((p.cumsum(-1) <= u).sum())
    return min(token, int(p.nonzero()[-1]))


def residual(
    p: Float[Tensor, "vocab"], q: Float[Tensor, "vocab"]
) -> Float[Tensor, "vocab"]:
    """norm(max(p − q, 0)): where the target has more than the draft has given.

    With p = q nothing is ever rejected, and the residual is not needed: it is p.
    """
    more = (p - q).clamp(min=0)
    total = more.sum()
    return more / total if total > 0 else p


def accept(
    p: Float[Tensor, "gamma_and_1 vocab"],
    q: Float[Tensor, "gamma vocab"],
    drafted: list[int],
    u: Float[Tensor, "gamma_and_1"],
) -> list[int]:
    """The drafted tokens that stay, and one token more.

    Args:
        u: the first γ decide who stays (if u < p / q), the last one draws the token.
    """
    for i, x in enumerate(drafted):
        if u[i] * q[i, x] >= p[i, x]:  # rejected: the text ends here, with a correction
            return [*drafted[:i], draw(residual(p[i], q[i]), u[-1])]
    return [*drafted, draw(p[len(drafted)], u[-1])]  # the bonus


def accept_children(
    p: Float[Tensor, "vocab"],
    q: Float[Tensor, "vocab"],
    children: Sequence[int],
    u: Float[Tensor, "children_and_1"],
) -> tuple[int | None, int]:
    """One step of a tree: several tokens for one place, drawn from q one after the
    other, none twice.

    Each is tried as in `accept`. When one is rejected, p becomes the residual, and q
    loses the token, as it could not be drawn again (recursive rejection sampling,
    https://arxiv.org/abs/2402.14160; SpecInfer draws with replacement).

    Returns:
        Which child stays (None: none of them), and the token.
    """
    for i, x in enumerate(children):
        if u[i] * q[x] < p[x]:
            return i, x
        p = residual(p, q)
        q = q.clone()
        q[x] = 0
        q = q / q.sum() if q.sum() > 0 else q
    return None, draw(p, u[-1])


# What comes out, exactly ------------------------------------------------------------


def acceptance_rate(
    p: Float[Tensor, "*any vocab"], q: Float[Tensor, "*any vocab"]
) -> Float[Tensor, "*any"]:
    """α = Σ min(p, q), the probability that a drafted token stays."""
    return torch.minimum(p, q).sum(-1)


def outcomes(
    rule: Rule,
    p: Float[Tensor, "gamma_and_1 vocab"],
    q: Float[Tensor, "gamma vocab"],
    drafted: list[int],
    grid: int = 1,
) -> dict[tuple[int, ...], float]:
    """What `rule` keeps of these drafted tokens: each outcome with its probability.

    No draw is made. The answer of `accept` changes only where a uniform crosses p / q,
    or a step of a cumulative sum. So [0, 1) is cut there, the rule is asked once for
    each cell, and the size of the cell is the probability. That is exact for a rule
    that decides by p / q and draws from a residual, a row of p or a row of q; another
    rule is seen to be wrong, but how wrong it is depends on the cells.

    Args:
        grid: equal stretches into which [0, 1) is cut besides; more show more rules to
            be wrong, and change nothing for one that is right.
    """
    even = [i / grid for i in range(1, grid)]
    cuts = []
    for i, x in enumerate(drafted):
        ratio = float(p[i, x] / q[i, x]) if q[i, x] > 0 else 1.0
        cuts.append([min(ratio, 1.0), *even])
    ends = [residual(a, b) for a, b in zip(p, q, strict=False)]
    sums = [c for row in (*ends, *p, *q) for c in row.cumsum(-1).tolist()]
    cuts.append([*sums, *even])
    cells = [_cells(each) for each in cuts]
    found: dict[tuple[int, ...], float] = {}
    for combination in itertools.product(*cells):
        u = torch.tensor([middle for middle, _ in combination], dtype=p.dtype)
        size = math.prod(width for _, width in combination)
        kept = tuple(rule(p, q, list(drafted), u))
        found[kept] = found.get(kept, 0.0) + size
    return found


def _cells(cuts: Sequence[float]) -> list[tuple[float, float]]:
    """The middle and the width of each stretch of [0, 1] between the cuts.

    Cuts that are a rounding error apart are one: nothing lies between them.
    """
    borders = [0.0]
    for cut in sorted(cuts):
        if borders[-1] + ROUNDING < cut < 1 - ROUNDING:
            borders.append(cut)
    borders.append(1.0)
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(borders)]


def emitted(
    rule: Rule,
    target: Table,
    draft: Table,
    gamma: int,
    claimed: Table | None = None,
    grid: int = 1,
) -> dict[tuple[int, ...], float]:
    """One round of speculation with two models that are tables: what is put out.

    All V^γ drafts are gone through. Texts that end early are continued with the target
    alone, to γ + 1 tokens each: the result can be laid beside `target_distribution`.

    Args:
        claimed: what the rule is told that the tokens were drawn from; None is the
            truth, `draft`.
        grid: as in `outcomes`.
    """
    told = draft if claimed is None else claimed
    vocab = len(target(()))
    found: dict[tuple[int, ...], float] = {}
    for drafted in itertools.product(range(vocab), repeat=gamma):
        texts = [drafted[:i] for i in range(gamma + 1)]
        p = torch.stack([target(text) for text in texts])
        # one row more than the draft has drawn from: with γ = 0 there would be none
        q = torch.stack([told(text) for text in texts])[:gamma]
        chance = math.prod(float(draft(drafted[:i])[x]) for i, x in enumerate(drafted))
        if chance == 0:
            continue
        for kept, share in outcomes(rule, p, q, list(drafted), grid).items():
            rest = target_distribution(target, gamma + 1 - len(kept), kept)
            for text, tail in rest.items():
                found[text] = found.get(text, 0.0) + chance * share * tail
    return found


def target_distribution(
    target: Table, length: int, start: tuple[int, ...] = ()
) -> dict[tuple[int, ...], float]:
    """Every text of `length` more tokens after `start`, with its probability."""
    texts = {start: 1.0}
    for _ in range(length):
        longer = {}
        for text, chance in texts.items():
            for token, p in enumerate(target(text).tolist()):
                longer[(*text, token)] = chance * p
        texts = longer
    return texts
