"""Wrong answers to the exercises of 05-parallelism/04-pipeline, and the diagnosis that
each must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.parallelism.pipeline import check
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def of_the_work(p, m, v=1):
    return (p - 1) / (v * m)


def the_busy_share(p, m, v=1):
    return m / (m + (p - 1) / v)


def no_chunks(p, m, v=1):
    return (p - 1) / (m + p - 1)


def all_divided(p, m, v=1):
    return (p - 1) / (m + p - 1) / v


def one_slot_more(p, m, v=1):
    return (p - 1) / (v * m + p)


def all_ranks(p, m, v=1):
    return p / (v * m + p - 1)


def v_times_more(p, m, v=1):
    return v * (p - 1) / (m + v * (p - 1))


def in_percent(p, m, v=1):
    return 100 * (p - 1) / (v * m + p - 1)


# Exercise 2


def phases(m, w):
    ops = [("F", i) for i in range(w)]
    for k in range(m - w):
        ops += [("F", w + k), ("B", k)]
    return ops + [("B", i) for i in range(m - w, m)]


def all_forwards_first(p, m, r):
    return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]


def from_the_other_end(p, m, r):
    return phases(m, min(r, m))


def one_ahead_too_many(p, m, r):
    return phases(m, min(p - r, m))


def all_alike(p, m, r):
    return phases(m, min(p - 1, m))


def no_warmup(p, m, r):
    return phases(m, 0)


def not_enough_microbatches(p, m, r):
    w = p - r - 1
    return (
        [("F", i) for i in range(w)]
        + [op for k in range(m - w) for op in (("F", w + k), ("B", k))]
        + [("B", i) for i in range(max(m - w, 0), m)]
    )


def last_in_first_out(p, m, r):
    ops, stack = [], []
    for kind, i in phases(m, min(p - r - 1, m)):
        stack += [i] if kind == "F" else []
        ops.append((kind, i if kind == "F" else stack.pop()))
    return ops


def numbered_from_one(p, m, r):
    return [(kind, i + 1) for kind, i in phases(m, min(p - r - 1, m))]


def backward_first(p, m, r):
    w = min(p - r - 1, m)
    steady = [op for k in range(m - w) for op in (("B", k), ("F", w + k))]
    return [("F", i) for i in range(w)] + steady + [("B", i) for i in range(m - w, m)]


def no_cooldown(p, m, r):
    w = min(p - r - 1, m)
    return phases(m, w)[: 2 * m - w] if w else phases(m, w)


def two_in_turn(p, m, r):
    w = min(p - r - 1, m)
    ops = phases(m, w)
    if m - w >= 2:
        ops[w + 2 : w + 4] = (
            [ops[w + 3], ops[w + 2]] if ops[w + 3][1] < w else ops[w + 2 : w + 4]
        )
    return ops


def as_text(p, m, r):
    return [f"{kind}{i}" for kind, i in phases(m, min(p - r - 1, m))]


# Exercise 3


def in_two(
    inputs,
    weights,
    dy,
    masked=lambda k: k > 0,
    keep=lambda before, after: before,
    grad=lambda x, dy: dy.T @ x,
):
    kept = []
    for k in range(len(weights) - 1, -1, -1):
        kept.append((inputs[k], dy))
        dy = dy @ weights[k]
        dy = dy * (inputs[k] > 0) if masked(k) else dy
    return dy, lambda: [grad(x, dy) for x, dy in reversed(kept)]


def no_mask(inputs, weights, dy):
    return in_two(inputs, weights, dy, masked=lambda k: False)


def mask_on_x(inputs, weights, dy):
    return in_two(inputs, weights, dy, masked=lambda k: True)


def transposed(inputs, weights, dy):
    return in_two(inputs, weights, dy, grad=lambda x, dy: x.T @ dy)


def backwards_order(inputs, weights, dy):
    dx, later = in_two(inputs, weights, dy)
    return dx, lambda: later()[::-1]


def at_once(inputs, weights, dy):
    dx, later = in_two(inputs, weights, dy)
    grads = later()
    return dx, lambda: grads


def at_once_by_einsum(inputs, weights, dy):
    grads = []
    for k in range(len(weights) - 1, -1, -1):
        grads.insert(0, torch.einsum("nb,na->ba", dy, inputs[k]))
        dy = dy @ weights[k]
        dy = dy * (inputs[k] > 0) if k else dy
    return dy, lambda: grads


def by_autograd(inputs, weights, dy):
    x, leaves = (
        inputs[0].clone().requires_grad_(),
        [w.clone().requires_grad_() for w in weights],
    )
    y = x
    for k, w in enumerate(leaves):
        y = (y.relu() if k else y) @ w.T
    dx, *grads = torch.autograd.grad(y, [x, *leaves], dy)
    return dx, lambda: grads


def asks_autograd_twice(inputs, weights, dy):
    leaves = [w.clone().requires_grad_() for w in weights]
    y = inputs[0]
    for k, w in enumerate(leaves):
        y = (y.relu() if k else y) @ w.T
    dx = dy
    for k in range(len(weights) - 1, -1, -1):
        dx = dx @ weights[k]
        dx = dx * (inputs[k] > 0) if k else dx
    return dx, lambda: list(torch.autograd.grad(y, leaves, dy))


def walks_again(inputs, weights, dy):
    return in_two(inputs, weights, dy)[0], lambda: in_two(inputs, weights, dy)[1]()


def kept_before_the_mask(inputs, weights, dy):
    kept, unmasked = [], dy
    for k in range(len(weights) - 1, -1, -1):
        kept.append((inputs[k], unmasked))
        unmasked, dy = unmasked @ weights[k], dy @ weights[k]
        dy = dy * (inputs[k] > 0) if k else dy
    return dy, lambda: [d.T @ x for x, d in reversed(kept)]


def no_function(inputs, weights, dy):
    dx, later = in_two(inputs, weights, dy)
    return dx, later()


def one_too_few(inputs, weights, dy):
    dx, later = in_two(inputs, weights, dy)
    return dx, lambda: later()[1:]


# Exercise 4


def run(
    comm,
    stage,
    ops,
    xs,
    ys,
    loss_fn,
    *,
    share=None,
    send="isend",
    clear=False,
    back=True,
    total_of=None,
    leaf=True,
):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    kept, losses = {}, []
    for kind, i in ops:
        if kind == "F":
            x = xs[i] if first else comm.recv(comm.rank - 1)
            x = x.requires_grad_() if leaf and not first else x
            y = stage(x)
            if last:
                y = loss_fn(y, ys[i])
                losses.append(y.item())
                y = y * (1 / len(xs) if share is None else share(i))
            else:
                getattr(comm, send)(y, comm.rank + 1)
            kept[i] = x, y
        else:
            if clear:
                stage.zero_grad()
            x, y = kept.pop(i)
            y.backward(None if last else comm.recv(comm.rank + 1))
            if not first and back:
                getattr(comm, send)(x.grad, comm.rank - 1)
    return (
        (total_of or (lambda found: sum(found) / len(found)))(losses) if last else None
    )


def not_divided(*args):
    return run(*args, share=lambda i: 1.0)


def divided_twice(*args):
    return run(*args, share=lambda i: 1 / 16)


def weighted_by_size(comm, stage, ops, xs, ys, loss_fn):
    return run(
        comm,
        stage,
        ops,
        xs,
        ys,
        loss_fn,
        share=lambda i: len(xs[i]) / sum(map(len, xs)),
    )


def sends_and_waits(*args):
    return run(*args, send="send")


def cleared_in_between(comm, stage, ops, xs, ys, loss_fn):
    return run(comm, stage, ops, xs, ys, loss_fn, clear=True)


def nothing_sent_back(*args):
    return run(*args, back=False)


def not_a_leaf(*args):
    return run(*args, leaf=False)


def returns_the_sum(*args):
    return run(*args, total_of=sum)


def returns_the_last(*args):
    return run(*args, total_of=lambda found: found[-1])


def everyone_returns(*args):
    return run(*args) or 0.0


def always_gpipe(comm, stage, ops, xs, ys, loss_fn):
    gpipe = [("F", i) for i in range(len(xs))] + [("B", i) for i in range(len(xs))]
    return run(comm, stage, gpipe, xs, ys, loss_fn)


def one_slot_for_all(comm, stage, ops, xs, ys, loss_fn):
    """Keeps the last microbatch's graph only."""
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    total = 0.0
    for kind, i in ops:
        if kind == "F":
            x = xs[i] if first else comm.recv(comm.rank - 1).requires_grad_()
            y = stage(x)
            if last:
                y = loss_fn(y, ys[i]) / len(xs)
                total += y.item()
            else:
                comm.isend(y, comm.rank + 1)
        else:
            y.backward(None if last else comm.recv(comm.rank + 1), retain_graph=True)
            if not first:
                comm.isend(x.grad, comm.rank - 1)
    return total if last else None


