"""Checks of 07-inference/05-sampling-and-speculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.inference import sampling_and_speculation as speculation
from llmlab.inference.sampling_and_speculation import draw, residual
from llmlab.models.generation import keep_top_p as reference_top_p

check = Checks("07-inference/05-sampling-and-speculation")


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "Sort the probabilities of each row, largest first, and sum them up.",
        (
            "A token stays if what stands *before* it in that order is still below p:"
            " the cumulative sum less its own probability."
        ),
        (
            "`order` from the sort says where each came from:"
            " `torch.zeros_like(stays).scatter(-1, order, stays)` puts the answer back,"
            " then `masked_fill(~…, -torch.inf)`."
        ),
    ),
)
def keep_top_p(answer):
    """The fewest tokens, largest first, whose probability reaches p."""

    def draws() -> tuple[Tensor, float]:
        return 1.5 * torch.randn(4, 7), 0.7

    logits, p = telling(draws, kept_by(lambda s, q, p: s - q < p), wrong_top_p)
    what = "keep_top_p(logits, 0.7)"
    got = expect(answer(logits, p), shape=(4, 7), what=what, finite=False)
    right = kept_by(lambda s, q, p: s - q < p)(logits, p)
    diagnose(got, right=right, mistakes=wrong_top_p(logits, p), what=what)
    _top_p_at_borders(answer)
    for p in (0.05, 0.4, 0.95):
        logits = 2 * torch.randn(3, 11, dtype=torch.float64)
        got = expect(answer(logits, p), shape=(3, 11), what="the result", finite=False)
        if not torch.equal(got.isfinite(), reference_top_p(logits, p).isfinite()):
            raise Mistake(
                f"right for p = 0.7, wrong for p = {p}: take p from the argument, and"
                " keep at least one token"
            )


def _top_p_at_borders(answer: Callable) -> None:
    """Four equal tokens: of these, two have exactly a half."""
    got = expect(
        answer(torch.zeros(2, 4), 0.5), shape=(2, 4), what="the result", finite=False
    )
    counts = got.isfinite().sum(-1).tolist()
    if counts == [3, 3]:
        raise Mistake(
            "of four equal tokens three stay with p = 0.5: two have reached it already,"
            " so compare with `<`"
        )
    if counts == [4, 4]:
        raise Mistake(
            "of four equal tokens all stay with p = 0.5: no more may stay than needed,"
            " also among equals. Did you compare with the smallest probability that"
            " stays?"
        )
    if counts == [1, 1]:
        raise Mistake(
            "of four equal tokens one stays with p = 0.5: the token that reaches p"
            " stays, too"
        )
    if counts != [2, 2]:
        raise Mistake(f"of four equal tokens {counts[0]} stay with p = 0.5, not 2")
    got = answer(torch.zeros(1, 4), 1.0)
    if not got.isfinite().all():
        raise Mistake("with p = 1 every token stays")


def kept_by(
    rule: Callable[[Tensor, Tensor, float], Tensor],
    *,
    dim: int = -1,
    descending: bool = True,
    fill: float = -torch.inf,
) -> Callable[[Tensor, float], Tensor]:
    """Top-p, and what comes out with one thing changed.

    Args:
        rule: of (cumulative sum, probability, p), all in sorted order.
    """

    def keep(logits: Tensor, p: float) -> Tensor:
        probs = logits.softmax(dim)
        ordered, order = probs.sort(dim, descending=descending)
        stays = rule(ordered.cumsum(dim), ordered, p)
        back = torch.zeros_like(stays).scatter(dim, order, stays)
        return logits.masked_fill(~back, fill)

    return keep


def wrong_top_p(logits: Tensor, p: float) -> dict:
    """What usual mistakes leave of the logits."""
    probs = logits.softmax(-1)
    ordered, order = probs.sort(-1, descending=True)
    stays = ordered.cumsum(-1) - ordered < p
    right = kept_by(lambda s, q, p: s - q < p)(logits, p)
    everywhere = stays[:1].expand_as(stays)
    not_back = logits.masked_fill(~stays, -torch.inf)
    by_gather = logits.masked_fill(~stays.gather(-1, order), -torch.inf)
    unsorted = probs.cumsum(-1) - probs < p
    of_first = torch.zeros_like(stays).scatter(-1, order, everywhere)
    below = ordered.cumsum(0) - ordered < p
    down = torch.zeros_like(stays).scatter(-1, order, below)
    return {
        "the token that crosses p is gone: it stays, so that p is reached": kept_by(
            lambda s, q, p: s <= p
        )(logits, p),
        "one token too many stays: p was reached before it": kept_by(
            lambda s, q, p: s - q - torch.cat([0 * q[:, :1], q[:, :-1]], -1) < p
        )(logits, p),
        "the probabilities are summed up in the order of the vocabulary: sort them,"
        " largest first": logits.masked_fill(~unsorted, -torch.inf),
        "the smallest tokens stay: sort with the largest first": kept_by(
            lambda s, q, p: s - q < p, descending=False
        )(logits, p),
        "you keep the places in sorted order: put them back into the vocabulary's"
        " order, with `scatter`": not_back,
        "you put back with `gather`: that permutes once more. Use `scatter`": by_gather,
        "the sum runs over the batch: each row is a distribution of its own": kept_by(
            lambda s, q, p: s - q < p, dim=0
        )(logits, p),
        "the sum runs over the batch, in sorted order: over the tokens of a"
        " row": logits.masked_fill(~down, -torch.inf),
        "the logits come back in sorted order: put them back into the vocabulary's"
        " order, with `scatter`": logits.gather(-1, order).masked_fill(
            ~stays, -torch.inf
        ),
        "each row keeps as many tokens as the first: count row by row": (
            logits.masked_fill(~of_first, -torch.inf)
        ),
        "the sum starts from 1 − p: tokens stay until p is reached": kept_by(
            lambda s, q, p: s - q < 1 - p
        )(logits, p),
        "this is min-p: a token is compared with p times the largest, not the sum": (
            logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)
        ),
        "what leaves becomes 0: a logit of 0 is still drawn. It becomes −∞": (
            right.masked_fill(right.isinf(), 0.0)
        ),
        "these are probabilities: logits are asked": right.softmax(-1),
        "these are logarithms of probabilities: the logits that stay are as they"
        " were": right.log_softmax(-1),
        "these are the old probabilities: logits are asked": (
            probs.masked_fill(right.isinf(), 0.0)
        ),
        "these are the old probabilities, with −∞: logits are asked": (
            probs.masked_fill(right.isinf(), -torch.inf)
        ),
        "the logits themselves are summed up: take their softmax": _sum_of_logits(
            logits, p
        ),
        "nothing is taken out": logits,
    }


def _sum_of_logits(logits: Tensor, p: float) -> Tensor:
    ordered, order = logits.sort(-1, descending=True)
    stays = ordered.cumsum(-1) - ordered < p
    back = torch.zeros_like(stays).scatter(-1, order, stays)
    return logits.masked_fill(~back, -torch.inf)


# 2 ------------------------------------------------------------------------------------

Case = tuple[Tensor, Tensor, list[int], Tensor]
GAMMA, VOCAB = 3, 5
CASES = 48


def a_case(gamma: int = GAMMA, vocab: int = VOCAB) -> Case:
    """p, q, tokens drawn from q, and uniforms."""
    p = (2 * torch.randn(gamma + 1, vocab, dtype=torch.float64)).softmax(-1)
    near = 0.5 * torch.randn(gamma, vocab, dtype=torch.float64).exp() * p[:gamma]
    q = near / near.sum(-1, keepdim=True)
    drafted = torch.multinomial(q, 1)[:, 0].tolist()
    return p, q, drafted, torch.rand(gamma + 1, dtype=torch.float64)


def as_rows(kept: Sequence[Sequence[int]], width: int) -> Tensor:
    """Lists of tokens as one table, with −1 where a list has ended."""
    rows = torch.full((len(kept), width), -1)
    for row, tokens in zip(rows, kept, strict=True):
        tokens = list(tokens)[:width]
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return rows


def tokens_of(value: object, what: str) -> list[int]:
    """A list of tokens, or a mistake that says what came instead."""
    expect(value, kind=(list, tuple), what=what)
    for token in value:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise Mistake(
                f"{what} holds {token!r}, where a list of whole numbers is asked:"
                " tokens"
            )
    return [int(token) for token in value]


@check.exercise(
    points=4,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "A loop over the drafted tokens that returns at the first rejection. After"
            " the loop all have stayed."
        ),
        (
            "Token x of place i stays if u[i] < p[i, x] / q[i, x]. At a rejection the"
            " correction is drawn from (p[i] − q[i]).clamp(min=0) over its sum."
        ),
        (
            "`return [*drafted[:i], draw(rest / rest.sum(), u[-1])]` in the loop, and"
            " `return [*drafted, draw(p[-1], u[-1])]` after it."
        ),
    ),
)
def accept(answer):
    """Which drafted tokens stay, and the one token more."""

    def draws() -> tuple[list[Case]]:
        return ([a_case() for _ in range(CASES)],)

    (cases,) = telling(draws, all_kept(speculation.accept), wrong_accepts)
    kept = [tokens_of(answer(*case), "accept(p, q, drafted, u)") for case in cases]
    if all(len(tokens) == 0 for tokens in kept):
        raise Mistake("no token is kept: there is always one more, the one drawn")
    diagnose(
        as_rows(kept, GAMMA + 2),
        right=all_kept(speculation.accept)(cases),
        mistakes=wrong_accepts(cases),
        what="accept(p, q, drafted, u)",
    )
    p, q, drafted, u = a_case(0)
    empty = tokens_of(answer(p, q, drafted, u), "accept of an empty draft")
    if empty != [draw(p[0], u[-1])]:
        raise Mistake(
            "right for three drafted tokens, wrong for none: then one token is drawn"
            " from p[0]"
        )
    for gamma in (1, 5):
        case = a_case(gamma, 9)
        if tokens_of(answer(*case), "the result") != speculation.accept(*case):
            raise Mistake(
                f"right for three drafted tokens, wrong for {gamma}: take the sizes"
                " from the arguments"
            )
    _never_said(answer)
    _same_distribution(answer)


def _never_said(answer: Callable) -> None:
    """u = 0 and a token that the target never says."""
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    u = torch.tensor([0.0, 0.3], dtype=torch.float64)
    if tokens_of(answer(p, q, [0], u), "the result") != [1]:
        raise Mistake(
            "a token of p = 0 stays when u = 0: the target never says it, so it stays"
            " if u < p / q, not if u ≤ p / q"
        )


def _same_distribution(answer: Callable) -> None:
    """An oracle of its own: all that can happen in one round, of two small tables."""
    random = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 4, 3, generator=random, dtype=torch.float64).softmax(-1)

    def of(which: int) -> Callable[[tuple[int, ...]], Tensor]:
        return lambda text: tables[which, text[-1] + 1 if text else 0]

    found = speculation.emitted(answer, of(0), of(1), 2, grid=3)
    wanted = speculation.target_distribution(of(0), 3)
    if any(abs(found.get(text, 0.0) - wanted[text]) > 1e-6 for text in wanted):
        raise Mistake("the texts that come out do not have the target's distribution")


def all_kept(rule: Callable) -> Callable[[list[Case]], Tensor]:
    """What a rule keeps in each case, as a table."""
    return lambda cases: as_rows([rule(*case) for case in cases], GAMMA + 2)


def walk(
    stays: Callable = lambda u, p, q: u * q < p,
    correction: Callable = lambda p, q, i: residual(p[i], q[i]),
    bonus: Callable = lambda p, q: p[-1],
    coin: Callable = lambda u, i: u[i],
    end: Callable = lambda u, i: u[-1],
    kept: Callable = lambda drafted, i: drafted[:i],
    pick: Callable = draw,
) -> Callable[..., list[int]]:
    """`accept`, and what comes out with one thing changed."""

    def rule(p: Tensor, q: Tensor, drafted: list[int], u: Tensor) -> list[int]:
        for i, x in enumerate(drafted):
            if not stays(coin(u, i), p[i, x], q[i, x]):
                return [*kept(drafted, i), pick(correction(p, q, i), end(u, i))]
        return [*drafted, pick(bonus(p, q), u[-1])]

    return rule


def without_correction(p, q, drafted, u):
    """Nothing in the place of the rejected token."""
    kept = speculation.accept(p, q, drafted, u)
    return kept if len(kept) > len(drafted) else kept[:-1]


def without_bonus(p, q, drafted, u):
    """Nothing after the last drafted token."""
    return speculation.accept(p, q, drafted, u)[: len(drafted)]


def goes_on(p, q, drafted, u, corrects=True):
    """Later tokens are judged although an earlier one was rejected."""
    kept = []
    for i, x in enumerate(drafted):
        if u[i] * q[i, x] < p[i, x]:
            kept.append(x)
        elif corrects:
            kept.append(draw(residual(p[i], q[i]), u[-1]))
    return [*kept, draw(p[-1], u[-1])]


def all_or_nothing(p, q, drafted, u):
    """One rejection throws the whole draft away."""
    if all(u[i] * q[i, x] < p[i, x] for i, x in enumerate(drafted)):
        return [*drafted, draw(p[-1], u[-1])]
    return [draw(p[0], u[-1])]


def normal(values: Tensor) -> Tensor:
    """Divided by their sum."""
    return values / values.sum()


def without_rejected(p, q, drafted, u):
    """The correction from p, from which the rejected token alone was taken out."""
    for i, x in enumerate(drafted):
        if u[i] * q[i, x] >= p[i, x]:
            others = p[i].clone()
            others[x] = 0
            return [*drafted[:i], draw(normal(others), u[-1])]
    return [*drafted, draw(p[-1], u[-1])]


def wrong_accepts(cases: list[Case]) -> dict[str, Callable[[], Tensor]]:
    """What usual mistakes keep."""

    def of(rule: Callable) -> Callable[[], Tensor]:
        return lambda: all_kept(rule)(cases)

    def but(**changes) -> Callable[[], Tensor]:
        return of(walk(**changes))

    return {
        "tokens stay where they should go: u < p / q keeps a token": but(
            stays=lambda u, p, q: u * q >= p
        ),
        "the ratio is upside down: it is p / q": but(stays=lambda u, p, q: u * p < q),
        "a token stays with probability p here: it is p / q, as q drew it already": but(
            stays=lambda u, p, q: u < p
        ),
        "a token stays only if p ≥ q here: below that it still stays with probability"
        " p / q": but(stays=lambda u, p, q: p >= q),
        "the correction is drawn from p: what the draft has given already must be"
        " taken off, norm(max(p − q, 0))": but(correction=lambda p, q, i: p[i]),
        "the correction is drawn from q: it comes from norm(max(p − q, 0))": but(
            correction=lambda p, q, i: q[i]
        ),
        "the residual max(p − q, 0) is not divided by its sum": but(
            correction=lambda p, q, i: (p[i] - q[i]).clamp(min=0)
        ),
        "the residual is max(q − p, 0) here: it is where p is larger": but(
            correction=lambda p, q, i: normal((q[i] - p[i]).clamp(min=0))
        ),
        "the residual is |p − q| here: where q is larger it is 0": but(
            correction=lambda p, q, i: normal((p[i] - q[i]).abs())
        ),
        "the residual is a softmax of p − q here: cut at 0 and divide by the sum": but(
            correction=lambda p, q, i: (p[i] - q[i]).softmax(-1)
        ),
        "the residual is a softmax of max(p − q, 0) here: divide by the sum": but(
            correction=lambda p, q, i: (p[i] - q[i]).clamp(min=0).softmax(-1)
        ),
        "the correction is drawn from p without the rejected token: other tokens were"
        " drafted too often, as well, so take off all of q, max(p − q, 0)": of(
            without_rejected
        ),
        "the residual takes p of the next place: p[i] and q[i] belong together": but(
            correction=lambda p, q, i: residual(p[i + 1], q[i])
        ),
        "the correction is drawn from the distributions of the next place: it stands in"
        " the place of the rejected token": but(correction=lambda p, q, i: p[i + 1]),
        "the correction is drawn from the last row of p: it stands in the place of the"
        " rejected token": but(correction=lambda p, q, i: p[-1]),
        "the bonus is drawn from q: nobody has drafted it, so it is drawn from the last"
        " row of p": but(bonus=lambda p, q: q[-1]),
        "the bonus is drawn from the row before the last: the last row of p follows"
        " the whole draft": but(bonus=lambda p, q: p[-2]),
        "the bonus is missing: when all stay, one token more is drawn from the last"
        " row of p": of(without_bonus),
        "the correction is missing: a token is drawn in the place of the rejected"
        " one": of(without_correction),
        "bonus and correction are missing: one token is drawn in each case": of(
            lambda *case: without_correction(*case)[: len(case[2])]
        ),
        "you go on after a rejection: what was drafted after the rejected token"
        " followed a text that is no longer there": of(goes_on),
        "you leave the rejected token out and go on: the text ends there, with a"
        " correction": of(lambda *case: goes_on(*case, corrects=False)),
        "the rejected token is kept, too: the correction stands in its place": but(
            kept=lambda drafted, i: drafted[: i + 1]
        ),
        "the tokens before the rejected one are lost: they have stayed": but(
            kept=lambda drafted, i: []
        ),
        "one rejection throws all away here: the tokens before it have stayed": of(
            all_or_nothing
        ),
        "the correction is drawn with the uniform that decided the rejection: that one"
        " is not uniform any more. Use the last": but(end=lambda u, i: u[i]),
        "the correction is drawn with the next uniform: the last one draws, in both"
        " cases": but(end=lambda u, i: u[i + 1]),
        "all places are decided by the same uniform: place i has u[i]": but(
            coin=lambda u, i: u[0]
        ),
        "the last uniform decides: place i has u[i], and the last one draws": but(
            coin=lambda u, i: u[-1]
        ),
        "you take the likeliest token at the end: draw it, with the last uniform": but(
            pick=lambda p, u: int(p.argmax())
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=3,
    hints=(
        (
            "Two loops: over n, from `longest` down to 1, and in it over the places"
            " where n tokens could stand, from the left."
        ),
        (
            "The last n tokens are `tokens[-n:]`. Places begin at 0 and end before"
            " `len(tokens) - n`, where the last n tokens themselves begin."
        ),
        "What followed is `tokens[start + n : start + n + count]`.",
    ),
)
def lookup(answer):
    """What followed the last tokens where they stood before."""

    def draws() -> tuple[list[tuple[list[int], int, int]]]:
        cases = []
        for _ in range(120):
            length = int(torch.randint(4, 13, ()))
            tokens = torch.randint(0, 3, (length,)).tolist()
            count = int(torch.randint(2, 5, ()))
            cases.append((tokens, count, int(torch.randint(1, 4, ()))))
        return (cases,)

    (cases,) = telling(draws, looked_up(speculation.lookup), wrong_lookups)
    what = "lookup(tokens, count, longest)"
    found = [tokens_of(answer(list(t), count, n), what) for t, count, n in cases]
    diagnose(
        as_rows(found, 14),
        right=looked_up(speculation.lookup)(cases),
        mistakes=wrong_lookups(cases),
        what=what,
    )
    for tokens, count, longest in (
        ([4], 3, 2),
        ([1, 2, 3], 3, 2),
        ([7, 7, 7], 2, 9),
        ([1, 2, 1, 2, 1, 2], 9, 4),
    ):
        found = tokens_of(answer(list(tokens), count, longest), what)
        if found != speculation.lookup(tokens, count, longest):
            raise Mistake(
                f"right for most texts, wrong for lookup({tokens}, {count}, {longest}):"
                " there may be no match, or fewer tokens than are asked for"
            )


def looked_up(rule: Callable) -> Callable[[list], Tensor]:
    """What a rule finds in each case, as a table."""
    return lambda cases: as_rows([rule(*case) for case in cases], 14)


def searched(
    sizes: Callable = lambda longest, length: range(min(longest, length - 1), 0, -1),
    starts: Callable = lambda length, n: range(length - n),
    suffix: Callable = lambda tokens, n: tokens[-n:],
    found: Callable = lambda tokens, start, n, count: tokens[start + n :][:count],
) -> Callable[[list[int], int, int], list[int]]:
    """`lookup`, and what comes out with one thing changed."""

    def rule(tokens: list[int], count: int, longest: int) -> list[int]:
        for n in sizes(longest, len(tokens)):
            for start in starts(len(tokens), n):
                if tokens[start : start + n] == suffix(tokens, n):
                    return found(tokens, start, n, count)
        return []

    return rule


def looked_up_in_full(tokens: list[int], count: int, longest: int) -> list[int]:
    """Passes over a place after which fewer than `count` tokens stand."""
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n - count + 1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n :][:count]
    return []


def wrong_lookups(cases: list) -> dict[str, Callable[[], Tensor]]:
    """What usual mistakes find."""

    def but(**changes) -> Callable[[], Tensor]:
        return lambda: looked_up(searched(**changes))(cases)

    return {
        "the latest place is taken: of several the earliest counts": but(
            starts=lambda length, n: range(length - n - 1, -1, -1)
        ),
        "one token is looked for first, or alone: the longest match that is found"
        " counts": but(sizes=lambda longest, length: [1]),
        "only `longest` tokens are looked for, or they find themselves at the end of"
        " the text: when they did not stand before, try one fewer, down to one": but(
            sizes=lambda longest, length: [longest] if longest < length else []
        ),
        "two tokens are the fewest that you look for: go down to one": but(
            sizes=lambda longest, length: range(min(longest, length - 1), 1, -1)
        ),
        "`longest` itself is not tried: begin with it": but(
            sizes=lambda longest, length: range(min(longest - 1, length - 1), 0, -1)
        ),
        "the latest place is taken, and the last tokens find themselves there, where"
        " nothing follows": but(starts=lambda length, n: range(length - n, -1, -1)),
        "the search ends too early: the match may begin one before the last tokens": (
            but(starts=lambda length, n: range(length - n - 1))
        ),
        "the search ends too early: the match may overlap the last tokens": but(
            starts=lambda length, n: range(length - 2 * n + 1)
        ),
        "what you return begins with the last token of the match: begin after it": but(
            found=lambda tokens, start, n, count: tokens[start + n - 1 :][:count]
        ),
        "one token is skipped: begin right after the match": but(
            found=lambda tokens, start, n, count: tokens[start + n + 1 :][:count]
        ),
        "what you return begins with the match: begin after it": but(
            found=lambda tokens, start, n, count: tokens[start:][:count]
        ),
        "more than `count` tokens are returned": but(
            found=lambda tokens, start, n, count: tokens[start + n :]
        ),
        "one token fewer than `count` is returned": but(
            found=lambda tokens, start, n, count: tokens[start + n :][: count - 1]
        ),
        "the slice ends at start + count: it ends `count` after its beginning": but(
            found=lambda tokens, start, n, count: tokens[start + n : start + count]
        ),
        "a place with fewer than `count` tokens after it was passed over: return those"
        " that there are": lambda: looked_up(looked_up_in_full)(cases),
        "the first tokens of the text are looked for: the last ones are asked": but(
            suffix=lambda tokens, n: tokens[:n],
            starts=lambda length, n: range(1, length),
        ),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=12,
    difficulty=3,
    importance=3,
    hints=(
        "From node to node: a parent stands before its children, so its row is done.",
        (
            "Row i begins as a copy of its parent's row: whoever the parent sees, the"
            " child sees, too."
        ),
        "Column past + j stands for node j. At last, `mask[i, past + i] = True`.",
    ),
)
def tree_mask(answer):
    """Where each drafted token may look: the cache, its ancestors, itself."""
    parents, past = [-1, 0, 0, 1, 1, 2, 3, 5], 3
    what = "tree_mask(parents, 3)"
    got = expect(answer(parents, past), shape=(8, 11), dtype=torch.bool, what=what)
    diagnose(
        got,
        right=speculation.tree_mask(parents, past),
        mistakes=wrong_masks(parents, past),
        what=what,
    )
    for parents, past in (([-1], 2), ([-1, 0, 1, 2], 0), ([-1, 0, 0, 0, 3, 4, 1], 5)):
        n = len(parents)
        got = expect(answer(parents, past), shape=(None, None), what="the mask")
        right = speculation.tree_mask(parents, past)
        if got.shape == right.shape and past == 0 and got[:-1, -1].any():
            raise Mistake(
                "with no cache other nodes see the last one: an index of −1, the"
                " root's parent, counts from the end"
            )
        if got.shape != (n, past + n) or not torch.equal(got.bool(), right):
            raise Mistake(
                f"right for eight nodes after 3 tokens, wrong for parents={parents}"
                f" after {past}: take both from the arguments"
            )


def wrong_masks(parents: list[int], past: int) -> dict[str, Tensor]:
    """What usual mistakes give for the mask."""
    n = len(parents)
    right = speculation.tree_mask(parents, past)
    tree = right[:, past:]
    cache = right[:, :past]
    itself = torch.eye(n, dtype=torch.bool)
    parent = torch.zeros(n, n, dtype=torch.bool)
    for i, j in enumerate(parents):
        if j >= 0:
            parent[i, j] = True
    depth = torch.tensor(speculation.depths(parents))
    upper = depth[:, None] > depth[None]
    causal = torch.ones(n, n).tril().bool()
    grand = parent | itself | ((parent.int() @ parent.int()) > 0)
    siblings = tree | (depth[:, None] == depth[None])
    brothers = tree | (torch.tensor(parents)[:, None] == torch.tensor(parents)[None])
    no_root = tree.clone()
    no_root[1:, 0] = False
    first = torch.zeros(n, n, dtype=torch.bool)
    first[0, 0] = True

    def after(block: Tensor) -> Tensor:
        return torch.cat([cache, block], -1)

    return {
        "this is the plain causal mask: nodes of other branches are seen. Only"
        " ancestors may be": after(causal),
        "a node sees its parent, but not the parent's ancestors": after(
            parent | itself
        ),
        "a node sees its parent and grandparent, but no older ancestor": after(grand),
        "a node does not see itself: it does": after(tree & ~itself),
        "a node sees its parent alone": after(parent),
        "a node sees itself alone: its ancestors are missing": after(itself),
        "this is transposed: rows look, columns are looked at. A node sees its"
        " ancestors, not its descendants": after(tree.T.contiguous()),
        "a node sees ancestors and descendants: no token sees a later one": after(
            tree | tree.T
        ),
        "a node sees all nodes above its level: only its own ancestors": after(
            upper | itself
        ),
        "a node sees all of its own level: those are other futures": after(siblings),
        "a node sees the other children of its parent: those are other futures": after(
            brothers
        ),
        "the root is not seen: it is an ancestor of all": after(no_root),
        "the root is not seen, not even by itself: the way up ends at −1, not at"
        " 0": after(no_root & ~first),
        "the cache is hidden: every node sees the whole text before it": torch.cat(
            [torch.zeros_like(cache), tree], -1
        ),
        "the cache stands behind the nodes: its columns come first": torch.cat(
            [tree, cache], -1
        ),
        "True marks what is hidden here: True is where a node may look": ~right,
        "the cache is seen by the root alone: by every node": torch.cat(
            [F.pad(cache[:1], (0, 0, 0, n - 1)), tree], -1
        ),
    }
