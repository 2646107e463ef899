"""Checks of 06-compression/08-peqa-and-qlora."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.compression import peqa_and_qlora as peqa
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/08-peqa-and-qlora")


def problem(
    out: int, columns: int, size: int, most: int = 15
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 … most and zero points in uint8, and scales that differ a lot."""
    groups = columns // size
    codes = torch.randint(0, most + 1, (out, columns), dtype=torch.uint8)
    zero = torch.randint(most // 4 + 1, most * 3 // 4 + 1, (out, groups)).byte()
    scale = 0.2 + torch.rand(out, groups)
    return codes, zero, scale


def spread(values: Tensor, size: int) -> Tensor:
    """A value of each group, for each of its weights."""
    return values.float().repeat_interleave(size, dim=1)


def weight_of(codes: Tensor, zero: Tensor, scale: Tensor, size: int) -> Tensor:
    """Ŵ."""
    integers = codes.float() - spread(zero, size)
    groups = QuantConfig(4, group_size=size)
    return peqa.dequantize(integers, scale.reshape(-1, 1), groups)


def telling(draw: Callable[[], tuple], values: Callable[..., list]) -> tuple:
    """Inputs on which no two of the values are the same."""
    for _ in range(200):
        case = draw()
        pairs = itertools.combinations(values(*case), 2)
        if not any(close(a, b, tol=1e-3) for a, b in pairs):
            return case
    raise RuntimeError("no inputs were found that tell all mistakes apart")


BEYOND_127 = (
    "right for codes up to 15, wrong for codes of 8 bits: uint8 goes up to 255, which"
    " int8 does not hold"
)

# 1 ------------------------------------------------------------------------------------


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    grads={"x": 0, "scale": 3},
    hints=(
        "First the weight: integers less zero points, as floats, times scales. Then x"
        " times its transpose.",
        "`codes.float()` comes before the subtraction: 3 − 8 is 251 in uint8. A value"
        " per group is spread by `repeat_interleave(group_size, dim=1)`.",
        "`x @ (spread(scale) * (codes.float() - spread(zero))).T`, where spread repeats"
        " each value for its group.",
    ),
)
def peqa_forward(answer):
    """The outputs of a linear that is held as integers, zero points and scales."""

    def draw() -> tuple:
        return torch.randn(6, 6), *problem(6, 6, 2), 2

    def all_values(*case) -> list:
        return [right_outputs(*case), *wrong_outputs(*case).values()]

    case = telling(draw, all_values)
    x, codes, zero, scale, size = case
    what = "peqa_forward(x, codes, zero, scale, 2)"
    trained = scale.clone().requires_grad_(True)
    got = expect(
        answer(x.clone().requires_grad_(True), codes, zero, trained, size),
        shape=(6, 6),
        dtype=torch.float32,
        what=what,
    )
    diagnose(got, right=right_outputs(*case), mistakes=wrong_outputs(*case), what=what)
    for tokens, out, columns, size in ((4, 5, 12, 4), (1, 3, 7, 7), (2, 4, 3, 1)):
        x = torch.randn(tokens, columns)
        codes, zero, scale = problem(out, columns, size)
        got = expect(
            answer(x, codes, zero, scale, size),
            shape=(tokens, out),
            dtype=torch.float32,
            what=f"the outputs of {out} × {columns} weights in groups of {size}",
        )
        if not close(got, right_outputs(x, codes, zero, scale, size), tol=1e-4):
            raise Mistake(
                "right for 6 × 6 weights in groups of 2, wrong for"
                f" {out} × {columns} in groups of {size}: take all sizes from the"
                " arguments"
            )
    x, eight = torch.randn(3, 8), problem(4, 8, 4, most=255)
    if not close(answer(x, *eight, 4), right_outputs(x, *eight, 4), tol=1e-4):
        raise Mistake(BEYOND_127)


def right_outputs(
    x: Tensor, codes: Tensor, zero: Tensor, scale: Tensor, size: int
) -> Tensor:
    """Exercise 1."""
    return x @ weight_of(codes, zero, scale, size).T