def p_and_p(p, m, v=1):
    return p / (v * m + p)


def lost_twice(p, m, v=1):
    return 2 * (p - 1) / (v * m + 2 * (p - 1))


def two_kinds_of_slots(p, m, v=1):
    return (p - 1) / (3 * v * m + p - 1)


def chunks_as_ranks(p, m, v=1):
    return (p * v - 1) / (m + p * v - 1)


def one_ahead_too_few(p, m, r):
    return phases(m, min(max(p - r - 2, 0), m))


def twice_ahead(p, m, r):
    return phases(m, min(2 * (p - r - 1), m))


def warmed_up_by_one_more(p, m, r):
    """Right: the warm-up counts the forward of the steady state."""
    w = min(p - r, m)
    ops = [("F", i) for i in range(w)]
    for k in range(m):
        ops.append(("B", k))
        if w + k < m:
            ops.append(("F", w + k))
    return ops


def first_mask_missing(inputs, weights, dy):
    return in_two(inputs, weights, dy, masked=lambda k: k > 1)


def last_mask_missing(inputs, weights, dy):
    return in_two(inputs, weights, dy, masked=lambda k: 0 < k < len(weights) - 1)


def mask_on_dy(inputs, weights, dy):
    return in_two(inputs, weights, dy * (inputs[-1] @ weights[-1].T > 0))


