"""What marks the exercises of 05-parallelism/09-moe."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.parallelism.moe.dispatch import check_dispatch
from llmlab.checks.parallelism.ranks import at_most, either, on_ranks
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.moe import Routing, balance_loss, capacity, keep
from llmlab.parallelism.moe import route as reference

check = Checks("05-parallelism/09-moe")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Softmax over all experts first, in fp32, then the k largest, then divide"
            " the k weights by their sum."
        ),
        (
            "`logits.float().softmax(-1)`; `values, indices = probs.topk(k, dim=-1)`"
            " sorts by size."
        ),
        "weights = values / values.sum(-1, keepdim=True); return indices, weights.",
    ),
    grads={"logits": 0},
)
def route(answer):
    """Each token's k experts and their weights."""
    for T, E, k, dtype in (
        (6, 5, 2, torch.float32),
        (7, 8, 3, torch.float32),
        (5, 4, 2, torch.bfloat16),
    ):
        logits = (2 * torch.randn(T, E)).to(dtype)
        what = f"route(logits, {k}) with logits of shape ({T}, {E})"
        got = answer(logits, k)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Mistake(f"{what} must return two tensors: experts and weights")
        experts, weights = got
        right = reference(logits, k)
        if isinstance(experts, Tensor) and experts.shape in ((E, k), (k, E)):
            raise Mistake(
                f"the k largest were sought among the {T} tokens: each token has k"
                " experts"
            )
        expect(experts, shape=(T, k), what="the tensor of experts")
        if experts.is_floating_point():
            raise Mistake(
                "the experts are floats; they are numbers 0 … E − 1: did you return the"
                " weights first?"
            )
        expect(weights, shape=(T, k), what="the tensor of weights")
        if weights.dtype != torch.float32:
            raise Mistake(
                f"the weights are {weights.dtype}: whatever the logits are, route in"
                " float32"
            )
        smallest = logits.float().topk(k, largest=False).indices
        diagnose(
            experts,
            right=right.experts,
            mistakes={
                "these are the experts with the smallest logits": smallest,
                "the best expert comes last; it is to come first": (
                    right.experts.flip(-1)
                ),
                "the experts are right, but not sorted, the best first": (
                    right.experts.sort(-1).values
                ),
                "softmax was taken over tokens; it goes over experts": (
                    logits.float().softmax(0).topk(k).indices
                ),
                "the best expert stands there k times": (
                    right.experts[:, :1].expand(T, k)
                ),
                "these are the first k experts, whatever the logits": (
                    torch.arange(k).expand(T, k)
                ),
            },
            what="the tensor of experts",
        )
        _judge_weights(weights, logits, right)


def _judge_weights(weights: Tensor, logits: Tensor, right: Routing) -> None:
    """The weights of the chosen experts, which are right themselves."""
    k = weights.shape[1]
    plain = right.probs.gather(1, right.experts)
    top = logits.float().topk(k).values
    rounded = logits.softmax(-1).topk(k).values.float()
    sigmoids = top.sigmoid()
    diagnose(
        weights,
        right=right.weights,
        mistakes={
            (
                "the weights are not renormalised: divide the k of a token by their sum"
            ): plain,
            "the weights of a token add up to k, not to 1": k * right.weights,
            "the weights add up to 1 over the tokens; they do for each token": (
                plain / plain.sum(0, keepdim=True)
            ),
            "these are sigmoids; the probabilities are a softmax over all experts": (
                either(weights, sigmoids / sigmoids.sum(-1, keepdim=True), sigmoids)
            ),
            "these are the logits; the weights are probabilities": either(
                weights, top, top / top.sum(-1, keepdim=True)
            ),
            "softmax was taken over tokens; it goes over experts": (
                logits.float().softmax(0).gather(1, right.experts)
            ),
            "softmax was taken twice: over the probabilities of the k, too": (
                plain.softmax(-1)
            ),
            (
                "the logits were rounded to bf16 in the softmax: convert them to"
                " float32 first"
            ): rounded / rounded.sum(-1, keepdim=True),
            (
                "every expert of a token counts the same: its probability must"
                " weigh it, or the router learns nothing"
            ): torch.full_like(plain, 1 / k),
        },
        tol=1e-5,
        what="the tensor of weights",
    )


