"""What marks the exercises of 04-peft/11-best-practice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.models import course_model
from llmlab.peft.best_practice import comparison
from llmlab.training import tasks

check = Checks("04-peft/11-best-practice")
BUDGET, STEPS, TARGET = 2_500, 40, 1.60


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=4,
    hints=(
        (
            "Two terms: one for what is frozen, one for what trains. Frozen parameters"
            " have no gradient and no averages."
        ),
        (
            "`base_bits` are bits: 8 make a byte. A trained parameter takes 2 + 2 + 4 +"
            " 4 + 4 bytes."
        ),
        "total · base_bits / 8 + 16 · trained.",
    ),
)
def training_bytes(answer):
    """The bytes that a frozen base and what trains beside it take."""
    total, trained, bits = (
        6_000_000 + 8 * int(torch.randint(1000, (1,))),
        40_000 + int(torch.randint(1000, (1,))),
        5.0,
    )
    what = "training_bytes(…)"
    got = float(expect(answer(total, trained, bits), kind=(int, float), what=what))
    frozen = total * bits / 8
    mistakes = {
        "base_bits are bits, not bytes: divide by 8": total * bits + 16 * trained,
        "the base is counted as if it trained: it has no gradient, master copy"
        " or averages": (16 * (total + trained)),
        "the base is counted at 2 bytes: it is stored with base_bits bits a"
        " parameter": (2 * total + 16 * trained),
        "the trained parameters are not part of the base: nothing is to be"
        " subtracted": (frozen + (16 - bits / 8) * trained),
        "the base is missing: it must be in memory too (5 // 8 is 0)": 16 * trained,
        "what trains is missing": frozen,
        "4 bytes of each trained parameter are missing, its master copy in fp32 or one"
        " of Adam's two averages: 16 bytes, not 12": frozen + 12 * trained,
        "2 bytes of each trained parameter are missing, its weight or its gradient: 16"
        " bytes, not 14": frozen + 14 * trained,
        "2 bytes too many for each trained parameter, its weight or its gradient: 16"
        " bytes, not 18": frozen + 18 * trained,
        "4 bytes too many for each trained parameter: 16 bytes, not 20": (
            frozen + 20 * trained
        ),
        "base_bits are the base's alone: what trains has weights of 2 bytes": (
            frozen + (bits / 8 + 14) * trained
        ),
        "the base has no gradient: it does not train": (
            frozen + 2 * total + 16 * trained
        ),
        "the base has no averages: it does not train": (
            frozen + 8 * total + 16 * trained
        ),
        "these are bits: 8 make a byte": 8 * (frozen + 16 * trained),
        "8 bytes of each trained parameter are missing: weight 2, gradient 2, master"
        " copy 4, averages 4 + 4": frozen + 8 * trained,
        "what trains takes 16 bytes, whatever the bits of the base": (
            frozen + 16 * bits / 8 * trained
        ),
        "base_bits are packed: no whole bytes for each parameter": (
            total + 16 * trained
        ),
        "2 bytes for what trains are its weights alone: it takes 16 bytes": (
            frozen + 2 * trained
        ),
    }
    diagnose(got, right=frozen + 16 * trained, mistakes=mistakes, tol=1e-9, what=what)
    if not close(float(answer(1000, 0, 4.127)), 1000 * 4.127 / 8):
        raise Mistake(
            "base_bits may be a fraction, as 4.127 for double quantisation: do not"
            " round"
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Compare every method with every other: `cost[:, None] <= cost` is an (n,"
            " n) table of pairs."
        ),
        (
            "j dominates i if it is no worse in both *and* better in one. Then ask"
            " whether any j dominates i."
        ),
        (
            "no_worse = (c[:, None] <= c) & (l[:, None] <= l); better = (c[:, None] <"
            " c) | (l[:, None] < l); ~(no_worse & better).any(0)."
        ),
    ),
)
def front(answer):
    """The methods that nobody dominates."""
    cost = torch.tensor([1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 1.0, 6.0])
    loss = torch.tensor([9.0, 7.0, 8.0, 7.0, 3.0, 3.0, 4.0, 9.0, 2.0])
    order, what = torch.randperm(9), "front(cost, loss)"
    cost, loss = cost[order], loss[order]
    value = answer(cost, loss)
    if isinstance(value, Tensor) and value.dtype == torch.int64 and len(value) < 9:
        raise Mistake("these are places: return True or False for each method")
    got = expect(value, shape=(9,), dtype=torch.bool, what=what)
    itself = (
        "every method counts as dominated by itself: one of the two must be strictly"
        " better"
    )
    if not got.any() and not answer(torch.ones(1), torch.ones(1)).any():
        raise Mistake(itself)
    no_worse = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    strictly = (cost[:, None] < cost) & (loss[:, None] < loss)
    either = (cost[:, None] < cost) | (loss[:, None] < loss)
    mistakes = {
        "one strict comparison is enough to dominate: of two that cost the same, only"
        " the one of smaller loss stays": ~strictly.any(0),
        "being better in one is not enough: j must also be no worse in the other": (
            ~either.any(0)
        ),
        "the axes are swapped: these are the methods that dominate nobody": (
            ~(no_worse & either).any(1)
        ),
        "these are the dominated ones: return the others": (no_worse & either).any(0),
        "only the smallest loss is kept: the cheap ones on the front are missing": (
            loss == loss.min()
        ),
        "only the smallest cost is kept": cost == cost.min(),
        "only the two ends of the front are kept, the smallest cost and the smallest"
        " loss": (cost == cost.min()) | (loss == loss.min()),
        "only the smallest sum is kept: cost and loss have no common unit": (
            cost + loss == (cost + loss).min()
        ),
        "only the smallest product is kept: cost and loss have no common unit": (
            cost * loss == (cost * loss).min()
        ),
        "two methods that are equal in both do not dominate each other": ~(
            no_worse & ~torch.eye(9, dtype=torch.bool)
        ).any(0),
        "a smaller loss at the same cost dominates, too": ~(
            no_worse & (cost[:, None] < cost)
        ).any(0),
        "a smaller cost at the same loss dominates, too": ~(
            no_worse & (loss[:, None] < loss)
        ).any(0),
        "of methods with the same cost, or equal in both, all are to be looked at: you"
        " go through them by cost and keep those with a loss below all before": (
            _falling(cost, loss, range(9))
        ),
        "of two methods that are equal in both, one is lost": _falling(
            cost, loss, loss.argsort(stable=True).tolist()
        ),
        "you compared each method with the next by cost only: compare all": (
            _next_only(cost, loss)
        ),
        "a larger loss counts as better: a smaller one is": comparison.pareto(
            cost, -loss
        ),
        "a larger cost counts as better: a smaller one is": comparison.pareto(
            -cost, loss
        ),
    }
    diagnose(got, right=comparison.pareto(cost, loss), mistakes=mistakes, what=what)
    for _ in range(5):
        c, x = torch.randint(0, 4, (6,)).float(), torch.randint(0, 4, (6,)).float()
        by_hand = torch.tensor(
            [not any(_dominates(c, x, j, i) for j in range(6)) for i in range(6)]
        )
        if not torch.equal(answer(c, x), by_hand):
            raise Mistake(
                f"right for one example, wrong for cost {c.tolist()} and loss"
                f" {x.tolist()}"
            )


def _falling(cost: Tensor, loss: Tensor, order) -> Tensor:
    """Those whose loss is below all before, by cost; `order` breaks ties."""
    kept = torch.zeros(len(cost), dtype=torch.bool)
    least = torch.inf
    for i in sorted(order, key=lambda i: float(cost[i])):
        if loss[i] < least:
            kept[i] = True
            least = loss[i]
    return kept


def _next_only(cost: Tensor, loss: Tensor) -> Tensor:
    """Those whose loss is below that of the one before, by cost."""
    kept = torch.ones(len(cost), dtype=torch.bool)
    order = cost.argsort()
    kept[order[1:][loss[order[:-1]] <= loss[order[1:]]]] = False
    return kept


def _dominates(c: Tensor, x: Tensor, j: int, i: int) -> bool:
    return bool(c[j] <= c[i] and x[j] <= x[i] and (c[j] < c[i] or x[j] < x[i]))


@check.exercise(
    points=5,
    minutes=30,
    difficulty=4,
    importance=5,
    in_place=True,
    hints=(
        (
            "Count before you train: `num_parameters(model, config)` of each method."
            " Which ones fit into 2,500 at all?"
        ),
        (
            "Look at the lesson's plot, left of 2,500. Then think of the rate: what"
            " size of change does such a number need?"
        ),
        (
            "(IA)³ trains 2,048 numbers. They start at 1 and must move by tenths: try"
            " rates from 0.1 to 0.6 with `tasks.fit`."
        ),
    ),
)
def reach(answer):
    """A held-out loss of 1.60 with 2,500 trained parameters and 40 steps."""
    tokenizer, seed = course_model.load_tokenizer(), int(torch.randint(100, (1,)))
    model, batches = (
        course_model.load(),
        tasks.make("source", tokenizer, seed=seed, batches=STEPS),
    )
    frozen = {
        p.data_ptr(): (name, p.detach().clone()) for name, p in model.named_parameters()
    }
    with _watching() as seen:
        said = expect(answer(model, batches), kind=int, what="reach(model, batches)")
    _within_budget(said, seen, _moved(model, frozen, seen))
    here = {id(p) for p in model.parameters()}
    if not here & seen.parameters.keys():
        raise Mistake(
            "what the optimizer moved is not in `model`: train the model itself, not a"
            " copy, and leave the method in it"
        )
    loss, _ = tasks.score(
        model.eval(),
        tasks.make("source", tokenizer, "valid", seed + 1, batches=6, size=16),
    )
    if not loss <= TARGET:
        raise Mistake(
            f"within the budget ({seen.trained:,} parameters, {seen.steps} steps), but"
            f" the held-out loss is {loss:.2f}: {TARGET:.2f} is asked. Another place"
            " for the numbers, or another rate"
        )


class _Seen:
    """What optimizers did: their steps, and every parameter that they moved."""

    def __init__(self) -> None:
        self.steps, self.parameters = 0, {}

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


@contextmanager
def _watching() -> Iterator[_Seen]:
    seen = _Seen()

    def before(optimizer, args, kwargs) -> None:
        seen.steps += 1
        for group in optimizer.param_groups:
            seen.parameters |= {id(p): p for p in group["params"] if p.grad is not None}

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


def _moved(model: nn.Module, frozen: dict, seen: _Seen) -> str:
    """The name of a pretrained weight that changed although no optimizer had it; "" if
    there is none.
    """
    now = {p.data_ptr(): p for p in model.parameters()}
    for place, (name, before) in frozen.items():
        if place not in now:
            return name  # replaced: a merge, which hides what was trained
        if id(now[place]) not in seen.parameters and not torch.equal(
            now[place], before
        ):
            return name
    return ""


def _within_budget(said: int, seen: _Seen, moved: str) -> None:
    if not seen.steps:
        raise Mistake(
            "no optimizer took a step: train with one of torch.optim, or with tasks.fit"
        )
    if seen.steps > STEPS:
        raise Mistake(
            f"{seen.steps} optimizer steps were taken: at most {STEPS} are allowed"
        )
    if seen.trained > BUDGET:
        raise Mistake(
            f"the optimizer moved {seen.trained:,} parameters: at most {BUDGET:,} may"
            " train"
        )
    if moved:
        raise Mistake(
            f"{moved} changed outside the optimizer, or was merged: all else must stay"
            " as it was"
        )
    if said != seen.trained:
        raise Mistake(
            f"you returned {said:,}, but the optimizer moved {seen.trained:,}"
            " parameters: count what trains"
        )