def times_inputs(inputs, weights, dy):
    kept = []
    for k in range(len(weights) - 1, -1, -1):
        kept.append((inputs[k], dy))
        dy = dy @ weights[k]
        dy = dy * inputs[k] if k else dy
    return dy, lambda: [d.T @ x for x, d in reversed(kept)]


def mean_of_rows(inputs, weights, dy):
    return in_two(inputs, weights, dy, grad=lambda x, dy: dy.T @ x / len(x))


def mask_by_index(inputs, weights, dy):
    """Right: with where and einsum, linear by linear."""
    dys = [dy]
    for x, w in zip(inputs[:0:-1], weights[:0:-1], strict=True):
        dys.append(torch.where(x > 0, dys[-1] @ w, 0.0))
    pairs = list(zip(reversed(dys), inputs, strict=True))
    return dys[-1] @ weights[0], lambda: [
        torch.einsum("nb,na->ba", d, x) for d, x in pairs
    ]


def kept_in_a_queue(comm, stage, ops, xs, ys, loss_fn):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    kept, losses = [], []
    for kind, i in ops:
        if kind == "F":
            x = xs[i] if first else comm.recv(comm.rank - 1).requires_grad_()
            y = stage(x)
            kept.append((x, y))
            if not last:
                comm.isend(y, comm.rank + 1)
        else:
            x, y = kept.pop(0)
            if last:
                y = loss_fn(y, ys[i])
                losses.append(y.item())
                (y / len(xs)).backward()
            else:
                y.backward(comm.recv(comm.rank + 1))
            if not first:
                comm.isend(x.grad, comm.rank - 1)
    return sum(losses) / len(losses) if last else None