@check.exercise(
    points=2,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Go through the assignments token by token, and count how many places of"
            " each expert are taken."
        ),
        (
            "A loop will do: taken = [0] * E; an assignment is kept if taken[e] < C,"
            " and only then takes a place."
        ),
        (
            "C = math.ceil(T * k / E * factor). Without a loop: one_hot of the"
            " flattened experts, cumsum over the assignments, minus 1, at the chosen"
            " expert."
        ),
    ),
)
def places(answer):
    """Which assignments find a place, when each expert has ⌈T·k/E · factor⌉."""
    cases = []
    for T, E, k, factor in (
        (8, 4, 2, 1.0),
        (12, 4, 2, 0.5),
        (9, 4, 2, 1.0),
        (7, 3, 2, 1.0),  # 4.67: to the nearest is right, down is not
        (10, 5, 1, 1.25),
        (9, 8, 2, 2.0),  # 9 · 2 / 8 · 2 = 4.5, and ⌈9 · 2 / 8⌉ · 2 = 6
    ):
        # the first experts are popular
        experts = (torch.randn(T, E) - torch.arange(E)).topk(k).indices
        if T == 12:
            experts[:3] = 0  # a token that names one expert twice: its first is first
        if T == 10:
            experts[experts == E - 1] = 0  # the last expert gets nothing
        what = f"places(experts, {E}, {factor}) for {T} tokens with {k} experts each"
        got = expect(answer(experts, E, factor), shape=(T, k), what=what)
        if got.dtype != torch.bool:
            raise Mistake(f"{what} has dtype {got.dtype}; True and False are asked")
        cases.append((got.int(), experts, E, factor, what))
    # a mistake must explain what came out in every case: in one, several would
    found = [_places_mistakes(*case[1:4]) for case in cases]
    pairs = list(zip(found, cases, strict=True))
    for text in found[0]:
        if all(torch.equal(values[text], case[0]) for values, case in pairs):
            if text == "right":
                return
            raise Mistake(text)
    for mistakes, (got, *_, what) in pairs:
        diagnose(got, right=mistakes["right"], what=what)


def _places_mistakes(experts: Tensor, E: int, factor: float) -> dict[str, Tensor]:
    """ "right" → the right places; diagnosis → those that this mistake leads to."""
    T, k = experts.shape
    C = capacity(T, k, E, factor)
    fair = T * k / E

    def of(C: float, order: str = "position", experts: Tensor = experts) -> Tensor:
        shape = experts.shape
        routing = Routing(experts, torch.zeros(shape), torch.zeros(T, E))
        return keep(routing, int(C), order).int()

    counts = torch.bincount(experts.flatten(), minlength=E)
    columns = [of(C, experts=experts[:, j : j + 1]) for j in range(k)]
    return {
        "right": of(C),
        "the capacity does not count k: there are T·k assignments": (
            of(capacity(T, 1, E, factor))
        ),
        "the capacity is rounded down: ⌈T·k/E · factor⌉ rounds up": (
            of(int(fair * factor))
        ),
        "the capacity is rounded to the nearest: ⌈T·k/E · factor⌉ rounds up": (
            of(round(fair * factor))
        ),
        "the factor comes before the rounding: ⌈T·k/E · factor⌉": (
            of(math.ceil(math.ceil(fair) * factor))
        ),
        "the rounding comes last: ⌈T·k/E · factor⌉, and not ⌈T·k/E⌉ · factor": (
            of(math.ceil(fair) * factor)
        ),
        "T·k/E is rounded down before the factor: ⌈T·k/E · factor⌉ rounds once": (
            of(math.ceil(int(fair) * factor))
        ),
        "k comes before the rounding: ⌈T·k/E · factor⌉, not k times ⌈T/E · factor⌉": (
            of(k * capacity(T, 1, E, factor))
        ),
        "the capacity factor is ignored": of(capacity(T, k, E, 1.0)),
        "one place too many: the C-th assignment is the last that fits": of(C + 1),
        "one place is left empty: C assignments fit": of(C - 1),
        (
            "all first choices were served before the second ones: here a token takes"
            " all its places in turn"
        ): of(C, "choice"),
        "the latest tokens keep their places; the earliest shall": (
            of(C, experts=experts.flip(0)).flip(0)
        ),
        (
            "within a token the last choice is served first; it goes from its first to"
            " its last"
        ): of(C, experts=experts.flip(1)).flip(1),
        "an expert that is too popular drops everybody: it keeps the first C": (
            (counts[experts] <= C).int()
        ),
        (
            "a token lost all its places because one of its experts is full: each"
            " assignment for itself"
        ): _all_or_none(experts, C, E).int(),
        (
            "a token loses all its places when one of them is dropped: each assignment"
            " for itself"
        ): of(C).bool().all(1, keepdim=True).expand(T, k).int(),
        "each choice has a queue of its own; an expert has one, for all choices": (
            torch.cat(columns, 1)
        ),
        "E is not the largest number + 1: an expert may get nothing": (
            of(capacity(T, k, int(experts.max()) + 1, factor))
        ),
        "True marks what is dropped; it shall mark what is kept": 1 - of(C),
        "nobody is dropped": torch.ones(T, k, dtype=torch.int32),
    }


