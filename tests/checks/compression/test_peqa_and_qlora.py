"""Wrong answers to the exercises of 06-compression/08-peqa-and-qlora, each with the
diagnosis that it must get.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.checks.compression import peqa_and_qlora as checks
from llmlab.checks.compression.peqa_and_qlora import check
from tests.checks.rejecting import Wrong, rejects, verdict


def spread(values, size):
    return values.repeat_interleave(size, dim=1)


# 1 ------------------------------------------------------------------------------------


def forward(
    weight=lambda q, z, s: s * (q - z),
    spread_s=spread,
    spread_z=spread,
    product=lambda x, w: x @ w.T,
    codes_as=torch.Tensor.float,
    scale_as=lambda scale: scale,
):
    """peqa_forward with one thing changed."""

    def answer(x, codes, zero, scale, group_size):
        q = codes_as(codes)
        z = spread_z(codes_as(zero), group_size)
        s = spread_s(scale_as(scale), group_size)
        return product(x, weight(q, z, s))

    return answer


def tiled(values, size):
    return values.repeat(1, size)


def first(values, size):
    return values[:, :1].expand(-1, size * values.shape[1])


def mean(values, size):
    return first(values.mean(1, keepdim=True).expand_as(values), size)


def forward_by_groups(x, codes, zero, scale, group_size):
    """A partial sum for each group, in 16-bit integers first."""
    out = torch.zeros(len(x), len(codes))
    for g in range(scale.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        integers = codes[:, part].to(torch.int16) - zero[:, g : g + 1].to(torch.int16)
        out = out + (x[:, part] @ integers.float().T) * scale[:, g]
    return out


def forward_by_blocks(x, codes, zero, scale, group_size):
    blocks = codes.reshape(*scale.shape, group_size).double()
    blocks = (blocks - zero[..., None]) * scale[..., None]
    return torch.einsum("ti,oi->to", x, blocks.reshape(codes.shape).float())


def signed(q):
    return q.to(torch.int8).float()


def groups_of_columns(x, codes, zero, scale, group_size):
    """group_size is taken for the number of groups."""
    if codes.shape[1] % group_size:
        return forward()(x, codes, zero, scale, group_size)
    at = torch.arange(codes.shape[1]) // (codes.shape[1] // group_size)
    at = at.clamp(max=scale.shape[1] - 1)
    return x @ (scale[:, at] * (codes.float() - zero.float()[:, at])).T


def new_codes(x, codes, zero, scale, group_size):
    """The integers follow the scale, which takes its gradient away."""
    z, s = spread(zero.float(), group_size), spread(scale, group_size)
    weight = s.detach() * (codes.float() - z)
    return x @ weight.T


def in_place(x, codes, zero, scale, group_size):
    z, s = spread(zero.float(), group_size), spread(scale, group_size)
    out = x @ (s * (codes.float() - z)).T
    codes.sub_(1)
    return out


def groups_of_two(x, codes, zero, scale, group_size):
    columns = codes.shape[1]
    s = tiled(spread(scale, 2), columns)[:, :columns]
    z = tiled(spread(zero.float(), 2), columns)[:, :columns]
    return x @ (s * (codes.float() - z)).T


# 2 ------------------------------------------------------------------------------------


def gradient(
    said=lambda G, q, z: G * (q - z),
    gather=lambda said, size: said.unflatten(1, (-1, size)).sum(-1),
    spread_z=spread,
    codes_as=torch.Tensor.float,
):
    """scale_gradient with one thing changed."""

    def answer(G, codes, zero, group_size):
        z = spread_z(codes_as(zero), group_size)
        return gather(said(G, codes_as(codes), z), group_size)

    return answer


def gradient_by_autograd(G, codes, zero, group_size):
    s = torch.ones(zero.shape, requires_grad=True)
    z = spread(zero.float(), group_size)
    weight = spread(s, group_size) * (codes.float() - z)
    return torch.autograd.grad((weight * G).sum(), s)[0]


def gradient_in_a_loop(G, codes, zero, group_size):
    found = torch.zeros(zero.shape)
    for i in range(len(G)):
        for j in range(G.shape[1]):
            g = j // group_size
            found[i, g] += G[i, j] * (int(codes[i, j]) - int(zero[i, g]))
    return found


def product_of_sums(G, codes, zero, group_size):
    def total(values):
        return values.unflatten(1, (-1, group_size)).sum(-1)

    return total(G) * total(codes.float() - spread(zero.float(), group_size))


def strided(said, size):
    return said.unflatten(1, (size, -1)).sum(1)


def zero_once(G, codes, zero, group_size):
    total = (G * codes.float()).unflatten(1, (-1, group_size)).sum(-1)
    return total - zero.float()


def groups_apart(G, codes, zero, group_size):
    q = codes.float().reshape(len(G), group_size, -1)
    return (G.reshape(q.shape) * (q - zero.float()[:, None])).sum(1)


def whole_rows(said, size):
    return said.sum(1, keepdim=True).expand(-1, said.shape[1] // size)


def every_row(said, size):
    return said.unflatten(1, (-1, size)).sum((0, 2))


def changes_the_gradient(G, codes, zero, group_size):
    G.mul_(codes.float() - spread(zero.float(), group_size))
    return G.unflatten(1, (-1, group_size)).sum(-1)


def in_threes(G, codes, zero, group_size):
    said = G * (codes.float() - spread(zero.float(), group_size))
    if G.shape[1] % 3:
        return said.sum(1, keepdim=True).expand(zero.shape)
    return said.unflatten(1, (-1, 3)).sum(-1)[:, : zero.shape[1]]


# 3 ------------------------------------------------------------------------------------


def bytes_with(only=None, **changes):
    """training_bytes with one thing changed, for one method or for all."""

    def answer(shapes, method, bits, group_size, rank):
        if only not in (None, method):
            return checks.count(shapes, method, bits, group_size, rank)
        made = {}
        for name, value in changes.items():
            made[name] = (
                value(shapes, bits, group_size, rank) if callable(value) else (value)
            )
        return checks.count(shapes, method, bits, group_size, rank, **made)

    return answer


def weights(shapes, bits, size, rank):
    return sum(a * b for a, b in shapes)


def groups(shapes, bits, size, rank):
    return sum(a * b // size for a, b in shapes)


def adapters(shapes, bits, size, rank):
    return sum(rank * (a + b) for a, b in shapes)


def both(*numbers):
    return adapters(*numbers) + groups(*numbers)


def all_and_adapters(*numbers):
    return weights(*numbers) + adapters(*numbers)


def moments(*numbers):
    return 12 * weights(*numbers)


def held(*numbers):
    return 2 * adapters(*numbers)


def bytes_by_layer(shapes, method, bits, group_size, rank):
    """Integers, a layer at a time."""
    total = 0
    for rows, columns in shapes:
        n = rows * columns
        if method in ("full", "lora"):
            total += 2 * n
        else:
            total += n * bits // 8 + n // group_size * 2
        if method == "full":
            total += 14 * n
        elif method == "peqa":
            total += 14 * (n // group_size)
        else:
            total += 16 * rank * (rows + columns)
    return total


def bytes_as_tensor(shapes, method, bits, group_size, rank):
    return torch.tensor(bytes_by_layer(shapes, method, bits, group_size, rank)).item()


def first_linear(shapes, *rest):
    return checks.count(shapes[:1], *rest)


def lora_in_codes(shapes, method, *rest):
    return checks.count(shapes, "qlora" if method == "lora" else method, *rest)


def always_four_bits(shapes, method, bits, group_size, rank):
    return checks.count(shapes, method, 4, group_size, rank)


def test_no_two_miscounts_are_the_same():
    for method in ("full", "lora", "qlora", "peqa"):
        numbers = [checks.count(checks.SHAPES, method, 4, 16, 3)]
        numbers += checks.wrong_counts(checks.SHAPES, method, 4, 16, 3).values()
        for a, b in itertools.combinations(numbers, 2):
            assert abs(a - b) > 1e-6 * a, (method, numbers)


# 4 ------------------------------------------------------------------------------------


def swap(
    names=True,
    shape="shape",
    finite="isfinite",
    made=lambda old, new: new.to(torch.float32, copy=True),
    error=ValueError,
    named=True,
):
    """swap_task with one thing changed."""

    def answer(scales, task):
        def refuse(name, why):
            raise error(f"{name if named else 'the task'} {why}")

        if names:
            for name in sorted(scales.keys() ^ task.keys()):
                refuse(name, "is missing or unknown")
        for name in scales.keys() & task.keys():
            old, new = scales[name], task[name]
            if shape == "shape" and new.shape != old.shape:
                refuse(name, "has another shape")
            if shape == "numel" and new.numel() != old.numel():
                refuse(name, "has another number")
            if finite == "isfinite" and not new.isfinite().all():
                refuse(name, "is not finite")
            if finite == "isnan" and new.isnan().any():
                refuse(name, "is NaN")
        return {n: made(s, task[n]) for n, s in scales.items() if n in task}

    return answer


def only_missing(scales, task):
    for name in scales:
        if name not in task:
            raise ValueError(f"{name} is missing")
    known = {name: task[name] for name in scales}
    return swap()(scales, known)


def only_unknown(scales, task):
    for name in task:
        if name not in scales:
            raise ValueError(f"{name} is unknown")
    return swap()({name: scales[name] for name in task}, task)


def key_error(scales, task):
    return {name: task[name].to(torch.float32, copy=True) for name in scales}


def into_the_old(scales, task):
    found = swap()(scales, task)
    for name, values in found.items():
        scales[name].copy_(values)
    return found


def one_by_one(scales, task):
    """Right, in another order of tests, from empty tensors."""
    found = {}
    if list(sorted(scales)) != list(sorted(task)):
        raise ValueError(f"names differ: {set(scales) ^ set(task)}")
    for name in scales:
        new = task[name]
        if tuple(new.shape) != tuple(scales[name].shape):
            raise ValueError(f"{name}: {tuple(new.shape)}")
        if torch.isnan(new).any() or torch.isinf(new).any():
            raise ValueError(f"{name}: NaN or infinite")
        found[name] = torch.empty(new.shape)
        found[name].copy_(new)
    return found


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("peqa_forward", forward_by_groups),
        ("peqa_forward", forward_by_blocks),
        ("scale_gradient", gradient_by_autograd),
        ("scale_gradient", gradient_in_a_loop),
        ("training_bytes", bytes_by_layer),
        ("training_bytes", bytes_as_tensor),
        ("swap_task", one_by_one),
        ("swap_task", swap()),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


F, G, B, S = "peqa_forward", "scale_gradient", "training_bytes", "swap_task"
test_wrong_answers = rejects(
    "06-compression/08-peqa-and-qlora",
    [
        Wrong(F, forward(codes_as=lambda q: q), "251 here"),
        Wrong(F, forward(lambda q, z, s: s * q), "zero points are missing"),
        Wrong(F, forward(lambda q, z, s: s * (q + z)), "are added"),
        Wrong(F, forward(lambda q, z, s: s * q - z), "after the scaling"),
        Wrong(F, forward(lambda q, z, s: q - z + 0 * s), "scales are missing"),
        Wrong(F, forward(lambda q, z, s: (q - z) / s), "divided by the scales"),
        Wrong(F, forward(spread_s=tiled), "the scales change from column"),
        Wrong(F, forward(spread_z=tiled), "the zero points change from column"),
        Wrong(F, forward(spread_s=tiled, spread_z=tiled), "scales and zero points"),
        Wrong(F, forward(spread_s=first), "scale of its first group"),
        Wrong(F, forward(spread_s=mean), "mean scale"),
        Wrong(F, forward(product=lambda x, w: x @ w), "not transposed"),
        Wrong(F, forward(product=lambda x, w: w @ x.T), "but for a transpose"),
        Wrong(F, forward(codes_as=signed), "which int8 does not hold"),
        Wrong(F, forward(lambda q, z, s: s * (z - q)), "this is z − q"),
        Wrong(F, forward(lambda q, z, s: s * (q - 8)), "is 8 everywhere"),
        Wrong(F, groups_of_columns, "taken for the number of groups"),
        Wrong(F, new_codes, "scale"),
        Wrong(F, in_place, "in place"),
        Wrong(F, groups_of_two, "sizes"),
        Wrong(G, gradient(codes_as=lambda q: q), "251 here"),
        Wrong(G, gradient(lambda G, q, z: G * q), "zero points are missing"),
        Wrong(G, gradient(lambda G, q, z: G * (q + z)), "are added"),
        Wrong(G, gradient(spread_z=tiled), "change from column to column"),
        Wrong(
            G,
            gradient(gather=lambda a, size: a.unflatten(1, (-1, size)).mean(-1)),
            "the mean over a group",
        ),
        Wrong(
            G,
            gradient(gather=lambda a, size: a.unflatten(1, (-1, size)).amax(-1)),
            "the largest of a group",
        ),
        Wrong(G, gradient(lambda G, q, z: G), "without the integers"),
        Wrong(G, gradient(lambda G, q, z: q - z), "without the gradient"),
        Wrong(G, gradient(lambda G, q, z: -G * (q - z)), "sign is wrong"),
        Wrong(G, gradient(lambda G, q, z: (G * (q - z)).abs()), "keep the signs"),
        Wrong(G, product_of_sums, "weight by weight"),
        Wrong(G, gradient(gather=strided), "every third column"),
        Wrong(G, gradient(spread_z=first), "zero point of the first"),
        Wrong(
            G,
            gradient(gather=lambda s, n: s.unflatten(1, (-1, n)).norm(dim=-1)),
            "root of the sum of squares",
        ),
        Wrong(G, zero_once, "once from the sum"),
        Wrong(G, groups_apart, "every third column here"),
        Wrong(G, gradient(codes_as=signed), "which int8 does not hold"),
        Wrong(G, gradient(gather=lambda said, size: said.sum(1)), "for each row"),
        Wrong(G, gradient(gather=whole_rows), "its whole row"),
        Wrong(G, gradient(gather=every_row), "shape"),
        Wrong(G, changes_the_gradient, "in place"),
        Wrong(G, in_threes, "sizes"),
        Wrong(B, bytes_with(optimizer=0), "optimizer's 12 bytes"),
        Wrong(B, bytes_with(gradient=0), "gradients' 2 bytes"),
        Wrong(B, bytes_with(optimizer=8), "you counted 8"),
        Wrong(B, bytes_with("full", weight=4), "4 for one of them"),
        Wrong(B, bytes_with(gradient=4), "4 for one of them"),
        Wrong(B, bytes_with(lora=0), "the adapters are missing"),
        Wrong(
            B, bytes_with(lora=lambda *n: 2 * adapters(*n)), "values are counted twice"
        ),
        Wrong(
            B,
            bytes_with(
                groups=lambda shapes, b, size, r: sum(c for _, c in shapes) // size
            ),
            "the groups of one row",
        ),
        Wrong(
            B,
            bytes_with("peqa", more=lambda s, bits, *n: groups(s, bits, *n) * bits / 8),
            "no zero points",
        ),
        Wrong(
            B,
            bytes_with("peqa", trains=lambda *n: weights(*n) + groups(*n)),
            "only the scales are",
        ),
        Wrong(B, bytes_with("lora", weight=4), "frozen, without a gradient"),
        Wrong(B, bytes_with("lora", more=moments), "a place in the optimizer"),
        Wrong(B, bytes_with("lora", trains=all_and_adapters), "only the adapters are"),
        Wrong(B, bytes_with(code=0), "the codes are missing"),
        Wrong(B, bytes_with(code=1), "a byte each"),
        Wrong(B, bytes_with("qlora", trains=both), "only its adapters are"),
        Wrong(B, bytes_with("peqa", trains=both, more=held), "its scales alone"),
        Wrong(B, first_linear, "only the first linear"),
        Wrong(B, bytes_with("lora", trains=weights), "the weights are frozen"),
        Wrong(B, bytes_with("peqa", trains=weights), "the weights are frozen"),
        Wrong(B, bytes_with(adapter=0), "the adapters themselves take 2"),
        Wrong(
            B,
            bytes_with(lora=lambda shapes, b, s, rank: rank * weights(shapes, b, s, 1)),
            "not rank × out × in",
        ),
        Wrong(
            B,
            bytes_with(
                lora=lambda shapes, b, s, rank: sum(rank * a for a, _ in shapes)
            ),
            "one of the adapter's two",
        ),
        Wrong(B, lora_in_codes, "QLoRA whose are codes"),
        Wrong(B, bytes_with(scale=0), "scales of the groups are missing"),
        Wrong(B, bytes_with("qlora", scale=4), "you counted 4"),
        Wrong(B, bytes_with("peqa", scale=4), "counted twice"),
        Wrong(B, bytes_with(code=4), "divide by 8"),
        Wrong(B, bytes_with(code=2), "they are codes"),
        Wrong(
            B,
            bytes_with(groups=lambda shapes, b, s, r: sum(a for a, _ in shapes)),
            "not for each row",
        ),
        Wrong(B, bytes_with("qlora", trains=groups), "scales are frozen"),
        Wrong(B, bytes_with("peqa", trains=adapters), "no adapters"),
        Wrong(B, always_four_bits, "from the arguments"),
        Wrong(S, swap(names=False), "lacks a linear is taken"),
        Wrong(S, only_missing, "the model has not is taken"),
        Wrong(S, only_unknown, "lacks a linear is taken"),
        Wrong(S, key_error, "KeyError"),
        Wrong(S, swap(shape=None), "one scale where the model has three is taken"),
        Wrong(S, swap(shape="numel"), "(3, 1) where the model has (3,) is taken"),
        Wrong(S, swap(finite=None), "holds NaN is taken"),
        Wrong(S, swap(finite="isnan"), "infinite scale is taken"),
        Wrong(S, swap(error=RuntimeError), "raise a ValueError"),
        Wrong(S, swap(named=False), "does not name"),
        Wrong(S, swap(made=lambda old, new: new.clone()), "float32 is asked"),
        Wrong(S, swap(made=lambda old, new: new.float()), "return copies"),
        Wrong(S, swap(made=lambda old, new: old.clone()), "the scales of before"),
        Wrong(S, swap(made=lambda old, new: old + new.float()), "are added"),
        Wrong(S, swap(made=lambda old, new: old * new.float()), "multiply"),
        Wrong(S, into_the_old, "in place"),
    ],
)
