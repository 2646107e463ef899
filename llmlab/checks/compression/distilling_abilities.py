"""Checks of 06-compression/13-distilling-abilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import distilling_abilities as ours
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/13-distilling-abilities")
IGNORED = -100


# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Where is a token learnt? From the prompt's length on, up to the example's"
            " length. Compare positions, not tokens."
        ),
        (
            "`at = torch.arange(ids.shape[1])` and `prompts[:, None]` give a (B, T)"
            " comparison."
        ),
        "`ids.masked_fill((at < prompts[:, None]) | (at >= lengths[:, None]), -100)`",
    ),
)
def labels(answer):
    """−100 on prompts and behind the end; the reply and its end token stay."""
    case = draw_ids()
    what = "labels(ids, prompts, lengths)"
    got = expect(answer(*case), shape=(4, 10), dtype=torch.int64, what=what)
    diagnose(got, right=ours.labels(*case), mistakes=wrong_labels(*case), what=what)
    ids = torch.randint(2, 9, (2, 6))
    case = (ids, torch.tensor([1, 5]), torch.tensor([6, 6]))
    got = expect(answer(*case), shape=(2, 6), what="the labels")
    if not torch.equal(got, ours.labels(*case)):
        raise Mistake(
            "right for 4 examples of 10 places, wrong for 2 of 6 without padding: take"
            " the sizes from the arguments"
        )


def draw_ids() -> tuple[Tensor, Tensor, Tensor]:
    """Four examples whose end token, 1, is the padding as well."""
    ids = torch.randint(2, 9, (4, 10))
    prompts, lengths = torch.tensor([2, 4, 1, 6]), torch.tensor([5, 10, 4, 8])
    for row, length in enumerate(lengths.tolist()):
        ids[row, length - 1 :] = 1
    return ids, prompts, lengths


def wrong_labels(ids: Tensor, prompts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What usual mistakes make of the labels."""
    at = torch.arange(ids.shape[1])
    starts, stops = prompts[:, None], lengths[:, None]
    learnt = (at >= starts) & (at < stops)
    right = ids.masked_fill(~learnt, IGNORED)

    def where(mask: Tensor) -> Tensor:
        return ids.masked_fill(~mask, IGNORED)

    shifted = torch.full_like(ids, IGNORED)
    shifted[:, :-1] = right[:, 1:]
    return {
        "the prompt is learnt, too": where(at < stops),
        "padding is learnt, too: stop at the example's length": where(at >= starts),
        "nothing is left out": ids.clone(),
        "the first token of the reply is missing: it stands at the prompt's length": (
            where((at > starts) & (at < stops))
        ),
        "the last token of the prompt is learnt": where(
            (at >= starts - 1) & (at < stops)
        ),
        "the end token is missing: it belongs to the reply, though padding looks the"
        " same here": where((at >= starts) & (at < stops - 1)),
        "one token of padding is learnt": where((at >= starts) & (at <= stops)),
        "prompt and reply are swapped: the reply is learnt": where(at < starts),
        "only the end token is learnt: the whole reply is": where(at == stops - 1),
        "the labels are moved by one: here label and token stand at the same place, and"
        " the loss moves them": shifted,
        "what is left out is 0: it is −100, for 0 is a token": right.masked_fill(
            ~learnt, 0
        ),
        "what is left out is −1: it is −100, which `cross_entropy` skips": (
            right.masked_fill(~learnt, -1)
        ),
        "this is the mask: give the ids where it is true": learnt.long(),
        "the lengths are those of prompt and reply together: you added the prompt": (
            where((at >= starts) & (at < starts + stops))
        ),
        "the first example's prompt is taken for all: each row has its own": where(
            (at >= starts[:1]) & (at < stops)
        ),
        "the first example's length is taken for all: each row has its own": where(
            (at >= starts) & (at < stops[:1])
        ),
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    grads={"answer_logits": 0, "rationale_logits": 2},
    hints=(
        (
            "The same mean for both tasks: logits without the last, labels without the"
            " first, `F.cross_entropy`, which skips −100."
        ),
        (
            "`F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())`:"
            " a small function serves both."
        ),
        "`alpha * mean(answers) + (1 - alpha) * mean(rationales)`",
    ),
)
def mt_cot_loss(answer):
    """MT-CoT: α times the mean loss of answers, (1 − α) that of rationales."""
    case = telling(draw_tasks, ours.mt_cot_loss, wrong_mt_cot)
    what = "mt_cot_loss(answer_logits, answer_labels, …, 0.6)"
    got = expect(answer(*case), shape=(), dtype=torch.float32, what=what)
    right = ours.mt_cot_loss(*case)
    diagnose(got, right=right, mistakes=wrong_mt_cot(*case), what=what)
    for alpha, sizes in ((0.2, (1, 4, 6, 3)), (0.0, (4, 6, 5, 9)), (1.0, (2, 3, 9, 4))):
        case = draw_tasks(alpha, *sizes)
        got = expect(answer(*case), shape=(), what="the loss")
        if not close(got, ours.mt_cot_loss(*case), tol=1e-4):
            raise Mistake(
                f"right for α = 0.6, wrong for α = {alpha} and logits of other shapes:"
                " take α and the sizes from the arguments"
            )