def wrong_outputs(
    x: Tensor, codes: Tensor, zero: Tensor, scale: Tensor, size: int
) -> dict[str, Tensor]:
    """What usual mistakes make of the outputs."""
    s, z, q = spread(scale, size), spread(zero, size), codes.float()
    s_tiled = scale.repeat(1, size)
    z_tiled = zero.float().repeat(1, size)
    wrapped = (codes - zero.repeat_interleave(size, 1)).float()
    wide = torch.arange(codes.shape[1]) // (codes.shape[1] // size)
    wide = wide.clamp(max=scale.shape[1] - 1)
    return {
        "3 − 8 is 251 here: codes and zero points are uint8, so make floats of them"
        " before you subtract": x @ (s * wrapped).T,
        "group_size is taken for the number of groups: it is the number of columns in"
        " a group": x @ (scale[:, wide] * (q - zero.float()[:, wide])).T,
        "the zero points are missing": x @ (s * q).T,
        "the zero points are added: subtract them": x @ (s * (q + z)).T,
        "this is z − q: the zero point is subtracted from the code": x
        @ (s * (z - q)).T,
        "the zero point is 8 everywhere: each group has its own": x @ (s * (q - 8)).T,
        "the zero point is subtracted after the scaling: first q − z, then times the"
        " scale": x @ (s * q - z).T,
        "the scales are missing": x @ (q - z).T,
        "you divided by the scales: multiply": x @ ((q - z) / s).T,
        "the scales change from column to column: neighbours share one"
        " (repeat_interleave, not repeat)": x @ (s_tiled * (q - z)).T,
        "the zero points change from column to column: neighbours share one"
        " (repeat_interleave, not repeat)": x @ (s * (q - z_tiled)).T,
        "scales and zero points change from column to column: neighbours share them"
        " (repeat_interleave, not repeat)": x @ (s_tiled * (q - z_tiled)).T,
        "all groups of a row have the scale of its first group": (
            x @ (s[:, :1] * (q - z)).T
        ),
        "all groups of a row have their mean scale": (
            x @ (scale.mean(1, keepdim=True) * (q - z)).T
        ),
        "the weight is not transposed: its rows are the outputs": x @ (s * (q - z)),
        "the outputs are right but for a transpose": (x @ (s * (q - z)).T).T,
    }


# 2 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "ŵ = s (q − z), so each weight tells the scale: my gradient times (q − z).",
        "All weights of a group say so to one scale: what they say adds up.",
        "`(G * (codes.float() - spread(zero)))`, then `unflatten(1, (-1, group_size))`"
        " and a sum over the last dimension.",
    ),
)
def scale_gradient(answer):
    """The gradient of each scale, from that of the weights."""

    def draw() -> tuple:
        codes, zero, _ = problem(4, 9, 3)
        return torch.randn(4, 9), codes, zero, 3

    def all_values(*case) -> list:
        return [right_gradient(*case), *wrong_gradients(*case).values()]

    case = telling(draw, all_values)
    what = "scale_gradient(G, codes, zero, 3)"
    got = answer(*case)
    if isinstance(got, Tensor) and got.numel() == 4:
        raise Mistake("this is one number for each row: one for each group is asked")
    expect(got, shape=(4, 3), dtype=torch.float32, what=what)
    diagnose(
        got, right=right_gradient(*case), mistakes=wrong_gradients(*case), what=what
    )
    for out, columns, size in ((3, 8, 4), (5, 7, 7), (2, 6, 1)):
        codes, zero, scale = problem(out, columns, size)
        scale.requires_grad_(True)
        G = torch.randn(out, columns)
        # an oracle of its own: autograd
        weight = spread(scale, size) * (codes.float() - spread(zero, size))
        (right,) = torch.autograd.grad(weight, scale, G)
        got = expect(
            answer(G, codes, zero, size),
            shape=tuple(right.shape),
            what=f"the gradient for {out} × {columns} weights in groups of {size}",
        )
        if not close(got, right, tol=1e-4):
            raise Mistake(
                "right for 4 × 9 weights in groups of 3, wrong for"
                f" {out} × {columns} in groups of {size}: take all sizes from the"
                " arguments"
            )
    G, (codes, zero, _) = torch.randn(4, 8), problem(4, 8, 4, most=255)
    right = right_gradient(G, codes, zero, 4)
    if not close(answer(G, codes, zero, 4), right, tol=1e-4):
        raise Mistake(BEYOND_127)


def right_gradient(G: Tensor, codes: Tensor, zero: Tensor, size: int) -> Tensor:
    """Exercise 2."""
    integers = codes.float() - spread(zero, size)
    groups = QuantConfig(4, group_size=size)
    return peqa.scale_gradient(G, integers, groups).reshape(len(G), -1)