def divided_by_ranks(comm, *args):
    return run(comm, *args, share=lambda i: 1 / comm.size)


def everyone_feeds_xs(comm, stage, ops, xs, ys, loss_fn):
    def own(x):
        return stage(xs[len(x) - 2].clone().requires_grad_() + 0 * x)

    return run(comm, own, ops, xs, ys, loss_fn)


def never_alone(comm, stage, ops, xs, ys, loss_fn):
    """The first rank is taken for one that is not the last."""
    kept, losses = {}, []
    for kind, i in ops:
        last = comm.rank == comm.size - 1 and comm.rank > 0
        if kind == "F":
            x = comm.recv(comm.rank - 1).requires_grad_() if comm.rank else xs[i]
            y = stage(x)
            if last:
                y = loss_fn(y, ys[i]) / len(xs)
                losses.append(y.item())
            else:
                comm.isend(y, comm.rank + 1)
            kept[i] = x, y
        else:
            x, y = kept.pop(i)
            y.backward(None if last else comm.recv(comm.rank + 1))
            if comm.rank:
                comm.isend(x.grad, comm.rank - 1)
    return sum(losses) if losses else None


def divided_at_the_end(comm, stage, ops, xs, ys, loss_fn):
    """Right: each loss goes backward whole; the gradients are divided once."""
    loss = run(comm, stage, ops, xs, ys, loss_fn, share=lambda i: 1.0)
    for w in stage.parameters():
        w.grad /= len(xs)
    return loss


def dx_for_dy(inputs, weights, dy):
    kept = []
    for k in range(len(weights) - 1, -1, -1):
        dy = dy @ weights[k]
        dy = dy * (inputs[k] > 0) if k else dy
        kept.insert(0, dy)
    return dy, lambda: [d.T @ x for d, x in zip(kept, inputs, strict=True)]


def next_input(inputs, weights, dy):
    _, later = in_two([*inputs[1:], dy], weights, dy, masked=lambda k: False)
    return in_two(inputs, weights, dy)[0], later


def gradient_rectified(inputs, weights, dy):
    kept = []
    for k in range(len(weights) - 1, -1, -1):
        kept.insert(0, dy)
        dy = dy @ weights[k]
        dy = dy.relu() if k else dy
    return dy, lambda: [d.T @ x for d, x in zip(kept, inputs, strict=True)]


# Exercise 5


def zero_bubble(p, m, ahead=lambda p, r: 2 * (p - r - 1), late=lambda r: 2 * r):
    lists = []
    for r in range(p):
        w = min(ahead(p, r), m)
        ops = [("F", i) for i in range(w)]
        for i in range(m):
            ops += [("F", w + i)] * (w + i < m) + [("I", i)]
            ops += [("W", i - late(r))] * (i >= late(r))
        lists.append(ops + [("W", i) for i in range(max(m - late(r), 0), m)])
    return lists


def h1_again(p, m):
    return zero_bubble(p, m, lambda p, r: p - r - 1, lambda r: r)


def plain_1f1b(p, m):
    return [
        [op for op in [*phases(m, min(p - r - 1, m))] if op[1] < m] for r in range(p)
    ]


def all_weights_at_the_end(p, m):
    return zero_bubble(p, m, late=lambda r: m)


def too_far_ahead(p, m):
    return zero_bubble(p, m, ahead=lambda p, r: 3 * (p - r - 1))


def everything_ahead(p, m):
    return zero_bubble(p, m, ahead=lambda p, r: m)


def weights_forgotten(p, m):
    return [[op for op in ops if op[0] != "W"] for ops in zero_bubble(p, m)]


def one_rank_turned_round(p, m):
    lists = zero_bubble(p, m)
    turned = {"F": 0, "I": m - 1, "W": m - 1}
    lists[-1] = [
        (kind, m - 1 - i) if kind == "F" else (kind, turned[kind] - i)
        for kind, i in lists[-1]
    ]
    return lists


