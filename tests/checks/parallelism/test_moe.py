"""Wrong answers to the exercises of 05-parallelism/09-moe, each with the diagnosis that
it must get.
"""

import math

import torch

from llmlab.parallelism.moe.moe import Routing, keep
from llmlab.parallelism.moe.moe import route as reference
from tests.checks.rejecting import Wrong, rejects

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
    ],
)