def _all_or_none(experts: Tensor, C: int, E: int) -> Tensor:
    taken = torch.zeros(E, dtype=torch.int64)
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for t, chosen in enumerate(experts):
        kept[t] = bool((taken[chosen] < C).all())
        taken += kept[t, 0] * torch.bincount(chosen, minlength=E)
    return kept


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Two vectors of length E: how often each expert was chosen, and how"
            " probable it was on average. Multiply and add."
        ),
        (
            "f = torch.bincount(experts.flatten(), minlength=E) / (T * k); P ="
            " probs.mean(0)."
        ),
        (
            "E * (f * P).sum(), with probs attached to the graph: counting gives no"
            " gradient, and needs none."
        ),
    ),
    grads={"probs": 0},
)
def balance(answer):
    """The loss that punishes an uneven load."""
    for T, E, k in ((10, 6, 2), (12, 4, 1)):
        logits = torch.randn(T, E) - 0.5 * torch.arange(E)
        probs = logits.softmax(-1).requires_grad_()
        experts = probs.detach().topk(k).indices
        what = f"balance(probs, experts) for {T} tokens, {E} experts, {k} a token"
        got = expect(answer(probs, experts), shape=(), dtype=torch.float32, what=what)
        load = torch.bincount(experts.flatten(), minlength=E)
        right = balance_loss(probs.detach(), load, T, k)
        f = load / (T * k)
        P = probs.detach().mean(0)
        first = torch.bincount(experts[:, 0], minlength=E) / T
        used = int(experts.max()) + 1
        diagnose(
            got.detach(),
            right=right,
            mistakes={
                (
                    "the factor E is missing, or this is a mean over experts and not a"
                    " sum: a balanced router would have a loss of 1/E"
                ): right / E,
                "the mean probability is over tokens; this is over experts": (
                    torch.tensor(float(T))
                ),
                "E is not the largest number + 1: the last experts may get nothing": (
                    used * (f * P)[:used].sum()
                ),
                "f counts the k choices of a token as k tokens: divide by T·k": (
                    right * k if k > 1 else right * E * T
                ),
                "this is the mean over experts, not the sum": right / E**2,
                "f was squared: the second factor is the mean probability": (
                    E * (f * f).sum()
                ),
                "P was squared: the first factor is the share of the assignments": (
                    E * (P * P).sum()
                ),
                "probabilities were summed over tokens, not averaged": right * T,
                "the counts are not shares: divide them by T·k": right * T * k,
                "f counts the first choices only: all k assignments of a token count": (
                    E * (first * P).sum()
                ),
                "the sign is wrong: an uneven load must cost more": -right,
            },
            what=what,
        )
        if not got.requires_grad:
            raise Mistake(
                "the loss has no gradient: the mean probabilities must stay attached to"
                " the graph"
            )
        got.backward()
        grad = (E * f / T).expand(T, E)
        diagnose(
            probs.grad,
            right=grad,
            mistakes={},
            tol=1e-5,
            what="the gradient of the loss",
        )