def twice_the_first(p, m):
    lists = zero_bubble(p, m)
    lists[0] = [*lists[0], ("W", 0)]
    return lists


def for_one_size_only(p, m):
    return zero_bubble(4, 8)


def from_one(p, m):
    return [[(kind, i + 1) for kind, i in ops] for ops in zero_bubble(p, m)]


def with_chunks(p, m):
    return [[(kind, i, 0) for kind, i in ops] for ops in zero_bubble(p, m)]


def weights_first(p, m):
    return [
        sorted(ops, key=lambda op: (op[1], "FWI".index(op[0])))
        for ops in zero_bubble(p, m)
    ]


def greedy(p, m):
    """Right: on a clock, each rank does what is there, first an I, then an F, then a
    W.
    """
    ops = [[] for _ in range(p)]
    done = {}  # (kind, microbatch, rank) → the time at which it is there

    def there(kind, i, r, now):
        return done.get((kind, i, r), now + 1) <= now

    def choose(r, now):
        f, b, w = (sum(kind == k for kind, _ in ops[r]) for k in "FIW")
        gradient = there("F", b, r, now) and (r == p - 1 or there("I", b, r + 1, now))
        if b < m and gradient:
            return "I", b
        input_is_there = r == 0 or there("F", f, r - 1, now)
        if f < m and f - w < 2 * p - 1 and f - b < 2 * (p - r) - 1 and input_is_there:
            return "F", f
        if w < b:
            return "W", w
        return None

    for now in range(10 * m * p):
        chosen = [choose(r, now) for r in range(p)]
        for r, op in enumerate(chosen):
            if op is not None:
                ops[r].append(op)
                done[(*op, r)] = now + 1
    return ops


def a_little_less_memory(p, m):
    """Right: one forward fewer ahead on rank 0, and still better than H1."""
    return zero_bubble(p, m, ahead=lambda p, r: 2 * (p - r - 1) - (r == 0 and p > 2))