def wrong_gradients(
    G: Tensor, codes: Tensor, zero: Tensor, size: int
) -> dict[str, Tensor]:
    """What usual mistakes make of the gradient; there are `size` groups in a row."""
    q, z = codes.float(), spread(zero, size)
    wrapped = (codes - zero.repeat_interleave(size, 1)).float()

    def by_group(values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, size)).sum(-1)

    said = G * (q - z)
    return {
        "3 − 8 is 251 here: codes and zero points are uint8, so make floats of them"
        " before you subtract": by_group(G * wrapped),
        "the zero points are missing: ŵ = s (q − z)": by_group(G * q),
        "the zero point is subtracted once from the sum: it belongs to each weight,"
        " q − z": by_group(G * q) - zero.float(),
        "a group is every third column here: it is neighbours": (
            (G.unflatten(1, (size, -1)) * q.unflatten(1, (size, -1))).sum(1)
            - G.unflatten(1, (size, -1)).sum(1) * zero.float()
        ),
        "the zero points are added: subtract them": by_group(G * (q + z)),
        "the zero points change from column to column: neighbours share one": by_group(
            G * (q - zero.float().repeat(1, size))
        ),
        "this is the mean over a group: a scale gathers the sum": by_group(said) / size,
        "this is the gradient summed, without the integers": by_group(G),
        "these are the integers summed, without the gradient": by_group(q - z),
        "the sums are multiplied: multiply weight by weight, then add": (
            by_group(G) * by_group(q - z)
        ),
        "the sign is wrong": -by_group(said),
        "all groups of a row have the zero point of the first": by_group(
            G * (q - z[:, :1])
        ),
        "this is the root of the sum of squares: the sum itself is asked": by_group(
            said.square()
        ).sqrt(),
        "the sum runs over every third column: a group is neighbours": (
            said.unflatten(1, (-1, size)).sum(1)
        ),
        "each group got the sum over its whole row": (
            said.sum(1, keepdim=True).expand(-1, size)
        ),
        "you took the largest of a group: a scale gathers the sum": (
            said.unflatten(1, (-1, size)).amax(-1)
        ),
        "you divided by the integers: multiply": by_group(
            G / torch.where(q == z, 1.0, q - z)
        ),
        "absolute values are added: keep the signs": by_group(said.abs()),
    }


# 3 ------------------------------------------------------------------------------------

SHAPES = [(96, 64), (48, 64), (64, 160)]


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        "Count two things: the bytes that the weights take, and the number of values"
        " that train. A trained value adds 14 bytes.",
        "A group of a row has one scale of 2 bytes. An adapter has rank × (out + in)"
        " values, 2 bytes each, besides the weights.",
        "full: 2n + 14n. lora: 2n + (2 + 14)a. qlora: n·bits/8 + 2g + 16a. peqa:"
        " n·bits/8 + 2g + 14g. With n weights, g groups, a adapter values.",
    ),
)
def training_bytes(answer):
    """What full fine-tuning, LoRA, QLoRA and PEQA take in memory."""
    for method in ("full", "lora", "qlora", "peqa"):
        what = f"training_bytes(shapes, {method!r}, 4, 16, 3)"
        got = expect(
            answer(list(SHAPES), method, 4, 16, 3), kind=(int, float), what=what
        )
        right = count(SHAPES, method, 4, 16, 3)
        mistakes = wrong_counts(SHAPES, method, 4, 16, 3)
        diagnose(got, right=right, mistakes=mistakes, tol=1e-9, what=what)
    other = [(24, 48), (40, 96)]
    for method, bits, size, rank in (
        ("qlora", 3, 24, 5),
        ("peqa", 3, 24, 5),
        ("peqa", 2, 48, 1),
        ("lora", 8, 8, 7),
    ):
        got = expect(
            answer(list(other), method, bits, size, rank),
            kind=(int, float),
            what=f"training_bytes(…, {method!r}, {bits}, {size}, {rank})",
        )
        if not close(got, count(other, method, bits, size, rank), tol=1e-9):
            raise Mistake(
                "right for 4 bits, groups of 16 and rank 3, wrong for"
                f" {method!r} with {bits} bits, groups of {size} and rank {rank}: take"
                " all of them from the arguments"
            )


