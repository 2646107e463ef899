"""Checks of 07-inference/02-flash-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.inference import flash_attention as flash

check = Checks("07-inference/02-flash-attention")

Triple = tuple[Tensor, Tensor, Tensor]


def results(value, shapes: Mapping[str, tuple], what: str) -> tuple[Tensor, ...]:
    """The tensors of an answer that returns several, each of the right kind."""
    if value is None:
        raise Mistake(f"{what} returned None: is there a `return` at its end?")
    if not isinstance(value, tuple | list) or len(value) != len(shapes):
        raise Mistake(
            f"{what} must return {len(shapes)} tensors, in this order:"
            f" {', '.join(shapes)}"
        )
    for x, (name, shape) in zip(value, shapes.items(), strict=True):
        expect(x, shape=shape, dtype=torch.float32, finite=False, what=name)
    return tuple(value)


def state_of(value, T: int, D: int, what: str) -> Triple:
    """m, l and O of an answer."""
    return results(value, {"m": (2, T), "l": (2, T), "O": (2, T, D)}, what)


def not_a_number(found: Triple, blind: bool, large: bool) -> None:
    """NaN, and where it comes from."""
    m, l, O = found
    if m.isnan().any() or l.isnan().any() or O.isnan().any():
        if blind:
            raise Mistake(
                "NaN where a query has seen no key at all: there m is −∞, and"
                " −∞ − (−∞) is NaN. Its l and O are 0"
            )
        if large:
            raise Mistake("NaN with scores in the hundreds: only take e^ of S − m")
        raise Mistake("the result holds NaN: −∞ − (−∞), 0 · ∞, or 0 / 0")
    if l.isinf().any() or O.isinf().any():
        raise Mistake(
            "infinity with scores in the hundreds: e^ of a score overflows. Take the"
            " maximum away first: the exponent is never above 0"
            if large
            else "infinity: the exponent of e^ must never be above 0"
        )


def compare_states(
    found: Triple,
    right: Triple,
    wrong: dict[str, Callable[[], Triple]],
    what: str,
    tol: float,
) -> None:
    """m, l and O one by one, so that two slips are told one after the other."""
    for i, name in enumerate("mlO"):
        mistakes = {}
        for words, value in wrong.items():
            made = value()[i]
            if not close(made, right[i], 10 * tol):
                mistakes[words.replace("{x}", name)] = made
        diagnose(
            found[i],
            right=right[i],
            mistakes=mistakes,
            tol=tol,
            what=f"{name} of {what}",
        )


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "The new maximum is the larger of m and the largest new score. What was"
            " summed before was summed with the old one."
        ),
        (
            "α = e^(m − m_new) corrects the old sums, both l and O. The new terms are"
            " P = e^(S − m_new), and P @ V."
        ),
        (
            "Where m_new is −∞, subtract 0 in its place: `torch.where(m_new =="
            " -torch.inf, 0.0, m_new)`. Then e^(−∞ − 0) is the 0 that is right."
        ),
    ),
)
def online_softmax(answer):
    """The running maximum, sum and output after a block of keys."""
    what = "online_softmax(m, l, O, S, V)"
    for T, n, D, size, at in (
        (4, 4, 4, 1.0, 0),
        (3, 5, 2, 1.0, -9),
        (5, 2, 3, 200.0, 0),
    ):
        # the maximum grows for the first queries and stays for the last
        rises = torch.linspace(2, -2, T)
        seen = torch.randn(2, T, 6) * size + at
        values = torch.randn(2, 6, D)
        state = flash.online_softmax(*flash.start((2, T, D), seen), seen, values)
        S = torch.randn(2, T, n) * size + rises[:, None] * size + at
        V = torch.randn(2, n, D)
        found = state_of(answer(*state, S, V), T, D, what)
        not_a_number(found, blind=False, large=size > 1)
        right = flash.online_softmax(*state, S, V)
        compare_states(
            found, right, wrong_updates(*state, S, V), what, 1e-5 if size == 1 else 1e-4
        )
    check_blind(answer, what)


def check_blind(answer, what: str) -> None:
    """Queries that have seen nothing yet, see nothing now, or neither."""
    T, n, D = 4, 3, 2
    seen = torch.randn(2, T, 5)
    seen[:, :2] = -torch.inf
    state = flash.online_softmax(
        *flash.start((2, T, D), seen), seen, torch.randn(2, 5, D)
    )
    S = torch.randn(2, T, n)
    S[:, 1:3] = -torch.inf
    V = torch.randn(2, n, D)
    found = state_of(answer(*state, S, V), T, D, what)
    right = flash.online_softmax(*state, S, V)
    not_a_number(found, blind=True, large=False)
    for i, name in enumerate("mlO"):
        if close(found[i], right[i], 1e-5):
            continue
        if i == 0 and found[0].isfinite().all():
            raise Mistake(
                "m of a query that has seen no key must stay −∞: use 0 in the"
                " subtraction only"
            )
        raise Mistake(
            f"right where every query sees keys, but {name} is wrong where one has seen"
            " none before, or sees none in this block: its S are −∞, its m was −∞"
        )


def wrong_updates(m, l, O, S, V) -> dict[str, Callable[[], Triple]]:
    """Diagnosis → what this mistake makes of m, l and O."""
    top = S.amax(-1)
    new = torch.maximum(m, top)

    P = (S - new[..., None]).exp()
    alpha = (m - new).exp()

    def with_(P=P, alpha=alpha, new=new, old=1.0) -> Triple:
        before = old * alpha
        return new, before * l + P.sum(-1), before[..., None] * O + P @ V

    _, right_l, right_O = with_()
    P_own = (S - top[..., None]).exp()
    share = right_l[..., None]
    return {
        "{x} is that of this block alone: the keys seen before are forgotten": lambda: (
            with_(P=P_own, new=top, old=0.0)
        ),
        "the old {x} is missing: add what was summed before": lambda: with_(old=0.0),
        "{x} is as it was before": lambda: (m, l, O),
        "the old {x} is not rescaled: it was summed with the old maximum, so multiply"
        " it by α = e^(m − m_new)": lambda: with_(alpha=torch.ones_like(alpha)),
        "α is upside down in {x}: e^(m − m_new), which is 1 at most": lambda: with_(
            alpha=1 / alpha
        ),
        "the new terms of {x} use the block's own maximum: they need m_new, as the old"
        " ones do": lambda: with_(P=P_own),
        "the new terms of {x} use the old maximum: they need m_new": lambda: with_(
            P=(S - m[..., None]).exp()
        ),
        "the new terms of {x} are rescaled, too: α belongs to the old ones": lambda: (
            new,
            alpha * (l + P.sum(-1)),
            alpha[..., None] * (O + P @ V),
        ),
        "{x} uses e^ of the block's softmax: P is e^(S − m_new), not divided by its"
        " sum": lambda: with_(P=S.softmax(-1)),
        "{x} has the mean of P where its sum is asked": lambda: (
            new,
            alpha * l + P.mean(-1),
            alpha[..., None] * O + P @ V / S.shape[-1],
        ),
        "{x} is divided by l here: that comes once, at the end": lambda: (
            new,
            right_l,
            right_O / share,
        ),
        "the old {x} is multiplied by l again: our O was never divided by it": lambda: (
            new,
            right_l,
            (alpha * l)[..., None] * O + P @ V,
        ),
        "{x} holds powers of 2: e is asked": lambda: with_(
            P=torch.exp2(S - new[..., None]), alpha=torch.exp2(m - new)
        ),
        "{x} adds up over the queries: the sum runs over the keys": lambda: (
            new,
            alpha * l + (P.sum(-2) if P.shape[-1] == P.shape[-2] else P.sum(-1)),
            alpha[..., None] * O + (P.mT if P.shape[-1] == P.shape[-2] else P) @ V,
        ),
    } | wrong_maxima(m, S, right_l, right_O)


def wrong_maxima(m, S, right_l, right_O) -> dict[str, Callable[[], Triple]]:
    """Diagnosis → what a mistake in the new maximum makes of m, l and O.

    Where l and O follow from m, m alone is told.
    """
    top = S.amax(-1)
    new = torch.maximum(m, top)

    def of(other: Tensor) -> Callable[[], Triple]:
        return lambda: (other, right_l, right_O)

    return {
        "{x} is the sum of both maxima: the larger is asked": of(m + top),
        "{x} is the smaller of the two: the larger is asked": of(torch.minimum(m, top)),
        "{x} is 0 at least here: all scores may be negative": of(new.clamp(min=0)),
        "{x} is one maximum for all queries: each has its own": of(
            torch.maximum(m, S.max())
        ),
        "{x} is summed without its maximum: the exponent is S − m_new": lambda: (
            new,
            right_l * new.exp(),
            right_O * new.exp()[..., None],
        ),
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "It is the step of exercise 1, but both sides may have to be rescaled.",
        "With m the larger maximum: α = e^(m_a − m) for a, β = e^(m_b − m) for b.",
        "Where m is −∞, subtract 0 in its place, on both sides.",
    ),
)
def merge(answer):
    """Two partial results over different keys, as one."""
    what = "merge(m_a, l_a, O_a, m_b, l_b, O_b)"
    for T, D, size in ((4, 3, 1.0), (5, 2, 200.0)):
        a, b = (
            partial(torch.randn(2, T, 6) * size + shift * size, D)
            for shift in (torch.linspace(1.5, -1.5, T)[:, None], 0)
        )
        found = state_of(answer(*a, *b), T, D, what)
        not_a_number(found, blind=False, large=size > 1)
        compare_states(
            found,
            flash.merge(*a, *b),
            wrong_merges(*a, *b),
            what,
            1e-5 if size == 1 else 1e-4,
        )
    S = torch.randn(2, 4, 6)
    S[:, 0, :3] = -torch.inf
    S[:, 1, 3:] = -torch.inf
    S[:, 2] = -torch.inf
    a, b = partial(S[..., :3], 2), partial(S[..., 3:], 2)
    found = state_of(answer(*a, *b), 4, 2, what)
    not_a_number(found, blind=True, large=False)
    right = flash.merge(*a, *b)
    for side, name in ((a, "a"), (b, "b")):
        if close(found[0], side[0], 1e-5) and close(found[1], side[1], 1e-5):
            raise Mistake(
                f"all of {name} is returned, as some query has seen no key on the other"
                " side: decide for each query"
            )
    if found[0].isfinite().all():
        raise Mistake(
            "m of a query that has seen no key must stay −∞: use 0 in the subtraction"
            " only"
        )
    for x, y, name in zip(found, right, "mlO", strict=True):
        if not close(x, y, 1e-5):
            raise Mistake(
                f"right where both sides have seen keys, but {name} is wrong where one"
                " or both have seen none: m = −∞, l = 0, O = 0 must change nothing"
            )


def partial(S: Tensor, D: int) -> Triple:
    """m, l, O of some keys."""
    state = flash.start((*S.shape[:-1], D), S)
    return flash.online_softmax(*state, S, torch.randn(2, S.shape[-1], D))


def wrong_merges(m_a, l_a, O_a, m_b, l_b, O_b) -> dict[str, Callable[[], Triple]]:
    """Diagnosis → what this mistake makes of m, l and O."""
    m = torch.maximum(m_a, m_b)
    _, right_l, right_O = flash.merge(m_a, l_a, O_a, m_b, l_b, O_b)

    def weighed(alpha: Tensor, beta: Tensor, m: Tensor = m) -> Triple:
        a, b = alpha[..., None], beta[..., None]
        return m, alpha * l_a + beta * l_b, a * O_a + b * O_b

    alpha, beta = (m_a - m).exp(), (m_b - m).exp()
    one = torch.ones_like(m)
    larger = (m_a > m_b).float()
    return {
        "the two {x} were added as they are: each was summed with its own maximum": (
            lambda: weighed(one, one, m_a + m_b)
        ),
        "the weights of {x} are swapped: a is rescaled by e^(m_a − m)": (
            lambda: weighed(beta, alpha)
        ),
        "only b's {x} is rescaled: where m_a is the smaller, a needs it, too": (
            lambda: weighed(one, beta)
        ),
        "only a's {x} is rescaled: where m_b is the smaller, b needs it, too": (
            lambda: weighed(alpha, one)
        ),
        "the weights of {x} are upside down: e^(m_a − m), which is 1 at most": (
            lambda: weighed(1 / alpha, 1 / beta)
        ),
        "{x} is rescaled to b's maximum: the larger of the two is asked": lambda: (
            weighed((m_a - m_b).exp(), one, m_b)
        ),
        "{x} is rescaled to a's maximum: the larger of the two is asked": lambda: (
            weighed(one, (m_b - m_a).exp(), m_a)
        ),
        "the side with the larger maximum was kept, and {x} of the other dropped": (
            lambda: weighed(larger, 1 - larger)
        ),
        "{x} is the smaller of the two: the larger is asked": lambda: (
            torch.minimum(m_a, m_b),
            right_l,
            right_O,
        ),
        "{x} is the log-sum-exp of both maxima: the larger is asked": lambda: (
            torch.logaddexp(m_a, m_b),
            right_l,
            right_O,
        ),
        "{x} is divided by l here: that comes once, at the end": lambda: (
            m,
            right_l,
            right_O / right_l[..., None],
        ),
        "{x} is weighed by l as well: our O were never divided by it": lambda: (
            m,
            right_l,
            (alpha * l_a)[..., None] * O_a + (beta * l_b)[..., None] * O_b,
        ),
        "half of {x} is missing: a mean was taken, and the sum is asked": lambda: (
            m,
            right_l / 2,
            right_O / 2,
        ),
    }


# 3 ------------------------------------------------------------------------------------

CASES = ((8, 8, 4, 2), (6, 6, 2, 3), (7, 7, 3, 2), (5, 12, 2, 4), (1, 9, 4, 4))
CASES += ((9, 4, 2, 3), (4, 4, 8, 8))


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Query i stands at position S − T + i. Of a block of queries, the last one"
            " sees most, and the first one sees least."
        ),
        (
            "A tile is left out when its first key is later than the last query's"
            " position, S − T + r1 − 1. It needs a mask when its last key, c1 − 1, is"
            " later than the first query's position, S − T + r0."
        ),
        (
            "`for r0 in range(0, T, rows)`, in it `for c0 in range(0, S, cols)`; r1 and"
            " c1 are cut off at T and S with `min`."
        ),
    ),
)
def causal_tiles(answer):
    """The tiles that causal attention computes, and which of them need a mask."""
    found = []
    for case in CASES:
        what = f"causal_tiles{case}"
        got = expect(answer(*case), kind=list, what=what)
        found.append([one_tile(tile, what) for tile in got])
    right = [flash.causal_tiles(*case) for case in CASES]
    if found == right:
        return
    for words, plan in wrong_plans().items():
        if found == [plan(*case) for case in CASES]:
            raise Mistake(words)
    for case, got, wanted in zip(CASES, found, right, strict=True):
        if got != wanted:
            raise Mistake(first_difference(case, got, wanted), foreseen=False)


def one_tile(tile, what: str) -> tuple[int, int, int, int, bool]:
    """A tile as the exercise describes it."""
    if not isinstance(tile, tuple | list) or len(tile) != 5:
        raise Mistake(
            f"{what}: each entry must be (r0, r1, c0, c1, masked), and one is {tile!r}"
        )
    entries = []
    for x, name in zip(tile, ("r0", "r1", "c0", "c1", "masked"), strict=True):
        plain = x.item() if hasattr(x, "item") else x
        kind = bool if name == "masked" else int
        if type(plain) is not kind:
            asked = "True or False" if kind is bool else "an int"
            raise Mistake(f"{what}: {name} of a tile is {x!r}, where {asked} is asked")
        entries.append(plain)
    return tuple(entries)


def first_difference(case: tuple, got: list, wanted: list) -> str:
    """Where a plan goes wrong, without the right one."""
    what = "causal_tiles(T={}, S={}, rows={}, cols={})".format(*case)
    places = [tile[:4] for tile in got]
    for tile in wanted:
        if tile[:4] not in places:
            return (
                f"{what} lacks a tile that starts at query {tile[0]} and key {tile[2]}"
            )
    for tile in got:
        if tile[:4] not in [w[:4] for w in wanted]:
            return f"{what} has a tile too many: {tile[:4]}"
    if sorted(got) == sorted(wanted):
        return f"{what}: the tiles are right, their order is not"
    for tile in wanted:
        if tile not in got:
            return f"{what}: `masked` is wrong for the tile {tile[:4]}"
    return f"{what} has a tile twice"


def planned(
    keep: Callable = lambda p0, p1, c0, c1: c0 <= p1,
    masked: Callable = lambda p0, p1, c0, c1: c1 - 1 > p0,
    past: Callable = lambda T, S: S - T,
    clip: bool = True,
    whole: bool = False,
    keys_outside: bool = False,
    full_cols: bool = False,
) -> Callable[[int, int, int, int], list]:
    """causal_tiles with one thing changed.

    p0 and p1 are the positions of the block's first and last query.

    Args:
        full_cols: the last block of keys is looked at as if it were not cut off.
    """

    def plan(T: int, S: int, rows: int, cols: int) -> list:
        tiles = []
        for r0 in range(0, T // rows * rows if whole else T, rows):
            r1 = min(r0 + rows, T) if clip else r0 + rows
            for c0 in range(0, S // cols * cols if whole else S, cols):
                c1 = min(c0 + cols, S) if clip else c0 + cols
                end = c0 + cols if full_cols else c1
                place = (past(T, S) + r0, past(T, S) + r1 - 1, c0, end)
                if keep(*place):
                    tiles.append((r0, r1, c0, c1, bool(masked(*place))))
        if keys_outside:
            tiles.sort(key=lambda tile: (tile[2], tile[0]))
        return tiles

    return plan


def wrong_plans() -> dict[str, Callable]:
    """Diagnosis → the plan that this mistake leads to."""
    return {
        "the mask is aligned top left: query i stands at position S − T + i, at the end"
        " of the keys": planned(past=lambda T, S: 0),
        "no tile is left out: those in which nobody sees a key cost nothing": planned(
            keep=lambda p0, p1, c0, c1: True
        ),
        "a tile is left out although its last query sees its first key: leave out"
        " only what begins later": planned(keep=lambda p0, p1, c0, c1: c0 < p1),
        "one tile too many: its first key is one later than the last query of the block"
        " sees": planned(keep=lambda p0, p1, c0, c1: c0 <= p1 + 1),
        "tiles are left out by what the first query of the block sees: the last one"
        " sees more": planned(keep=lambda p0, p1, c0, c1: c0 <= p0),
        "tiles are left out when their last key is too late: when their first one"
        " is": planned(keep=lambda p0, p1, c0, c1: c1 - 1 <= p1),
        "`masked` is True for every tile: those that everybody sees need no mask": (
            planned(masked=lambda p0, p1, c0, c1: True)
        ),
        "`masked` is False for every tile: on the diagonal some pairs may be seen and"
        " some not": planned(masked=lambda p0, p1, c0, c1: False),
        "`masked` is True one key too early: key c1 − 1 is the tile's last": planned(
            masked=lambda p0, p1, c0, c1: c1 > p0
        ),
        "`masked` is True one key too late: a key just behind the first query's"
        " position is hidden from it": planned(
            masked=lambda p0, p1, c0, c1: c1 - 1 > p0 + 1
        ),
        "`masked` looks at the last query of the block: the first one sees least": (
            planned(masked=lambda p0, p1, c0, c1: c1 - 1 > p1)
        ),
        "`masked` looks at the tile's first key: its last one is hidden first": planned(
            masked=lambda p0, p1, c0, c1: c0 > p0
        ),
        "`masked` is the wrong way round": planned(
            masked=lambda p0, p1, c0, c1: c1 - 1 <= p0
        ),
        "the last tiles run over the end: r1 is T at most, c1 is S at most": planned(
            clip=False
        ),
        "`masked` looks at key c0 + cols − 1, which may be beyond the last one: c1 is S"
        " at most": planned(full_cols=True),
        "queries or keys that do not fill a tile are lost: round up": planned(
            whole=True
        ),
        "the order is wrong: blocks of queries outside, keys inside": planned(
            keys_outside=True
        ),
        "the order is wrong: within a block of queries the first key comes first": (
            last_key_first
        ),
        "`rows` and `cols` are exchanged: `rows` cuts the queries": lambda T, S, r, c: (
            flash.causal_tiles(T, S, c, r)
        ),
        "S − T is cut off at 0: where T is larger it is negative, and the first queries"
        " see nothing": planned(past=lambda T, S: max(S - T, 0)),
        "a query sees its own key, too: its position is S − T + i": planned(
            keep=lambda p0, p1, c0, c1: c0 < p1,
            masked=lambda p0, p1, c0, c1: c1 > p0,
        ),
        "`masked` compares the numbers of the blocks: compare positions, those of keys"
        " with those of queries": masked_by_number,
    }


def last_key_first(T: int, S: int, rows: int, cols: int) -> list:
    """The right tiles, each block of queries from its last key on."""
    tiles = flash.causal_tiles(T, S, rows, cols)
    return sorted(tiles, key=lambda tile: (tile[0], -tile[2]))


def masked_by_number(T: int, S: int, rows: int, cols: int) -> list:
    """The right tiles, `masked` where both blocks have the same number."""
    tiles = flash.causal_tiles(T, S, rows, cols)
    return [(*tile[:4], tile[0] // rows == tile[2] // cols) for tile in tiles]


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "P needs no maximum and no sum: L holds both. e^(S − L), one number L per"
            " row."
        ),
        (
            "D = (dO * O).sum over the channels, one number per query. dP = dO Vᵀ. Then"
            " dS = P ∘ (dP − D)."
        ),
        (
            "`D[..., None]` is subtracted from each row of dP. Where L is −∞ take 0 in"
            " its place: all S of that row are −∞, and P is 0."
        ),
    ),
)
def score_gradient(answer):
    """P and dS of one tile, from what the forward pass kept."""
    what = "score_gradient(S, L, O, dO, V)"
    for T, n, D, shift in ((4, 4, 4, 0), (3, 5, 2, 0), (5, 2, 3, 150)):
        S, L, O, dO, V = tile(T, n, D, shift)
        found = results(answer(S, L, O, dO, V), {"P": (2, T, n), "dS": (2, T, n)}, what)
        if not all(x.isfinite().all() for x in found):
            raise Mistake(
                f"{what} holds NaN or infinity: only take e^ of S − L, which is never"
                " above 0"
            )
        P, dS = flash.score_gradient(S, L, O, dO, V)
        diagnose(
            found[0], right=P, mistakes=wrong_P(S, L), tol=1e-4, what=f"P of {what}"
        )
        diagnose(
            found[1],
            right=dS,
            mistakes=wrong_dS(S, L, O, dO, V, P),
            tol=1e-4,
            what=f"dS of {what}",
        )
    S, L, O, dO, V = tile(3, 2, 2, 0)
    S[:, 0] = -torch.inf  # sees keys of other tiles only
    S[:, 1], L[:, 1], O[:, 1] = -torch.inf, -torch.inf, 0.0  # sees none at all
    found = results(answer(S, L, O, dO, V), {"P": (2, 3, 2), "dS": (2, 3, 2)}, what)
    if any(x.isnan().any() for x in found):
        raise Mistake(
            "NaN where a query sees no key at all: L is −∞ there, and −∞ − (−∞) is NaN."
            " Its P and dS are 0"
        )
    for x, y in zip(found, flash.score_gradient(S, L, O, dO, V), strict=True):
        if not close(x, y, 1e-5):
            raise Mistake(
                "right where every query sees keys, wrong where one sees none of the"
                " tile: its S are −∞, its P and dS are 0"
            )


def tile(T: int, n: int, D: int, shift: float) -> tuple[Tensor, ...]:
    """S, L, O, dO, V of the first n of n + 3 keys; scores are around `shift`."""
    S = torch.randn(2, T, n + 3) + shift
    V = torch.randn(2, n + 3, D)
    O = S.softmax(-1) @ V
    return (
        S[..., :n].clone(),
        S.logsumexp(-1),
        O,
        torch.randn(2, T, D),
        V[:, :n].clone(),
    )


def wrong_P(S: Tensor, L: Tensor) -> dict[str, Tensor]:
    """Diagnosis → the P that this mistake leads to."""
    rows = L[..., None]
    wrong = {
        "P is the softmax of the tile alone: L knows the keys of all tiles": (
            S.softmax(-1)
        ),
        "L is missing in P: e^(S − L)": S.exp(),
        "P is upside down: e^(S − L)": (rows - S).exp(),
        "P is S − L: e^ of it is asked": S - rows,
        "P is e^S / L: L is a logarithm already, subtract it in the exponent": (
            S.exp() / rows
        ),
        "P holds powers of 2: e is asked": torch.exp2(S - rows),
        "P uses the tile's maximum: L is to be subtracted": (
            (S - S.amax(-1, keepdim=True)).exp()
        ),
    }
    if S.shape[-1] == S.shape[-2]:
        words = (
            "L is subtracted along the keys: it has one number per query, `[..., None]`"
        )
        wrong[words] = (S - L[:, None, :]).exp()
    return wrong


def wrong_dS(S, L, O, dO, V, P) -> dict[str, Tensor]:
    """Diagnosis → the dS that this mistake leads to, with P right."""
    dP = dO @ V.mT
    D = (dO * O).sum(-1, keepdim=True)
    inner = (P * dP).sum(-1, keepdim=True)
    wrong = {
        "D is missing in dS: P ∘ (dP − D)": P * dP,
        "D is the sum of P ∘ dP over this tile: it must run over the keys of all tiles,"
        " and Σ dO ∘ O does": P * (dP - inner),
        "D is added in dS: subtract it": P * (dP + D),
        "the sign of dS is wrong: P ∘ (dP − D)": P * (D - dP),
        "D is subtracted after the product with P: P ∘ (dP − D)": P * dP - D,
        "P is missing in dS: P ∘ (dP − D)": dP - D,
        "D is a mean over the channels: the sum is asked": P * (dP - D / O.shape[-1]),
        "dS is divided by √D: S is scaled already, that factor belongs to dQ and dK": (
            P * (dP - D) / O.shape[-1] ** 0.5
        ),
        "P is squared in dS: once is right": P * P * (dP - D),
        "D is Σ O ∘ O: the gradient belongs into it, Σ dO ∘ O": (
            P * (dP - (O * O).sum(-1, keepdim=True))
        ),
        "D is Σ dO: the output belongs into it, Σ dO ∘ O": (
            P * (dP - dO.sum(-1, keepdim=True))
        ),
        "dP is O Vᵀ: the gradient of the output is asked, dO Vᵀ": P * (O @ V.mT - D),
        "dS is dP alone": dP,
        "the softmax's slope is that of one entry, P (1 − P): the others have a part in"
        " it": P * (1 - P) * dP,
    }
    if S.shape[-1] == S.shape[-2] == V.shape[-1]:
        words = "D is subtracted along the keys: it has one number per query"
        wrong[words] = P * (dP - D.mT)
        wrong["dP is dO V: the transpose of V is asked"] = P * (dO @ V - D)
        wrong["D is summed over the queries: the sum runs over the channels"] = P * (
            dP - (dO * O).sum(-2)[..., None]
        )
    return wrong