def draw_tasks(
    alpha: float = 0.6, B: int = 3, short: int = 6, long: int = 11, V: int = 5
) -> tuple:
    """Logits and labels of two tasks; replies of unequal length."""
    case = []
    for T in (short, long):
        ids = torch.randint(V, (B, T))
        prompts = 1 + torch.arange(B) % 2
        lengths = T - (torch.arange(B) % 3) * (T > 4)
        case += [2 * torch.randn(B, T, V), ours.labels(ids, prompts, lengths)]
    return (*case, alpha)


def wrong_mt_cot(a: Tensor, of_a: Tensor, r: Tensor, of_r: Tensor, alpha: float):
    """What usual mistakes make of the loss."""

    def each(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1),
            wanted.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def mean(logits: Tensor, wanted: Tensor) -> Tensor:
        return each(logits, wanted) / (wanted != IGNORED).sum()

    def moved(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1], wanted[:, 1:]

    pairs = [moved(a, of_a), moved(r, of_r)]
    of_answers, of_rationales = (mean(*pair) for pair in pairs)
    counts = [(wanted != IGNORED).sum() for _, wanted in pairs]
    sums = [each(*pair) for pair in pairs]
    places = [each(z, w) / w.numel() for z, w in pairs]
    by_row = [
        torch.stack([mean(z[i : i + 1], w[i : i + 1]) for i in range(len(z))]).mean()
        for z, w in pairs
    ]
    zeros = [mean(z, w.clamp(min=0)) for z, w in pairs]
    flat = [mean(a, of_a), mean(r, of_r)]
    back = [mean(a[:, 1:], of_a[:, :-1]), mean(r[:, 1:], of_r[:, :-1])]

    def weigh(x: Tensor, y: Tensor) -> Tensor:
        return alpha * x + (1 - alpha) * y

    return {
        "α weighs the rationales: it belongs to the answers": weigh(
            of_rationales, of_answers
        ),
        "the weights are missing": of_answers + of_rationales,
        "both tasks weigh the same: use α": (of_answers + of_rationales) / 2,
        "the rationales' weight is missing: it is 1 − α": (
            alpha * of_answers + of_rationales
        ),
        "the answers' weight is missing: it is α": (
            of_answers + (1 - alpha) * of_rationales
        ),
        "only the answers are learnt": alpha * of_answers,
        "only the rationales are learnt": (1 - alpha) * of_rationales,
        "the logits are not moved against the labels: those at t predict the token at"
        " t + 1": weigh(*flat),
        "logits and labels are moved the wrong way": weigh(*back),
        "this is the sum over the tokens: the mean of each task is asked": weigh(*sums),
        "the weighted sums share one divisor: each task has its own mean": (
            weigh(*sums) / sum(counts)
        ),
        "the sums are divided by all places: −100 does not count": weigh(*places),
        "each reply weighs the same here: the mean is over all tokens of a task": weigh(
            *by_row
        ),
        "this is one mean over both tasks: the longer one would weigh more": (
            sum(sums) / sum(counts)
        ),
        "places with −100 are learnt, as token 0: leave them out": weigh(*zeros),
        "the sign is wrong: a cross-entropy is not negative": -weigh(
            of_answers, of_rationales
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Three steps in this order: throw out what ends in another number, throw"
            " out what came before, stop at `most`."
        ),
        (
            "`re.findall(r'-?\\d+', text)[-1]` is the last number. A text without one"
            " has an empty list."
        ),
        "`list(dict.fromkeys(right))[:most]` keeps the first of each, in order.",
    ),
)
def keep(answer):
    """Fine-tune-CoT's filter: right by the last number, each once, in order."""
    # all that is right first, so that no limit hides what is wrong
    for wanted, most in ((12, 20), (-2, 20), (12, 3), (-2, 2)):
        sampled = draw_samples(wanted)
        what = f"keep(sampled, {wanted}, {most})"
        got = expect(run_filter(answer, sampled, wanted, most), kind=list, what=what)
        right = ours.keep(sampled, wanted, most)
        name_wrong(got, right, sampled, wanted, most)
    sampled = ["1+2=3#3", "2+1=3#3"]
    got = expect(answer(sampled, 3, 5), kind=list, what="keep(sampled, 3, 5)")
    if got != sampled:
        raise Mistake(
            "with two right rationales and most = 5 both should come back, in order"
        )
    got = expect(answer(sampled, 4, 5), kind=list, what="keep(sampled, 4, 5)")
    if got:
        raise Mistake("no rationale ends in the answer, so none should come back")
    got = answer(["#3"] * 3 + ["3#03"], 3, 1)
    if got != ["#3"]:
        raise Mistake("with most = 1 one rationale should come back, the first")
    if answer(["#3", "3#3"], 3, 0) != []:
        raise Mistake("with most = 0 none should come back: ask before you append")