def count(
    shapes: list[tuple[int, int]],
    method: str,
    bits: int,
    size: int,
    rank: int,
    *,
    optimizer: float = 12,
    gradient: float = 2,
    adapter: float = 2,
    scale: float = 2,
    code: float | None = None,
    weight: float = 2,
    trains: int | None = None,
    groups: int | None = None,
    lora: int | None = None,
    more: float = 0,
) -> float:
    """Exercise 3, and what comes out with one thing changed."""
    n = sum(rows * columns for rows, columns in shapes)
    g = groups
    if g is None:
        g = sum(rows * columns // size for rows, columns in shapes)
    a = lora
    if a is None:
        a = sum(rank * (rows + columns) for rows, columns in shapes)
    quantised = method in ("qlora", "peqa")
    held = weight * n + more
    if quantised:
        held = n * (bits / 8 if code is None else code) + scale * g + more
    if method in ("lora", "qlora"):
        held += adapter * a
    values = {"full": n, "lora": a, "qlora": a, "peqa": g}[method]
    if trains is not None:
        values = trains
    return held + (gradient + optimizer) * values


def wrong_counts(shapes, method: str, *numbers: int) -> dict[str, float]:
    """What usual mistakes give for one method."""
    bits, size, rank = numbers
    n = sum(rows * columns for rows, columns in shapes)

    a = sum(rank * (rows + columns) for rows, columns in shapes)
    g = sum(rows * columns // size for rows, columns in shapes)

    def but(**changes) -> float:
        return count(shapes, method, *numbers, **changes)

    found = {
        "the optimizer's 12 bytes per trained value are missing": but(optimizer=0),
        "the optimizer takes 12 bytes per trained value: two moments and a master copy,"
        " 4 each; you counted 8": but(optimizer=8),
        "only the first linear is counted": count(shapes[:1], method, *numbers),
    }
    if method != "full":
        found["every weight is trained here: in this method the weights are frozen"] = (
            but(trains=n)
        )
    if method == "full":  # which is asked first
        found |= {
            "the gradients' 2 bytes per trained value are missing": but(gradient=0),
            # one sum
            "a float weight takes 2 bytes, and its gradient 2; you counted 4 for one of"
            " them": but(weight=4),
        }
    if method in ("lora", "qlora"):
        found |= wrong_adapters(shapes, rank, but)
    if method == "lora":
        found |= {
            "LoRA's frozen weights are 16-bit floats: it is QLoRA whose are codes": (
                count(shapes, "qlora", *numbers)
            ),
            # 2 bytes more per weight
            "a float weight takes 2 bytes, and LoRA's are frozen, without a gradient;"
            " you counted 4": but(weight=4),
            "the frozen weights have a place in the optimizer: only what trains has"
            " one": but(more=12 * n),
            "the frozen weights are trained, too: only the adapters are": but(
                trains=a + n
            ),
        }
    if method in ("qlora", "peqa"):
        per_row = sum(rows for rows, _ in shapes)
        found |= {
            "the scales of the groups are missing": but(scale=0),
            "a scale has 16 bits, 2 bytes; you counted 4": but(scale=4),
            "the codes have `bits` bits each, so divide by 8": but(code=bits),
            "the codes are missing: each has `bits` / 8 bytes (`//` makes 0 of that)": (
                but(code=0)
            ),
            "the codes have a byte each: `bits` bits are asked": but(code=1),
            "the frozen weights are held as 16-bit floats: they are codes": but(code=2),
            "there is a scale for each group of group_size weights, not for each row": (
                but(groups=per_row)
            ),
            "the groups of one row are counted, not those of all rows": but(
                groups=sum(columns // size for _, columns in shapes)
            ),
            "there are no zero points here, you counted `bits` for each group": but(
                more=g * bits / 8
            ),
        }
    if method == "qlora":
        found |= {
            "QLoRA's scales are frozen: its adapters train": but(trains=g),
            "QLoRA's scales are trained, too: only its adapters are": but(trains=a + g),
        }
    if method == "peqa":
        # the same sum as scales of 4 bytes
        del found["a scale has 16 bits, 2 bytes; you counted 4"]
        found |= {
            "the scales are counted twice, or with 4 bytes: they are part of the"
            " weights already, 2 bytes each": but(scale=4),
            "the integers are trained, too: only the scales are": but(trains=n + g),
            "PEQA has no adapters: its scales train": but(trains=a),
            "PEQA has no adapters: its scales alone are trained": but(
                trains=a + g, more=2 * a
            ),
        }
    return found


def wrong_adapters(shapes, rank: int, but: Callable) -> dict[str, float]:
    """The same for what LoRA's adapters take."""
    a = sum(rank * (rows + columns) for rows, columns in shapes)
    n = sum(rows * columns for rows, columns in shapes)
    return {
        "2 bytes per adapter value are missing: the adapters themselves take 2, and"
        " their gradients 2 more": but(adapter=0),
        "the adapters are missing": but(lora=0),
        "an adapter's values are counted twice": but(lora=2 * a),
        "an adapter has rank × (out + in) values, not rank × out × in": but(
            lora=rank * n
        ),
        "only one of the adapter's two matrices is counted: rank × (out + in)": but(
            lora=sum(rank * rows for rows, _ in shapes)
        ),
        "only one of the adapter's two matrices is counted, that of the inputs:"
        " rank × (out + in)": but(lora=sum(rank * columns for _, columns in shapes)),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        "Look at everything first, then build the new dictionary. Sets of names can be"
        " subtracted: `scales.keys() - task.keys()`.",
        "Four refusals: a name too few, a name too many, another shape, a value that is"
        " not finite. Each message holds the name.",
        "`task[name].to(torch.float32, copy=True)` is a copy in any case; `.float()` is"
        " the same tensor where the task has 32 bits already.",
    ),
)
def swap_task(answer):
    """The scales of another task, if they fit the model."""

    def model() -> dict[str, Tensor]:
        return {
            "layers.0.q_proj": 0.1 + torch.rand(5),
            "layers.0.v_proj": 0.1 + torch.rand(3),
            "layers.1.q_proj": 0.1 + torch.rand(5),
        }

    scales = model()
    task = {name: s.half() for name, s in model().items()}
    got = expect(answer(scales, task), kind=dict, what="swap_task(scales, task)")
    check_swapped(got, scales, task)
    wide = model()
    got = expect(answer(scales, wide), kind=dict, what="swap_task of a 32-bit task")
    for name, values in got.items():
        if values.data_ptr() == wide[name].data_ptr():
            raise Mistake(
                "where the task has 32 bits, what you return is the task's own tensor:"
                " training would change the task. Return copies"
            )
    refuses(answer, scales, task)


def check_swapped(got: dict, scales: dict, task: dict) -> None:
    """Raises: Mistake: these are not the task's scales in float32."""
    if set(got) != set(task):
        raise Mistake(
            f"the names are {', '.join(map(str, got)) or 'none'}, where those of the"
            " task are asked"
        )
    for name, right in task.items():
        values = expect(got[name], shape=tuple(right.shape), what=f"scales of {name}")
        if close(values.float(), scales[name], tol=1e-6):
            raise Mistake("these are the scales of before: those of the task are asked")
        diagnose(
            values.float(),
            right=right.float(),
            mistakes={
                "the task's scales are added to those of before: they replace them": (
                    scales[name] + right
                ),
                "the task's scales multiply those of before: they replace them": (
                    scales[name] * right
                ),
                "this is the mean of the two: the task's scales replace the others": (
                    (scales[name] + right) / 2
                ),
            },
            tol=1e-6,
            what=f"the scales of {name}",
        )
        if values.dtype != torch.float32:
            raise Mistake(
                f"the scales are {str(values.dtype).removeprefix('torch.')}, as in the"
                " task's file: they train on, so float32 is asked"
            )


def refuses(answer: Callable, scales: dict, task: dict) -> None:
    """Raises: Mistake: a task that does not fit is taken, or refused without a name."""
    name = "layers.0.v_proj"
    holes = {}
    for value in (torch.nan, torch.inf):
        holes[value] = task[name].clone()
        holes[value][1] = value
    cases = {
        "lacks a linear": {k: v for k, v in task.items() if k != name},
        "has a linear that the model has not": task | {"layers.9.up_proj": task[name]},
        "has one scale where the model has three": task | {name: task[name][:1]},
        "has scales of shape (3, 1) where the model has (3,)": (
            task | {name: task[name][:, None]}
        ),
        "holds NaN": task | {name: holes[torch.nan]},
        "holds an infinite scale": task | {name: holes[torch.inf]},
    }
    for what, wrong in cases.items():
        named = "layers.9.up_proj" if "has not" in what else name
        try:
            answer(dict(scales), wrong)
        except ValueError as refusal:
            if named not in str(refusal):
                raise Mistake(
                    f"a task that {what} is refused, but the message does not name"
                    f" {named}: {refusal}"
                ) from None
        except (KeyError, RuntimeError, AssertionError, TypeError) as error:
            if isinstance(error, NotImplementedError):
                raise
            raise Mistake(
                f"a task that {what} ends in a {type(error).__name__}: raise a"
                " ValueError that names the linear"
            ) from None
        else:
            raise Mistake(f"a task that {what} is taken: raise a ValueError")