@check.exercise(
    points=4,
    minutes=35,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Sort your rows by the rank that has their expert. Each rank gets a list of"
            " tensors from all others: what must it know to run the right expert on"
            " each row, and what must come back in which order?"
        ),
        (
            "One all_to_all for the rows, one for the numbers of their experts (both"
            " uneven), then compute, then an all_to_all back: what came from rank j"
            " goes back to rank j in the same order, and arrives where you sorted it."
        ),
        (
            "owner = experts // (E // p); order = owner.argsort(stable=True); counts ="
            " bincount(owner, minlength=p).tolist(); split x[order] and experts[order]"
            " by counts; back = cat(all_to_all(results)); out[order] = back."
        ),
    ),
)
def dispatch(answer):
    """Challenge: run each row through its expert, on whichever rank that is."""
    d = 4
    for p, E, sizes in (
        (4, 8, [5, 5, 5, 5]),
        (2, 6, [7, 4]),
        (3, 3, [0, 6, 3]),
        (1, 2, [3]),
    ):
        weights = torch.randn(E, d, d)
        xs = [torch.randn(n, d) for n in sizes]
        # the last expert gets nothing
        chosen = [torch.randint(E - (p > 1), (n,)) for n in sizes]

        def local(comm, weights=weights, E=E):
            mine = range(comm.rank * E // comm.size, (comm.rank + 1) * E // comm.size)

            def apply(rows: Tensor, numbers: Tensor) -> Tensor:
                if numbers.shape != rows.shape[:1] or numbers.is_floating_point():
                    raise Mistake(
                        "experts_here(rows, numbers) takes one whole number for"
                        " each row"
                    )
                asked = set(numbers.tolist())
                if not asked <= set(mine):
                    cure = "a row goes to rank e // (E / p) for its expert e"
                    if mine.start and max(asked) < len(mine):
                        cure = "do the numbers count from 0 on each rank? They do not"
                    raise Mistake(
                        f"rank {comm.rank} was asked for experts"
                        f" {sorted(asked - set(mine))}; it has"
                        f" {mine.start} … {mine.stop - 1}: {cure}"
                    )
                return F.silu(torch.einsum("nd,nde->ne", rows, weights[numbers]))

            return apply

        results, ledger = on_ranks(
            p,
            lambda comm, xs=xs, c=chosen, local=local, E=E: answer(
                comm, xs[comm.rank], c[comm.rank], local(comm), E
            ),
        )
        for r, got in enumerate(results):
            arrived = sum(int((c // (E // p) == r).sum()) for c in chosen)
            if isinstance(got, Tensor) and got.shape == (arrived, d) != (sizes[r], d):
                raise Mistake(
                    f"rank {r} of {p} returns the {arrived} rows that its experts got:"
                    " send the results back to where the rows came from"
                )
            expect(
                got,
                shape=(sizes[r], d),
                dtype=torch.float32,
                what=f"dispatch(...) on rank {r} of {p}",
            )
            check_dispatch(
                got, xs, chosen, weights, r, f"dispatch(...) on rank {r} of {p}"
            )
        if p > 1:
            _dispatch_bytes(ledger, xs, chosen, E, d)


def _dispatch_bytes(
    ledger, xs: list[Tensor], chosen: list[Tensor], E: int, d: int
) -> None:
    """A row travels to its expert and back, with one number: no rank gathers all."""
    p = len(xs)
    owner = [c // (E // p) for c in chosen]
    row = 4 * d  # bytes
    number = 8
    most = 0
    for r in range(p):
        sent = int((owner[r] != r).sum())
        received = 0
        for other in range(p):
            if other != r:
                received += int((owner[other] == r).sum())
        most = max(most, sent * (row + number) + received * row)
    counts = 2 * 8 * E  # how many rows go to each rank
    allowed = most + counts
    at_most(
        ledger,
        allowed,
        "each row travels once to its expert and once back, with the number of its"
        " expert",
        unit="bytes",
    )