test_wrong_answers = rejects(
    "05-parallelism/04-pipeline",
    [
        Wrong("bubble", of_the_work, "share of the whole step"),
        Wrong("bubble", the_busy_share, "share in which a rank works"),
        Wrong("bubble", no_chunks, "v changes nothing"),
        Wrong("bubble", all_divided, "the work stays m slots"),
        Wrong("bubble", one_slot_more, "m + p − 1 of them"),
        Wrong("bubble", all_ranks, "not p"),
        Wrong("bubble", v_times_more, "smaller, not larger"),
        Wrong("bubble", in_percent, "bubble(4, 8, 1)"),
        Wrong("one_f_one_b", all_forwards_first, "that is GPipe"),
        Wrong("one_f_one_b", from_the_other_end, "grows with r"),
        Wrong("one_f_one_b", one_ahead_too_many, "one forward too many"),
        Wrong("one_f_one_b", all_alike, "the last rank has its gradient at once"),
        Wrong("one_f_one_b", no_warmup, "what does it do meanwhile"),
        Wrong(
            "one_f_one_b",
            not_enough_microbatches,
            "cannot warm up with more than there are",
        ),
        Wrong("one_f_one_b", last_in_first_out, "first in, first out"),
        Wrong("one_f_one_b", numbered_from_one, "they begin with 0"),
        Wrong("one_f_one_b", backward_first, "before its F"),
        Wrong("one_f_one_b", no_cooldown, "those that are left"),
        Wrong("one_f_one_b", two_in_turn, "in turn while there are forwards"),
        Wrong("one_f_one_b", as_text, "where a pair"),
        Wrong("backward_in_two", no_mask, "no gradient goes through"),
        Wrong("backward_in_two", mask_on_x, "x itself has not been through a ReLU"),
        Wrong("backward_in_two", transposed, "transposed"),
        Wrong("backward_in_two", backwards_order, "the order of the weights"),
        Wrong("backward_in_two", at_once, "can wait"),
        Wrong("backward_in_two", at_once_by_einsum, "can wait"),
        Wrong("backward_in_two", by_autograd, "can wait"),
        Wrong(
            "backward_in_two", asks_autograd_twice, "forward pass is not needed again"
        ),
        Wrong("backward_in_two", walks_again, "instead of walking again"),
        Wrong(
            "backward_in_two",
            kept_before_the_mask,
            "after it has been through the ReLU",
        ),
        Wrong("backward_in_two", no_function, "a function without arguments"),
        Wrong("backward_in_two", one_too_few, "where there are 3 weights"),
        Wrong("run_schedule", not_divided, "4 times too large"),
        Wrong(
            "run_schedule", divided_twice, "divided by the number of microbatches twice"
        ),
        Wrong("run_schedule", weighted_by_size, "weighted by their size"),
        Wrong("run_schedule", sends_and_waits, "waits in send to rank"),
        Wrong("run_schedule", cleared_in_between, "do not clear it in between"),
        Wrong("run_schedule", nothing_sent_back, "waits in recv from rank 1"),
        Wrong("run_schedule", not_a_leaf, "requires_grad_"),
        Wrong("run_schedule", returns_the_sum, "sum of the losses"),
        Wrong("run_schedule", returns_the_last, "last microbatch's loss"),
        Wrong("run_schedule", everyone_returns, "the others return None"),
        Wrong("run_schedule", always_gpipe, "go down the list"),
        Wrong("run_schedule", one_slot_for_all, "does every B go through its graph"),
        Wrong("bubble", p_and_p, "not p:"),
        Wrong("bubble", lost_twice, "not 2(p − 1)"),
        Wrong("bubble", two_kinds_of_slots, "in different slots"),
        Wrong("bubble", chunks_as_ranks, "counted as ranks"),
        Wrong("one_f_one_b", one_ahead_too_few, "one forward too few"),
        Wrong("one_f_one_b", twice_ahead, "twice as many forwards"),
        Wrong("backward_in_two", first_mask_missing, "first ReLU"),
        Wrong("backward_in_two", last_mask_missing, "last ReLU"),
        Wrong("backward_in_two", mask_on_dy, "behind the last linear"),
        Wrong("backward_in_two", times_inputs, "a factor of 0 or 1"),
        Wrong("backward_in_two", mean_of_rows, "mean over the rows"),
        Wrong("run_schedule", kept_in_a_queue, "targets of another"),
        Wrong("run_schedule", divided_by_ranks, "divided by the 3 ranks"),
        Wrong("run_schedule", everyone_feeds_xs, "runs on xs itself"),
        Wrong("run_schedule", never_alone, "a rank that is alone"),
        Wrong("backward_in_two", dx_for_dy, "before it goes on to x"),
        Wrong("backward_in_two", next_input, "another linear's input"),
        Wrong("backward_in_two", gradient_rectified, "applied to the gradient"),
        Wrong("beat_h1", h1_again, "exactly as ZB-H1 does"),
        Wrong("beat_h1", plain_1f1b, "where ZB-H1 takes 27"),
        Wrong("beat_h1", all_weights_at_the_end, "takes 30 units, where ZB-H1"),
        Wrong("beat_h1", too_far_ahead, "microbatches between their F and their W"),
        Wrong("beat_h1", everything_ahead, "takes 30 units, where ZB-H1 takes 27"),
        Wrong("beat_h1", weights_forgotten, "never computes W of microbatch 0"),
        Wrong("beat_h1", one_rank_turned_round, "the ranks wait for one another"),
        Wrong("beat_h1", twice_the_first, "does W of microbatch 0 twice"),
        Wrong("beat_h1", for_one_size_only, "shall return 3 lists"),
        Wrong("beat_h1", from_one, "numbered from 0"),
        Wrong("beat_h1", with_chunks, "where a pair"),
        Wrong("beat_h1", weights_first, "before its I"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("one_f_one_b", warmed_up_by_one_more),
        ("backward_in_two", mask_by_index),
        ("run_schedule", divided_at_the_end),
        ("beat_h1", greedy),
        ("beat_h1", a_little_less_memory),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
