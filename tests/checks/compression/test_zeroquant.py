"""Wrong answers to the exercises of 06-compression/04-zeroquant, each with the
diagnosis that it must get.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.checks.compression.zeroquant import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def tokens(
    dim=-1,
    top=lambda bits: 2 ** (bits - 1) - 1,
    size=torch.abs,
    rounding=torch.round,
    code=lambda X, s: X / s,
    safe=True,
    zero=1.0,
    scale_of=lambda s: s,
):
    """quantize_tokens with one thing changed."""

    def answer(X, bits):
        largest = size(X).amax(dim, keepdim=True)
        scale = largest / top(bits)
        if safe:
            scale = torch.where(largest != 0, scale, 1.0)
        codes = rounding(code(X, scale)).clamp(-127, 127).to(torch.int8)
        if safe:
            scale = torch.where(largest != 0, scale, zero)
        return codes, scale_of(scale)

    return answer


def tokens_in_a_loop(X, bits):
    top = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for row in X.double():
        s = float(row.abs().max()) / top or 1.0
        codes.append([round(float(x) / s) for x in row])
        scales.append([s])
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales)


def tokens_by_norm(X, bits):
    largest = torch.linalg.vector_norm(X, float("inf"), dim=1)[:, None]
    scale = (largest / (2 ** (bits - 1) - 1)).masked_fill(largest == 0, 1)
    return (X / scale).round().char(), scale


def columns_as_tokens(X, bits):
    codes, scale = tokens(dim=0)(X, bits)
    return codes, scale.T if X.shape[0] == X.shape[1] else scale.T[: len(X)]


def one_scale(X, bits):
    s = X.abs().max() / (2 ** (bits - 1) - 1)
    return torch.round(X / s).to(torch.int8), s.expand(len(X), 1).clone()


def only_codes(X, bits):
    return tokens()(X, bits)[0]


def eight_bits(X, bits):
    return tokens()(X, 8)


def right_for_four(X, bits):
    return tokens()(X, 4)


def flat_scales(X, bits):
    codes, scale = tokens()(X, bits)
    return codes, scale[:, 0]


def float_codes(X, bits):
    codes, scale = tokens()(X, bits)
    return codes.float(), scale


def tokens_in_place(X, bits):
    _, scale = tokens()(X, bits)
    X /= scale
    return X.round().to(torch.int8), scale


def by_the_span(X, bits):
    s = (X.amax(1, keepdim=True) - X.amin(1, keepdim=True)) / (2**bits - 1)
    return (X / s).round().clamp(-128, 127).to(torch.int8), s


def unsigned(X, bits):
    codes, scale = tokens()(X, bits)
    return codes + 2 ** (bits - 1) - 1, scale


# 2 ------------------------------------------------------------------------------------


def groups_product(
    cast=torch.Tensor.int,
    token=lambda y, s_x: y * s_x,
    group=lambda sums, s_w, g: sums * s_w[:, g],
    inside=lambda y, s_x: y,
    chosen=range,
    columns=lambda g, size, groups: slice(g * size, (g + 1) * size),
):
    """group_product with one thing changed."""

    def answer(Q_x, s_x, Q_w, s_w):
        groups = s_w.shape[1]
        size = Q_w.shape[1] // groups
        y = torch.zeros(len(Q_x), len(Q_w))
        for g in chosen(groups):
            at = columns(g, size, groups)
            sums = cast(Q_x[:, at]) @ cast(Q_w[:, at]).T
            y = y + inside(group(sums.float(), s_w, g), s_x)
        return token(y, s_x)

    return answer


def product_of_levels(Q_x, s_x, Q_w, s_w):
    w = Q_w.double() * s_w.repeat_interleave(Q_w.shape[1] // s_w.shape[1], 1)
    return torch.nn.functional.linear(Q_x * s_x.double(), w).float()


def product_by_einsum(Q_x, s_x, Q_w, s_w):
    groups = s_w.shape[1]
    x = Q_x.long().unflatten(1, (groups, -1))
    w = Q_w.long().unflatten(1, (groups, -1))
    sums = torch.einsum("tgi,ogi->tog", x, w)
    return (sums * s_w[None]).sum(-1) * s_x


def whole_sums(Q_x, s_x, Q_w, s_w):
    return (Q_x.int() @ Q_w.int().T) * s_w.sum(1) * s_x


def running_scale(Q_x, s_x, Q_w, s_w):
    y, size = 0.0, Q_w.shape[1] // s_w.shape[1]
    for g in range(s_w.shape[1]):
        at = slice(g * size, (g + 1) * size)
        y = (y + Q_x[:, at].int() @ Q_w[:, at].int().T) * s_w[:, g]
    return y * s_x


def scales_of_first(Q_x, s_x, Q_w, s_w):
    return (Q_x.int() @ Q_w.int().T) * s_w[:, 0] * s_x


def mean_of_groups(Q_x, s_x, Q_w, s_w):
    return groups_product()(Q_x, s_x, Q_w, s_w) / s_w.shape[1]


def transposed(Q_x, s_x, Q_w, s_w):
    return groups_product()(Q_x, s_x, Q_w, s_w).T


def four_groups(Q_x, s_x, Q_w, s_w):
    size = 2
    y = torch.zeros(len(Q_x), len(Q_w))
    for g in range(s_w.shape[1]):
        at = slice(g * size, (g + 1) * size)
        y += (Q_x[:, at].int() @ Q_w[:, at].int().T) * s_w[:, g]
    return y * s_x


def every_fourth(g, size, groups):
    return slice(g, None, groups)


# 3 ------------------------------------------------------------------------------------


def through(
    rounding=torch.round,
    low=lambda top: -top,
    high=lambda top: top,
    inside=lambda W, s, codes, top: codes.abs() <= top,
    levels=lambda codes, s: codes * s,
    gain=1,
):
    """straight_through with one thing changed."""

    def answer(W, scale, top):
        codes = rounding(W.detach() / scale)
        mask = inside(W.detach(), scale, codes, top)
        value = levels(codes.clamp(low(top), high(top)), scale)
        carries = W * mask * gain
        return carries + (value - carries).detach()

    return answer


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, scale, top):
        codes = torch.round(W / scale)
        ctx.save_for_backward(codes.abs() > top)
        return codes.clamp(-top, top) * scale

    @staticmethod
    def backward(ctx, grad):
        (clipped,) = ctx.saved_tensors
        return grad.masked_fill(clipped, 0), None, None


def by_function(W, scale, top):
    return Through.apply(W, scale, top)


def by_torch(W, scale, top):
    zero = torch.zeros(len(W), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(W, scale[:, 0], zero, 0, -top, top)


def no_gradient(W, scale, top):
    return torch.round(W / scale).clamp(-top, top) * scale


def detached(W, scale, top):
    return no_gradient(W, scale, top).detach()


def by_clamp(W, scale, top):
    """The usual short way, whose clamp looks at the weight before it is rounded."""
    x = (W / scale).clamp(-top, top)
    return (x + (torch.round(x) - x).detach()) * scale


def unscaled_gradient(W, scale, top):
    value = no_gradient(W, scale, top)
    inside = torch.round(W / scale).abs() <= top
    carries = W * scale * inside
    return carries + (value - carries).detach()


def wrong_axis(W, scale, top):
    if W.shape[0] != W.shape[1]:
        return through()(W, scale, top)
    return through()(W, scale.T, top)


def top_three(W, scale, top):
    return through()(W, scale, 3)


def added(W, scale, top):
    return W + no_gradient(W, scale, top).detach()


def positive_side(W, scale, codes, top):
    return codes <= top


def negative_side(W, scale, codes, top):
    return codes >= -top


def all_through(W, scale, codes, top):
    return torch.ones_like(W)


# 4 ------------------------------------------------------------------------------------


def distilled(
    loss=lambda y, t: (y - t).square().mean(),
    sign=-1,
    order=lambda inputs: inputs,
    rate=lambda r: r,
    target=lambda teacher, h: teacher(h).detach(),
    finish=lambda W: W.detach(),
):
    """distill_layer with one thing changed."""

    def answer(W, student, teacher, inputs, learning_rate):
        for h in order(inputs):
            W = W.detach().requires_grad_()
            error = loss(student(W, h), target(teacher, h))
            (gradient,) = torch.autograd.grad(error, W)
            W = W + sign * rate(learning_rate) * gradient
        return finish(W)

    return answer


def by_sgd(W, student, teacher, inputs, learning_rate):
    W = torch.nn.Parameter(W.clone())
    sgd = torch.optim.SGD([W], lr=learning_rate)
    for h in inputs:
        sgd.zero_grad()
        with torch.no_grad():
            target = teacher(h)
        torch.nn.functional.mse_loss(student(W, h), target).backward()
        sgd.step()
    return W.data


def targets_first(W, student, teacher, inputs, learning_rate):
    with torch.inference_mode():
        targets = [teacher(h) for h in inputs]
    W = W.clone()
    for h, target in zip(inputs, targets, strict=True):
        W.requires_grad_()
        y = student(W, h)
        gradient = torch.autograd.grad(y, W, 2 * (y.detach() - target) / y.numel())[0]
        W = W.detach() - learning_rate * gradient
    return W


def by_adam(W, student, teacher, inputs, learning_rate):
    W = torch.nn.Parameter(W.clone())
    adam = torch.optim.Adam([W], lr=learning_rate)
    for h in inputs:
        adam.zero_grad()
        (student(W, h) - teacher(h).detach()).square().mean().backward()
        adam.step()
    return W.data


def teacher_trains(W, student, teacher, inputs, learning_rate):
    W = torch.nn.Parameter(W.clone())
    for h in inputs:
        W.grad = None
        (student(W, h) - teacher(h)).square().mean().backward()
        W.data -= learning_rate * W.grad
    return W.data


def piled_up(W, student, teacher, inputs, learning_rate):
    W = torch.nn.Parameter(W.clone())
    for h in inputs:
        (student(W, h) - teacher(h).detach()).square().mean().backward()
        W.data -= learning_rate * W.grad
    return W.data


def at_the_start(W, student, teacher, inputs, learning_rate):
    leaf = W.detach().requires_grad_()
    now = W.detach().clone()
    for h in inputs:
        error = (student(leaf, h) - teacher(h).detach()).square().mean()
        now = now - learning_rate * torch.autograd.grad(error, leaf)[0]
    return now


def together(W, student, teacher, inputs, learning_rate):
    return distilled()(W, student, teacher, [torch.cat(inputs)], learning_rate)


def no_teacher(W, student, teacher, inputs, learning_rate):
    leaf = W.detach()
    return distilled(target=lambda teacher, h: student(leaf, h).detach())(
        W, student, teacher, inputs, learning_rate
    )


def moves_the_teacher(W, student, teacher, inputs, learning_rate):
    found = distilled()(W, student, teacher, inputs, learning_rate)
    teacher.linear.weight.data.copy_(found)
    return found


def chained(W, student, teacher, inputs, learning_rate):
    return distilled(target=lambda teacher, h: teacher(h + 0.1).detach())(
        W, student, teacher, inputs, learning_rate
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("quantize_tokens", tokens_in_a_loop),
        ("quantize_tokens", tokens_by_norm),
        ("group_product", product_of_levels),
        ("group_product", product_by_einsum),
        ("straight_through", by_function),
        ("straight_through", by_torch),
        ("distill_layer", by_sgd),
        ("distill_layer", targets_first),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


T, G, S, D = "quantize_tokens", "group_product", "straight_through", "distill_layer"
test_wrong_answers = rejects(
    "06-compression/04-zeroquant",
    [
        Wrong(T, columns_as_tokens, "those of the columns"),
        Wrong(T, one_scale, "all tokens have one scale"),
        Wrong(T, tokens(top=lambda b: 2 ** (b - 1)), "the largest code is 7"),
        Wrong(T, tokens(top=lambda b: 2 ** (b - 1) - 0.5), "½"),
        Wrong(T, tokens(top=lambda b: 2**b - 1), "2^b − 1"),
        Wrong(T, tokens(top=lambda b: 1), "largest |x| itself"),
        Wrong(T, tokens(scale_of=lambda s: 1 / s), "upside down"),
        Wrong(T, tokens(size=lambda x: x), "negative values are forgotten"),
        Wrong(T, tokens(rounding=torch.trunc), "cut off"),
        Wrong(T, tokens(rounding=torch.floor), "rounded down"),
        Wrong(T, tokens(rounding=torch.ceil), "rounded up"),
        Wrong(T, tokens(code=lambda X, s: X * s), "divide by it"),
        Wrong(T, tokens(safe=False), "it is to be 1"),
        Wrong(T, tokens(zero=0.0), "it is to be 1"),
        Wrong(T, tokens(zero=1e-8), "next to nothing: it is to be 1"),
        Wrong(T, tokens(zero=1 / 127), "1 / top: it is to be 1"),
        Wrong(T, eight_bits, "take `bits` from the argument"),
        Wrong(T, by_the_span, "the span from smallest to largest"),
        Wrong(T, right_for_four, "right for 4 × 4"),
        Wrong(T, only_codes, "two tensors"),
        Wrong(T, flat_scales, "shape"),
        Wrong(T, float_codes, "int8"),
        Wrong(T, tokens_in_place, "in place"),
        Wrong(T, unsigned, "−top … top"),
        Wrong(G, groups_product(token=lambda y, s: y), "of the tokens are missing"),
        Wrong(
            G,
            groups_product(group=lambda sums, s, g: sums),
            "of the weights are missing",
        ),
        Wrong(
            G,
            groups_product(group=lambda sums, s, g: sums, token=lambda y, s: y),
            "both scales are missing",
        ),
        Wrong(G, groups_product(inside=lambda y, s: y * s), "twice"),
        Wrong(G, groups_product(token=lambda y, s: y / s), "you divided"),
        Wrong(G, groups_product(token=lambda y, s: y * s.T), "rows of the result"),
        Wrong(
            G,
            groups_product(group=lambda sums, s, g: sums * s[:, g : g + 1]),
            "columns of the result",
        ),
        Wrong(G, groups_product(chosen=lambda n: [0]), "only the first group"),
        Wrong(G, groups_product(chosen=lambda n: [n - 1]), "only the last group"),
        Wrong(
            G,
            groups_product(chosen=lambda n: range(n - 1)),
            "the last group is missing",
        ),
        Wrong(
            G,
            groups_product(chosen=lambda n: range(1, n)),
            "the first group is missing",
        ),
        Wrong(G, groups_product(columns=every_fourth), "j % groups"),
        Wrong(G, whole_sums, "added before"),
        Wrong(G, scales_of_first, "the scale of the first"),
        Wrong(G, running_scale, "multiplies the groups before it"),
        Wrong(
            G,
            groups_product(
                columns=lambda g, size, groups: slice(g * groups, (g + 1) * groups)
            ),
            "as many columns here as there are groups",
        ),
        Wrong(G, groups_product(cast=torch.Tensor.half), "summed in 32"),
        Wrong(G, mean_of_groups, "the mean over the groups"),
        Wrong(G, transposed, "transpose"),
        Wrong(G, four_groups, "take the sizes from the arguments"),
        Wrong(G, groups_product(cast=lambda q: q), "summed in 32"),
        Wrong(S, no_gradient, "0 everywhere"),
        Wrong(S, detached, "gradient"),
        Wrong(S, through(inside=all_through), "clipped weights get a gradient"),
        Wrong(S, through(inside=positive_side), "clipped at −top get a gradient"),
        Wrong(S, through(inside=negative_side), "clipped at top get a gradient"),
        Wrong(S, by_clamp, "look at the rounded code"),
        Wrong(S, unscaled_gradient, "multiplied by the scale"),
        Wrong(S, through(gain=2), "twice"),
        Wrong(S, through(gain=-1), "wrong sign"),
        Wrong(
            S,
            through(inside=lambda W, s, c, top: c.abs() < top),
            "on the last level",
        ),
        Wrong(
            S,
            through(low=lambda t: -99, high=lambda t: 99),
            "nothing is clamped",
        ),
        Wrong(S, through(low=lambda t: -t - 1), "−top − 1"),
        Wrong(S, through(levels=lambda c, s: c), "multiply them by the scale"),
        Wrong(S, through(rounding=torch.trunc), "cut off"),
        Wrong(S, through(rounding=torch.floor), "rounded down"),
        Wrong(S, wrong_axis, "wrong axis"),
        Wrong(S, top_three, "take both from the arguments"),
        Wrong(S, added, "added once more"),
        Wrong(D, distilled(sign=1), "up the hill"),
        Wrong(D, distilled(loss=lambda y, t: (y - t).square().sum()), "sum of squares"),
        Wrong(
            D,
            distilled(loss=lambda y, t: (y - t).square().sum(-1).mean()),
            "over the outputs",
        ),
        Wrong(D, distilled(loss=lambda y, t: (y - t).abs().mean()), "absolute"),
        Wrong(
            D, distilled(loss=lambda y, t: (y - t).square().mean().sqrt()), "the root"
        ),
        Wrong(D, distilled(loss=lambda y, t: (y - t).square().mean() / 2), "the half"),
        Wrong(D, distilled(rate=lambda r: 1.0), "learning rate is missing"),
        Wrong(D, distilled(order=lambda i: i[:1]), "only the first input"),
        Wrong(D, distilled(order=lambda i: i[-1:]), "only the last input"),
        Wrong(D, distilled(order=lambda i: i[:-1]), "the last input was not read"),
        Wrong(D, distilled(order=lambda i: i[::-1]), "from last to first"),
        Wrong(D, distilled(finish=lambda W: W), "still has a gradient"),
        Wrong(D, teacher_trains, "the teacher got gradients"),
        Wrong(D, piled_up, "pile up"),
        Wrong(D, by_adam, "steps of Adam"),
        Wrong(D, at_the_start, "at the W of the start"),
        Wrong(D, together, "something else than the inputs"),
        Wrong(D, no_teacher, "never asked"),
        Wrong(D, moves_the_teacher, "the teacher was changed"),
        Wrong(D, chained, "something else than the inputs"),
        Wrong(
            D,
            distilled(finish=lambda W: (torch.round(W * 4) / 4).detach()),
            "rounded at the end",
        ),
    ],
)
