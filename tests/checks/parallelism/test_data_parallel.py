"""Wrong answers to the exercises of 05-parallelism/02-data-parallel, each with the
diagnosis that it must get.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.checks.parallelism.data_parallel import check
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def fill(sizes, limit, order=None, full=lambda held, limit: held >= limit):
    plan, filling = [], []
    for i in reversed(range(len(sizes))) if order is None else order:
        filling.append(i)
        if full(sum(sizes[j] for j in filling), limit):
            plan.append(filling)
            filling = []
    return [*plan, filling] if filling else plan


def forward_order(sizes, limit):
    return fill(sizes, limit, range(len(sizes)))


def turned_around_afterwards(sizes, limit):
    return [bucket[::-1] for bucket in forward_order(sizes, limit)[::-1]]


def forward_within_a_bucket(sizes, limit):
    return [bucket[::-1] for bucket in fill(sizes, limit)]


def last_one_forgotten(sizes, limit):
    plan = fill(sizes, limit)
    whole = [b for b in plan if sum(sizes[i] for i in b) >= limit]
    return whole


def empty_bucket_at_the_end(sizes, limit):
    plan = fill(sizes, limit)
    return [*plan, []] if plan and sum(sizes[i] for i in plan[-1]) >= limit else plan


def never_above_the_limit(sizes, limit):
    plan, filling = [], []
    for i in reversed(range(len(sizes))):
        if filling and sum(sizes[j] for j in filling) + sizes[i] > limit:
            plan.append(filling)
            filling = []
        filling.append(i)
    return [*plan, filling] if filling else plan


def more_than_the_limit(sizes, limit):
    return fill(sizes, limit, full=lambda held, limit: held > limit)


def bytes_for_numbers(sizes, limit):
    return [[sizes[i] for i in bucket] for bucket in fill(sizes, limit)]


def first_parameter_missing(sizes, limit):
    return fill(sizes, limit, range(len(sizes) - 1, 0, -1))


def one_each(sizes, limit):
    return [[i] for i in reversed(range(len(sizes)))]


# Exercise 2


def mean(comm, loss_sum, tokens, weights, divide, op="sum", value=None, reduce=True):
    N = comm.all_reduce(torch.tensor(tokens)).item()
    (loss_sum / divide(N, tokens, comm.size)).backward()
    for w in weights:
        w.grad = comm.all_reduce(w.grad, op) if reduce else w.grad
    total = comm.all_reduce(loss_sum.detach()).item()
    return (
        total / N if value is None else value(total, N, loss_sum.item(), tokens, comm)
    )


def mean_of_means(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: n, "mean")


def means_added(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: n)


def divided_twice(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: N, "mean")


def not_divided(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: 1)


def divided_by_ranks(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: 1, "mean")


def not_reduced(comm, loss_sum, tokens, weights):
    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: N, reduce=False)


def nothing_sent(comm, loss_sum, tokens, weights):
    (loss_sum / tokens).backward()
    return loss_sum.item() / tokens


def result_thrown_away(comm, loss_sum, tokens, weights):
    N = comm.all_reduce(torch.tensor(tokens)).item()
    (loss_sum / N).backward()
    for w in weights:
        comm.all_reduce(w.grad)
    return comm.all_reduce(loss_sum.detach()).item() / N


def own_loss(comm, loss_sum, tokens, weights):
    return mean(
        comm,
        loss_sum,
        tokens,
        weights,
        lambda N, n, p: N,
        value=lambda t, N, own, n, c: own / n,
    )


def loss_of_means(comm, loss_sum, tokens, weights):
    def average(t, N, own, n, c):
        return c.all_reduce(torch.tensor(own / n), "mean").item()

    return mean(comm, loss_sum, tokens, weights, lambda N, n, p: N, value=average)


def summed_loss(comm, loss_sum, tokens, weights):
    return mean(
        comm,
        loss_sum,
        tokens,
        weights,
        lambda N, n, p: N,
        value=lambda t, N, own, n, c: t,
    )


def no_backward(comm, loss_sum, tokens, weights):
    N = comm.all_reduce(torch.tensor(tokens)).item()
    return comm.all_reduce(loss_sum.detach()).item() / N


# Exercise 3


def step(
    comm,
    model,
    microbatches,
    max_norm,
    divide=lambda N, own, n, m: N,
    reduction="sum",
    op="sum",
    clip="after",
):
    own = sum(len(y) for _, y in microbatches)
    N = comm.all_reduce(torch.tensor(own)).item()
    for x, y in microbatches:
        loss = F.cross_entropy(model(x), y, reduction=reduction)
        (loss / divide(N, own, len(y), len(microbatches))).backward()
    weights = list(model.parameters())
    if clip == "before":
        nn.utils.clip_grad_norm_(weights, max_norm)
    flat = comm.all_reduce(torch.cat([w.grad.flatten() for w in weights]), op)
    for w, g in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.grad = g.view_as(w)
    if clip == "after":
        nn.utils.clip_grad_norm_(weights, max_norm)
    return [w.grad for w in weights]


def number_of_microbatches(comm, model, microbatches, max_norm):
    return step(
        comm,
        model,
        microbatches,
        max_norm,
        lambda N, own, n, m: m,
        reduction="mean",
        op="mean",
    )


def means_of_microbatches_added(comm, model, microbatches, max_norm):
    return step(
        comm, model, microbatches, max_norm, lambda N, own, n, m: 1, reduction="mean"
    )


def own_tokens_averaged(comm, model, microbatches, max_norm):
    return step(
        comm, model, microbatches, max_norm, lambda N, own, n, m: own, op="mean"
    )


def own_tokens_added(comm, model, microbatches, max_norm):
    return step(comm, model, microbatches, max_norm, lambda N, own, n, m: own)


def averaged_once_more(comm, model, microbatches, max_norm):
    return step(comm, model, microbatches, max_norm, op="mean")


def sums(comm, model, microbatches, max_norm):
    return step(comm, model, microbatches, max_norm, lambda N, own, n, m: 1)


def clipped_first(comm, model, microbatches, max_norm):
    return step(comm, model, microbatches, max_norm, clip="before")


def not_clipped(comm, model, microbatches, max_norm):
    return step(comm, model, microbatches, max_norm, clip="never")


def reduced_after_each(comm, model, microbatches, max_norm):
    N = comm.all_reduce(torch.tensor(sum(len(y) for _, y in microbatches))).item()
    for x, y in microbatches:
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
        for w in model.parameters():
            w.grad = comm.all_reduce(w.grad)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return [w.grad for w in model.parameters()]


def reduced_twice(comm, model, microbatches, max_norm):
    """Sends a second, useless copy of everything."""
    grads = step(comm, model, microbatches, max_norm)
    return [comm.all_reduce(g, "mean") for g in grads]


def zeroed_between(comm, model, microbatches, max_norm):
    N = comm.all_reduce(torch.tensor(sum(len(y) for _, y in microbatches))).item()
    for x, y in microbatches:
        model.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    for w in model.parameters():
        w.grad = comm.all_reduce(w.grad)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return [w.grad for w in model.parameters()]


def never_reduced(comm, model, microbatches, max_norm):
    N = comm.all_reduce(torch.tensor(sum(len(y) for _, y in microbatches))).item()
    for x, y in microbatches:
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return [w.grad for w in model.parameters()]


def no_gradients(comm, model, microbatches, max_norm):
    return [w.grad for w in model.parameters()]


def left_in_grad(comm, model, microbatches, max_norm):
    step(comm, model, microbatches, max_norm)


# Exercise 4


def hooked(comm, weights, plan, backward, start=None):
    start = start or (lambda flat: comm.all_reduce(flat, "mean", async_op=True))
    bucket_of = {i: b for b, bucket in enumerate(plan) for i in bucket}
    missing, handles = [len(bucket) for bucket in plan], {}

    def arrive(i):
        b = bucket_of[i]
        missing[b] -= 1
        if missing[b] == 0:
            handles[b] = start(torch.cat([weights[j].grad.flatten() for j in plan[b]]))

    for i, w in enumerate(weights):
        w.register_post_accumulate_grad_hook(lambda _, i=i: arrive(i))
    backward()
    return collect(weights, plan, [handles[b] for b in range(len(plan))])


def collect(weights, plan, results):
    means = [None] * len(weights)
    for bucket, done in zip(plan, results, strict=True):
        done = done.wait() if hasattr(done, "wait") else done
        for j, mean in zip(
            bucket, done.split([weights[j].numel() for j in bucket]), strict=True
        ):
            means[j] = mean.view_as(weights[j])
    return means


def waits_in_the_hook(comm, weights, plan, backward):
    return hooked(
        comm, weights, plan, backward, lambda flat: comm.all_reduce(flat, "mean")
    )


def after_backward(comm, weights, plan, backward):
    backward()
    flats = [torch.cat([weights[j].grad.flatten() for j in bucket]) for bucket in plan]
    return collect(
        weights, plan, [comm.all_reduce(flat, "mean", async_op=True) for flat in flats]
    )


def a_message_a_tensor(comm, weights, plan, backward):
    handles = {}
    for i, w in enumerate(weights):
        w.register_post_accumulate_grad_hook(
            lambda w, i=i: handles.update(
                {i: comm.all_reduce(w.grad, "mean", async_op=True)}
            )
        )
    backward()
    return [handles[i].wait() for i in range(len(weights))]


def sum_not_mean(comm, weights, plan, backward):
    return hooked(
        comm, weights, plan, backward, lambda flat: comm.all_reduce(flat, async_op=True)
    )


def result_forgotten(comm, weights, plan, backward):
    hooked(comm, weights, plan, backward)
    return [w.grad for w in weights]


def in_the_order_of_the_plan(comm, weights, plan, backward):
    means = hooked(comm, weights, plan, backward)
    return [means[j] for bucket in plan for j in bucket]


def late_binding(comm, weights, plan, backward):
    bucket_of = {i: b for b, bucket in enumerate(plan) for i in bucket}
    missing, handles = [len(bucket) for bucket in plan], {}
    for i, w in enumerate(weights):

        def arrive(_):
            b = bucket_of[i]  # noqa: B023
            missing[b] -= 1
            if missing[b] == 0:
                flat = torch.cat([weights[j].grad.flatten() for j in plan[b]])
                handles[b] = comm.all_reduce(flat, "mean", async_op=True)

        w.register_post_accumulate_grad_hook(arrive)
    backward()
    return collect(weights, plan, [handles[b] for b in range(len(plan))])


def left_in_the_weights(comm, weights, plan, backward):
    for w, mean in zip(weights, hooked(comm, weights, plan, backward), strict=True):
        w.grad = mean


def one_big_bucket(comm, weights, plan, backward):
    return after_backward(
        comm, weights, [[j for bucket in plan for j in bucket]], backward
    )


def no_backward_at_all(comm, weights, plan, backward):
    return [torch.zeros_like(w) for w in weights]


def counted(sizes, limit, left, order=None):
    plan, filling, filled = [], [], 0
    for i in order or reversed(range(len(sizes))):
        filling.append(i)
        filled += sizes[i]
        if filled >= limit:
            plan.append(filling)
            filling, filled = [], left(filled, limit)
    return [*plan, filling] if filling else plan


def never_set_back(sizes, limit):
    return counted(sizes, limit, lambda filled, limit: filled)


def excess_carried_on(sizes, limit):
    return counted(sizes, limit, lambda filled, limit: filled - limit)


def by_size(sizes, limit):
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return counted(sizes, limit, lambda *_: 0, order)


def places_from_the_end(sizes, limit):
    return [[len(sizes) - 1 - i for i in bucket] for bucket in fill(sizes, limit)]


def limit_of_parameters(sizes, limit):
    order = [*range(len(sizes))][::-1]
    return [order[i : i + limit] for i in range(0, len(sizes), limit)]


def last_one_joined(sizes, limit):
    plan = fill(sizes, limit)
    if len(plan) > 1 and sum(sizes[i] for i in plan[-1]) < limit:
        plan[-2:] = [plan[-2] + plan[-1]]
    return plan


def by_sums_of_buckets(sizes, limit):
    """Right: the bytes of a bucket are summed anew each time."""
    plan = [[]]
    for i in reversed(range(len(sizes))):
        if sum(sizes[j] for j in plan[-1]) >= limit:
            plan.append([])
        plan[-1].append(i)
    return [bucket for bucket in plan if bucket]


def first_weight_only(comm, loss_sum, tokens, weights):
    N = comm.all_reduce(torch.tensor(float(tokens))).item()
    (loss_sum / N).backward()
    weights[0].grad = comm.all_reduce(weights[0].grad)
    return comm.all_reduce(loss_sum.detach()).item() / N


def reduced_once_more(comm, loss_sum, tokens, weights):
    N = comm.all_reduce(torch.tensor(float(tokens))).item()
    (loss_sum / N).backward()
    for w in weights:
        w.grad = comm.all_reduce(comm.all_reduce(w.grad))
    return comm.all_reduce(loss_sum.detach()).item() / N


def all_in_one_message(comm, loss_sum, tokens, weights):
    """Right: gradients, tokens and loss travel as one vector, and are averaged."""
    loss_sum.backward()
    own = [w.grad.flatten() for w in weights]
    own.append(torch.tensor([float(tokens), loss_sum.item()]))
    *grads, last = comm.all_reduce(torch.cat(own), "mean").split([len(t) for t in own])
    N, loss = last.tolist()
    for w, g in zip(weights, grads, strict=True):
        w.grad.copy_(g.view_as(w) / N)
    return loss / N


def clipped_before_the_division(comm, model, microbatches, max_norm):
    weights = list(model.parameters())
    N = comm.all_reduce(torch.tensor(float(sum(len(y) for _, y in microbatches))))
    for x, y in microbatches:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for w in weights:
        w.grad = comm.all_reduce(w.grad)
    nn.utils.clip_grad_norm_(weights, max_norm)
    return [w.grad / N for w in weights]


def clipped_by_hand(comm, model, microbatches, max_norm):
    """Right: means weighed by their tokens, one norm by hand."""
    N = comm.all_reduce(torch.tensor(float(sum(len(y) for _, y in microbatches))))
    for x, y in microbatches:
        (F.cross_entropy(model(x), y) * len(y)).backward()
    grads = [comm.all_reduce(w.grad) / N for w in model.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g * torch.clamp(max_norm / (norm + 1e-6), max=1.0) for g in grads]


def sent_with_the_first(comm, weights, plan, backward):
    handles = [None] * len(plan)

    def start(b):
        grads = [weights[j].grad for j in plan[b]]
        grads = [torch.zeros(25) if g is None else g.flatten() for g in grads]
        handles[b] = comm.all_reduce(torch.cat(grads), "mean", async_op=True)

    for b, bucket in enumerate(plan):
        weights[bucket[0]].register_post_accumulate_grad_hook(lambda _, b=b: start(b))
    backward()
    results = [h.wait().split(25) for h in handles]
    return collect(weights, plan, [torch.cat(r) for r in results])


def backward_twice(comm, weights, plan, backward):
    backward()
    return hooked(comm, weights, plan, backward)


def loss_over_own_tokens(comm, loss_sum, tokens, weights):
    loss = all_in_one_message(comm, loss_sum, tokens, weights)
    N = comm.all_reduce(torch.tensor(float(tokens))).item()
    return loss * N / tokens


def clipped_otherwise(comm, model, microbatches, limit, norm_type=2.0, count=len):
    weights = list(model.parameters())
    own = float(sum(count(x) for x, _ in microbatches))
    N = comm.all_reduce(torch.tensor(own))
    for x, y in microbatches:
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    for w in weights:
        w.grad = comm.all_reduce(w.grad)
    nn.utils.clip_grad_norm_(weights, limit, norm_type)
    return [w.grad for w in weights]


def limit_over_ranks(comm, model, microbatches, max_norm):
    return clipped_otherwise(comm, model, microbatches, max_norm / comm.size)


def largest_number(comm, model, microbatches, max_norm):
    return clipped_otherwise(comm, model, microbatches, max_norm, float("inf"))


def numbers_for_tokens(comm, model, microbatches, max_norm):
    return clipped_otherwise(
        comm, model, microbatches, max_norm, count=torch.Tensor.numel
    )


test_wrong_answers = rejects(
    "05-parallelism/02-data-parallel",
    [
        Wrong("buckets", forward_order, "order of the model"),
        Wrong("buckets", turned_around_afterwards, "then turned around"),
        Wrong("buckets", forward_within_a_bucket, "within a bucket"),
        Wrong("buckets", last_one_forgotten, "the last bucket is missing"),
        Wrong("buckets", empty_bucket_at_the_end, "empty bucket"),
        Wrong("buckets", never_above_the_limit, "before it would reach the limit"),
        Wrong("buckets", more_than_the_limit, "exactly `limit` bytes"),
        Wrong("buckets", bytes_for_numbers, "not their bytes"),
        Wrong("buckets", first_parameter_missing, "stops at −1"),
        Wrong("buckets", one_each, "at other places"),
        Wrong("backward_mean", mean_of_means, "mean of the ranks' means"),
        Wrong("backward_mean", means_added, "means, added up"),
        Wrong("backward_mean", divided_twice, "divided by N and by 3 ranks"),
        Wrong("backward_mean", not_divided, "nothing was divided"),
        Wrong(
            "backward_mean", divided_by_ranks, "by the number of ranks, not of tokens"
        ),
        Wrong("backward_mean", not_reduced, "must be summed over ranks"),
        Wrong("backward_mean", nothing_sent, "nothing was sent"),
        Wrong("backward_mean", result_thrown_away, "must be summed over ranks"),
        Wrong("backward_mean", own_loss, "the loss is this rank's own"),
        Wrong(
            "backward_mean", loss_of_means, "the loss is the mean of the ranks' means"
        ),
        Wrong("backward_mean", summed_loss, "the loss is a sum over tokens"),
        Wrong("backward_mean", no_backward, "is backward called?"),
        Wrong("gradients_of_step", number_of_microbatches, "divided by its own length"),
        Wrong("gradients_of_step", means_of_microbatches_added, "means are added up"),
        Wrong(
            "gradients_of_step", own_tokens_averaged, "the ranks' means were averaged"
        ),
        Wrong("gradients_of_step", own_tokens_added, "the ranks' means were added up"),
        Wrong("gradients_of_step", averaged_once_more, "averaged over ranks once more"),
        Wrong("gradients_of_step", sums, "sums over tokens"),
        Wrong("gradients_of_step", clipped_first, "before the gradients were summed"),
        Wrong("gradients_of_step", not_clipped, "the norm is not clipped"),
        Wrong(
            "gradients_of_step", reduced_after_each, "is reduced again after the next"
        ),
        Wrong("gradients_of_step", reduced_twice, "reduce the gradients once"),
        Wrong("gradients_of_step", zeroed_between, "only the last microbatch"),
        Wrong("gradients_of_step", never_reduced, "nothing was summed over ranks"),
        Wrong("gradients_of_step", no_gradients, "is backward called?"),
        Wrong("gradients_of_step", left_in_grad, "returned None"),
        Wrong("overlapped", waits_in_the_hook, "a hook waits for its all-reduce"),
        Wrong("overlapped", after_backward, "not after backward"),
        Wrong("overlapped", a_message_a_tensor, "join the gradients of a bucket"),
        Wrong("overlapped", sum_not_mean, "the mean is asked"),
        Wrong("overlapped", result_forgotten, "what handle.wait() returns"),
        Wrong("overlapped", in_the_order_of_the_plan, "is another weight's"),
        Wrong("overlapped", late_binding, "KeyError"),
        Wrong("overlapped", left_in_the_weights, "returned None"),
        Wrong("overlapped", one_big_bucket, "send each bucket by itself"),
        Wrong("overlapped", no_backward_at_all, "backward() was not called"),
        Wrong("buckets", never_set_back, "not set back to 0"),
        Wrong("buckets", excess_carried_on, "counted for the next"),
        Wrong("buckets", by_size, "sorted by size"),
        Wrong("buckets", places_from_the_end, "reversed list"),
        Wrong("buckets", limit_of_parameters, "counts bytes"),
        Wrong("buckets", last_one_joined, "may hold less"),
        Wrong("backward_mean", first_weight_only, "only the first weight"),
        Wrong("backward_mean", reduced_once_more, "3 times too large"),
        Wrong("gradients_of_step", clipped_before_the_division, "before the division"),
        Wrong("overlapped", sent_with_the_first, "before it had come"),
        Wrong("overlapped", backward_twice, "called twice"),
        Wrong("backward_mean", loss_over_own_tokens, "over this rank's tokens"),
        Wrong("gradients_of_step", limit_over_ranks, "max_norm is divided"),
        Wrong("gradients_of_step", largest_number, "not the largest number"),
        Wrong("gradients_of_step", numbers_for_tokens, "tokens are its rows"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("buckets", by_sums_of_buckets),
        ("backward_mean", all_in_one_message),
        ("gradients_of_step", clipped_by_hand),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