def run_filter(answer: Callable, sampled: list[str], wanted: int, most: int) -> object:
    """What the answer keeps; Mistake: where only a text without a number stops it."""
    try:
        return answer(sampled, wanted, most)
    except (IndexError, TypeError, AttributeError, ValueError) as error:
        numbered = [text for text in sampled if ours.last_number(text) is not None]
        answer(numbered, wanted, most)  # fails as well: then that error is shown
        raise Mistake(
            "a rationale without a number stops it, with"
            f" {type(error).__name__}: throw such a rationale out"
        ) from error


def draw_samples(wanted: int) -> list[str]:
    """Rationales that set each trap, in a random order behind the first seven."""
    a, b = torch.randint(10, 99, (2,)).tolist()
    first = f"{a}+{b}, so #{wanted}"
    second = f"{wanted} or {a}? #{a}"  # holds the answer, ends in another
    others = [
        f"#3{abs(wanted)}",  # ends with the same digits
        f"#{-wanted}",
        f"#{wanted}9",
        f"{b}+{a}, so #{wanted}",
        f"#{wanted}, I think.",
        f"{b}+{a}, so #{wanted}",
    ]
    order = torch.randperm(len(others)).tolist()
    # three that are wrong and three copies come early: each limit that is put too soon
    # keeps other texts
    early = [second, "I do not know", f"#{wanted + 1}", first, first, first]
    return early + [f"{wanted} it is, #{wanted}"] + [others[i] for i in order]


def name_wrong(
    got: list, right: list[str], sampled: list[str], wanted: int, most: int
) -> None:
    """Raises: Mistake: with the trap that the answer fell into."""
    if got == right:
        return

    def ends(text: str) -> bool:
        return ours.last_number(text) == wanted

    every = list(dict.fromkeys(filter(ends, sampled)))
    wrong = [text for text in got if text not in every]
    if any(ours.last_number(str(text)) is None for text in wrong):
        raise Mistake(f"{wrong[0]!r} was kept: it holds no number at all")
    if wrong:
        raise Mistake(
            f"{wrong[0]!r} was kept for the answer {wanted}: its last number is"
            f" {ours.last_number(str(wrong[0]))}. Compare that number, whole and with"
            " its sign"
        )
    if len(set(got)) < len(got):
        raise Mistake(f"the same rationale came back twice: {got!r}")
    if len(got) > most:
        raise Mistake(f"{len(got)} rationales came back, and most = {most}")
    lost = [text for text in right if text not in got]
    if lost:
        raise Mistake(why_lost(got, lost, every, sampled, wanted, most))
    raise Mistake("these are right ones, but not in the order they were drawn")


