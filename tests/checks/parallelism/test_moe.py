"""Wrong answers to the exercises of 05-parallelism/09-moe, each with the diagnosis that
it must get.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.parallelism.moe import check
from llmlab.parallelism.moe.moe import Routing, keep
from llmlab.parallelism.moe.moe import route as reference
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def not_renormalised(logits, k):
    r = reference(logits, k, renormalise=False)
    return r.experts, r.weights


def the_logits(logits, k):
    r = reference(logits, k)
    return r.experts, logits.float().topk(k).values


def over_tokens(logits, k):
    r = reference(logits, k)
    return r.experts, logits.float().softmax(0).gather(1, r.experts)


def twice(logits, k):
    values, experts = logits.float().softmax(-1).topk(k)
    return experts, values.softmax(-1)


def in_the_dtype_of_the_logits(logits, k):
    values, experts = logits.softmax(-1).topk(k)
    return experts, values / values.sum(-1, keepdim=True)


def float_too_late(logits, k):
    values, experts = logits.softmax(-1).topk(k)
    values = values.float()
    return experts, values / values.sum(-1, keepdim=True)


def smallest(logits, k):
    r = reference(logits, k)
    return logits.float().topk(k, largest=False).indices, r.weights


def unsorted(logits, k):
    r = reference(logits, k)
    return r.experts.sort(-1).values, r.weights


def other_way_round(logits, k):
    r = reference(logits, k)
    return r.weights, r.experts


def all_the_same(logits, k):
    r = reference(logits, k)
    return r.experts, torch.full_like(r.weights, 1 / k)


# Exercise 2


def queue(experts, E, C, order="position"):
    return keep(
        Routing(experts, torch.rand(experts.shape), torch.zeros(len(experts), E)),
        C,
        order,
    )


def C(experts, E, factor):
    return math.ceil(experts.numel() / E * factor)


def forgets_k(experts, E, factor):
    return queue(experts, E, math.ceil(len(experts) / E * factor))


def rounds_down(experts, E, factor):
    return queue(experts, E, int(experts.numel() / E * factor))


def no_factor(experts, E, factor):
    return queue(experts, E, C(experts, E, 1.0))


def one_too_many(experts, E, factor):
    return queue(experts, E, C(experts, E, factor) + 1)


def one_too_few(experts, E, factor):
    return queue(experts, E, C(experts, E, factor) - 1)


def first_choices_first(experts, E, factor):
    return queue(experts, E, C(experts, E, factor), "choice")


def latest_first(experts, E, factor):
    return queue(experts.flip(0), E, C(experts, E, factor)).flip(0)


def all_or_nothing(experts, E, factor):
    return torch.bincount(experts.flatten(), minlength=E)[experts] <= C(
        experts, E, factor
    )


def whole_tokens(experts, E, factor):
    C, taken, kept = (
        math.ceil(experts.numel() / E * factor),
        [0] * E,
        torch.zeros_like(experts, dtype=torch.bool),
    )
    for t, chosen in enumerate(experts.tolist()):
        if all(taken[e] < C for e in chosen):
            kept[t] = True
            for e in chosen:
                taken[e] += 1
    return kept


def inverted(experts, E, factor):
    return ~queue(experts, E, C(experts, E, factor))


def keeps_all(experts, E, factor):
    return torch.ones_like(experts, dtype=torch.bool)


def integers(experts, E, factor):
    return queue(experts, E, C(experts, E, factor)).int()


# Exercise 3


def shares(probs, experts):
    return torch.bincount(experts.flatten(), minlength=probs.shape[1]) / experts.numel()


def right_balance(probs, experts):
    return probs.shape[1] * (shares(probs, experts) * probs.mean(0)).sum()


def no_E(probs, experts):
    return right_balance(probs, experts) / probs.shape[1]


def per_token(probs, experts):
    return right_balance(probs, experts) * experts.shape[1]


def mean_for_sum(probs, experts):
    return (shares(probs, experts) * probs.mean(0)).mean()


def f_squared(probs, experts):
    return probs.shape[1] * shares(probs, experts).square().sum() + 0 * probs.sum()


def P_squared(probs, experts):
    return probs.shape[1] * probs.mean(0).square().sum()


def summed_probs(probs, experts):
    return right_balance(probs, experts) * len(probs)


def counts(probs, experts):
    return right_balance(probs, experts) * experts.numel()


def first_choices(probs, experts):
    E = probs.shape[1]
    f = torch.bincount(experts[:, 0], minlength=E) / len(experts)
    return E * (f * probs.mean(0)).sum()


def detached(probs, experts):
    return right_balance(probs.detach(), experts)


def negative(probs, experts):
    return -right_balance(probs, experts)


# Exercise 4


def journey(comm, x, experts, experts_here, E, finish):
    owner = experts // (E // comm.size)
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=comm.size).tolist()
    rows = comm.all_to_all(list(x[order].split(counts)))
    numbers = comm.all_to_all(list(experts[order].split(counts)))
    done = experts_here(torch.cat(rows), torch.cat(numbers))
    back = torch.cat(comm.all_to_all(list(done.split([len(r) for r in rows]))))
    return finish(back, order)


def unsorted_home(comm, x, experts, experts_here, E):
    return journey(comm, x, experts, experts_here, E, lambda back, order: back)


def permuted_again(comm, x, experts, experts_here, E):
    return journey(comm, x, experts, experts_here, E, lambda back, order: back[order])


def numbers_not_sorted(comm, x, experts, experts_here, E):
    owner = experts // (E // comm.size)
    counts = torch.bincount(owner, minlength=comm.size).tolist()
    order = owner.argsort(stable=True)
    rows = comm.all_to_all(list(x[order].split(counts)))
    numbers = comm.all_to_all(list(experts.split(counts)))
    done = experts_here(torch.cat(rows), torch.cat(numbers))
    out = torch.empty_like(x)
    out[order] = torch.cat(comm.all_to_all(list(done.split([len(r) for r in rows]))))
    return out


def owner_modulo(comm, x, experts, experts_here, E):
    owner = experts % comm.size
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=comm.size).tolist()
    rows = comm.all_to_all(list(x[order].split(counts)))
    numbers = comm.all_to_all(list(experts[order].split(counts)))
    return torch.cat(
        comm.all_to_all(
            list(
                experts_here(torch.cat(rows), torch.cat(numbers)).split(
                    [len(r) for r in rows]
                )
            )
        )
    )


def local_numbers(comm, x, experts, experts_here, E):
    def relabelled(rows, numbers):
        return experts_here(rows, numbers % (E // comm.size))

    return journey(
        comm, x, experts, relabelled, E, lambda back, order: back[order.argsort()]
    )


def only_here(comm, x, experts, experts_here, E):
    here = experts // (E // comm.size) == comm.rank
    out = torch.zeros_like(x)
    out[here] = experts_here(x[here], experts[here])
    return out


def elsewhere_untouched(comm, x, experts, experts_here, E):
    here = experts // (E // comm.size) == comm.rank
    out = x.clone()
    out[here] = experts_here(x[here], experts[here])
    return out


def gathers_everything(comm, x, experts, experts_here, E):
    rows, numbers, p = comm.all_gather(x), comm.all_gather(experts), comm.size
    here = numbers // (E // p) == comm.rank
    out = torch.zeros_like(rows)
    out[here] = experts_here(rows[here], numbers[here])
    sizes = [int(s) for s in comm.all_gather(torch.tensor([len(x)]))]
    start = sum(sizes[: comm.rank])
    return comm.all_reduce(out)[start : start + len(x)]


def sends_only(comm, x, experts, experts_here, E):
    owner = experts // (E // comm.size)
    parts = [x[owner == r] for r in range(comm.size)]
    if comm.rank == 0:
        return torch.cat(parts)
    return torch.cat(comm.all_to_all(parts))


def never_back(comm, x, experts, experts_here, E):
    return x.clone()


def worst_first(logits, k):
    values, experts = logits.float().softmax(-1).topk(k)
    return experts.flip(-1), (values / values.sum(-1, keepdim=True)).flip(-1)


def among_tokens(logits, k):
    values, experts = logits.float().softmax(-1).topk(k, 0)
    return experts.T, (values / values.sum(0)).T


def sigmoids(logits, k):
    values, experts = logits.float().sigmoid().topk(k)
    return experts, values / values.sum(-1, keepdim=True)


def normalised_over_tokens(logits, k):
    values, experts = logits.float().softmax(-1).topk(k)
    return experts, values / values.sum(0, keepdim=True)


def adding_up_to_k(logits, k):
    experts, weights = softmax_of_the_largest(logits, k)
    return experts, k * weights


def softmax_of_the_largest(logits, k):
    """Right: what is divided out again need not be computed."""
    values, experts = logits.float().sort(dim=-1, descending=True)
    return experts[:, :k], values[:, :k].softmax(-1)


def to_the_nearest(experts, E, factor):
    return queue(experts, E, round(experts.numel() / E * factor))


def rounded_before_the_factor(experts, E, factor):
    return queue(experts, E, math.ceil(math.ceil(experts.numel() / E) * factor))


def down_before_the_factor(experts, E, factor):
    return queue(experts, E, math.ceil(experts.numel() // E * factor))


def rounded_too_early(experts, E, factor):
    return queue(experts, E, int(math.ceil(experts.numel() / E) * factor))


def queues_of_choices(experts, E, factor):
    place = F.one_hot(experts, E).cumsum(0).gather(2, experts[..., None])[..., 0]
    return place <= C(experts, E, factor)


def largest_number(experts, E, factor):
    return queue(experts, E, C(experts, int(experts.max()) + 1, factor))


def last_choice_first(experts, E, factor):
    return queue(experts.flip(1), E, C(experts, E, factor)).flip(1)


def all_kept_or_none(experts, E, factor):
    kept = queue(experts, E, C(experts, E, factor))
    return kept.all(1, keepdim=True).expand_as(kept)


def by_a_loop(experts, E, factor):
    """Right: plain Python."""
    room = [C(experts, E, factor)] * E
    kept = []
    for e in experts.flatten().tolist():
        kept.append(room[e] > 0)
        room[e] -= 1
    return torch.tensor(kept).view(experts.shape)


def mean_over_experts(probs, experts):
    return probs.shape[1] * (shares(probs, experts).sum() * probs.mean(1)).sum()


def experts_that_were_named(probs, experts):
    E = int(experts.max()) + 1
    f = torch.bincount(experts.flatten()) / experts.numel()
    return E * (f * probs.mean(0)[:E]).sum()


def by_einsum(probs, experts):
    """Right: counts as a sum of one-hot rows."""
    T, E = probs.shape
    hot = F.one_hot(experts, E).float()
    return E * torch.einsum("tke,se->", hot, probs) / (experts.numel() * T)


def by_masks(comm, x, experts, experts_here, E, numbers=None, home=None, residual=0):
    owner = experts // (E // comm.size)
    own = [(owner == r).nonzero()[:, 0] for r in range(comm.size)]
    rows = comm.all_to_all([x[i] for i in own])
    numbers = numbers or (lambda: comm.all_to_all([experts[i] for i in own]))
    results = [experts_here(a, b) for a, b in zip(rows, numbers(), strict=True)]
    if home is not None:
        return home(results)
    out = residual * x
    for i, back in zip(own, comm.all_to_all(results), strict=True):
        out[i] += back
    return out


def first_expert_for_all(comm, x, experts, experts_here, E):
    def numbers():
        owner = experts // (E // comm.size)
        first = [
            torch.full((int((owner == r).sum()),), r * (E // comm.size))
            for r in range(comm.size)
        ]
        return comm.all_to_all(first)

    return by_masks(comm, x, experts, experts_here, E, numbers)


def added_to_x(comm, x, experts, experts_here, E):
    return by_masks(comm, x, experts, experts_here, E, residual=1)


def results_stay(comm, x, experts, experts_here, E):
    return by_masks(comm, x, experts, experts_here, E, home=torch.cat)


def the_best_k_times(logits, k):
    experts = logits.argmax(-1, keepdim=True).expand(-1, k)
    return experts, torch.full(experts.shape, 1 / k) + 0 * logits[:, :1].float()


def k_after_the_rounding(experts, E, factor):
    T, k = experts.shape
    return queue(experts, E, k * math.ceil(T / E * factor))


test_wrong_answers = rejects(
    "05-parallelism/09-moe",
    [
        Wrong("route", not_renormalised, "not renormalised"),
        Wrong("route", the_logits, "these are the logits"),
        Wrong("route", over_tokens, "over tokens"),
        Wrong("route", twice, "taken twice"),
        Wrong("route", in_the_dtype_of_the_logits, "route in float32"),
        Wrong("route", float_too_late, "float32"),
        Wrong("route", smallest, "smallest logits"),
        Wrong("route", unsorted, "not sorted"),
        Wrong("route", other_way_round, "did you return the weights first"),
        Wrong("route", all_the_same, "counts the same"),
        Wrong("places", forgets_k, "does not count k"),
        Wrong("places", rounds_down, "rounded down"),
        Wrong("places", no_factor, "factor is ignored"),
        Wrong("places", one_too_many, "one place too many"),
        Wrong("places", one_too_few, "left empty"),
        Wrong("places", first_choices_first, "all first choices were served before"),
        Wrong("places", latest_first, "the latest tokens"),
        Wrong("places", all_or_nothing, "drops everybody"),
        Wrong("places", whole_tokens, "lost all its places"),
        Wrong("places", inverted, "marks what is dropped"),
        Wrong("places", keeps_all, "nobody is dropped"),
        Wrong("places", integers, "True and False are asked"),
        Wrong("balance", no_E, "factor E is missing"),
        Wrong("balance", per_token, "divide by T·k"),
        Wrong("balance", mean_for_sum, "mean over experts"),
        Wrong("balance", f_squared, "f was squared"),
        Wrong("balance", P_squared, "P was squared"),
        Wrong("balance", summed_probs, "not averaged"),
        Wrong("balance", counts, "counts are not shares"),
        Wrong("balance", first_choices, "f counts the first choices only"),
        Wrong("balance", detached, "no gradient"),
        Wrong("balance", negative, "sign is wrong"),
        Wrong("dispatch", unsorted_home, "sorted by rank"),
        Wrong("dispatch", permuted_again, "wrong permutation"),
        Wrong("dispatch", numbers_not_sorted, "was asked for experts"),
        Wrong("dispatch", owner_modulo, "was asked for experts"),
        Wrong("dispatch", local_numbers, "was asked for experts"),
        Wrong("dispatch", only_here, "whose expert is here"),
        Wrong("dispatch", elsewhere_untouched, "came back as they were"),
        Wrong("dispatch", gathers_everything, "travels once to its expert"),
        Wrong("dispatch", sends_only, "do not fit together"),
        Wrong("dispatch", never_back, "came back as they were"),
        Wrong("route", worst_first, "best expert comes last"),
        Wrong("route", among_tokens, "among the 6 tokens"),
        Wrong("route", sigmoids, "sigmoids"),
        Wrong("route", normalised_over_tokens, "over the tokens"),
        Wrong("route", adding_up_to_k, "add up to k"),
        Wrong("places", to_the_nearest, "to the nearest"),
        Wrong("places", rounded_before_the_factor, "before the rounding"),
        Wrong("places", down_before_the_factor, "rounds once"),
        Wrong("places", rounded_too_early, "rounding comes last"),
        Wrong("places", queues_of_choices, "queue of its own"),
        Wrong("places", largest_number, "the largest number + 1"),
        Wrong("places", last_choice_first, "last choice is served first"),
        Wrong("places", all_kept_or_none, "loses all its places"),
        Wrong("balance", mean_over_experts, "this is over experts"),
        Wrong("balance", experts_that_were_named, "the largest number + 1"),
        Wrong("dispatch", first_expert_for_all, "send the numbers"),
        Wrong("dispatch", added_to_x, "x was added"),
        Wrong("dispatch", results_stay, "another rank's is among them"),
        Wrong("route", the_best_k_times, "k times"),
        Wrong("places", k_after_the_rounding, "k comes before the rounding"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("route", softmax_of_the_largest),
        ("places", by_a_loop),
        ("balance", by_einsum),
        ("dispatch", by_masks),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