def why_lost(
    got: list, lost: list[str], every: list[str], sampled: list[str], n: int, most: int
) -> str:
    """Which right rationales are missing, and by which mistake."""
    head = sampled[:most]
    if got == [text for text in every if text in head]:
        return "`most` cuts what was drawn: filter first, and cut what is left"
    right = [text for text in sampled if ours.last_number(text) == n]
    if got == list(dict.fromkeys(right[:most])):
        return (
            "`most` counts copies: throw out what came before, and then cut what is"
            " left"
        )
    if len(got) == most:
        return (
            f"these are right ones, but not the first {most} in the order they were"
            f" drawn: {lost[0]!r} is missing"
        )
    if len(got) == 1 < most:
        return (
            "one rationale came back: different texts with the same number all count,"
            f" and {lost[0]!r} is missing"
        )
    if got and most <= len(every) and got == every[: len(got)]:
        return f"{len(got)} rationales came back, and most = {most}"
    return (
        f"{lost[0]!r} is missing: its last number is {n}. Look for the number"
        " anywhere in the text, whole and with its sign"
    )


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "Both are means of a truth value over pairs, not over single predictions.",
        (
            "Changed: `predicted != predicted_new`. Understood: the first is its label,"
            " and the second is its new label."
        ),
        "`((predicted == labels) & (predicted_new == new)).float().mean()`",
    ),
)
def consistency(answer):
    """Of counterfactual pairs: the share that changed, and that of both right."""
    case = telling(draw_pairs, right_pairs, wrong_pairs)
    what = "consistency(predicted, labels, predicted_new, new)"
    got = stacked(answer(*case), what)
    mistakes = wrong_pairs(*case)
    diagnose(got, right=right_pairs(*case), mistakes=mistakes, what=what)
    case = draw_pairs(count=5, classes=2)
    got = stacked(answer(*case), what)
    if not close(got, right_pairs(*case), tol=1e-5):
        raise Mistake("right for 40 pairs of 3 classes, wrong for 5 of 2")


def stacked(got: object, what: str) -> Tensor:
    """The two shares as one tensor."""
    got = expect(got, kind=tuple, what=what)
    if len(got) != 2:
        raise Mistake(f"{what} should be two numbers, changed and both right")
    return torch.tensor([float(x) for x in got])


def draw_pairs(count: int = 40, classes: int = 3) -> tuple[Tensor, ...]:
    """Predictions that are often right, more often before the edit than after it."""
    labels = torch.randint(classes, (count,))
    new = (labels + torch.randint(1, classes, (count,))) % classes
    guess = torch.randint(classes, (2, count))
    keep_first, keep_second = torch.rand(count) < 0.7, torch.rand(count) < 0.4
    predicted = torch.where(keep_first, labels, guess[0])
    return predicted, labels, torch.where(keep_second, new, guess[1]), new


def right_pairs(*case: Tensor) -> Tensor:
    """The right values, by the package."""
    return torch.tensor(ours.consistency(*(x.tolist() for x in case)))


def wrong_pairs(
    predicted: Tensor, labels: Tensor, predicted_new: Tensor, new: Tensor
) -> dict[str, Tensor]:
    """What usual mistakes make of the two shares."""
    first, second = predicted == labels, predicted_new == new
    changed = (predicted != predicted_new).float().mean()
    both = (first & second).float().mean()

    def two(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x, y]).float()

    a, b = first.float().mean(), second.float().mean()
    moved = predicted != predicted_new
    return {
        "the two numbers are swapped: changed comes first": two(both, changed),
        "the second is the mean of the two accuracies: a pair counts when both halves"
        " are right": two(changed, (a + b) / 2),
        "the second is the product of the two accuracies: count pairs": two(
            changed, a * b
        ),
        "the second counts pairs with one half right: both must be": two(
            changed, (first | second).float().mean()
        ),
        "the second looks at the edited questions alone: both halves count": two(
            changed, b
        ),
        "the second looks at the questions before the edit alone": two(changed, a),
        "the edited prediction is compared with the old label: it has a new one": two(
            changed, (first & (predicted_new == labels)).float().mean()
        ),
        "the first counts predictions that stayed: those that changed are asked": two(
            1 - changed, both
        ),
        "the first compares labels, not predictions": two(
            (labels != new).float().mean(), both
        ),
        "these are sums: shares of all pairs are asked": two(changed, both) * len(new),
        "the first is a share of the pairs whose first half is right: divide by all"
        " pairs": two((moved & first).sum() / first.sum().clamp(min=1), both),
        "the first counts only pairs whose first half is right: all pairs that changed"
        " count": two((moved & first).float().mean(), both),
        "these are percent: shares of all pairs are between 0 and 1": 100
        * two(changed, both),
        "the second is a share of the pairs that changed: divide by all pairs": two(
            changed, (first & second).sum() / moved.sum().clamp(min=1)
        ),
    }
