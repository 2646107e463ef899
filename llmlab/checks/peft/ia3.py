"""What marks the exercises of 04-peft/08-ia3."""

from __future__ import annotations

import torch

from llmlab.checks.operations import no_loop
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.course.grading.gradients import Call, cut

check = Checks("04-peft/08-ia3")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=1,
    importance=5,
    hints=(
        (
            "Keys and values are scaled where they come out of their linear; the MLP's"
            " activations where they go in."
        ),
        (
            "`feedforward` decides: scale x, of width in, before the linear; or scale"
            " its output, of width out, after it."
        ),
        (
            "If feedforward: (x · l) Wᵀ + b. Otherwise: (x Wᵀ + b) · l, with the bias"
            " inside the parentheses."
        ),
    ),
    grads={"x": 0, "scale": 3},
)
def ia3_linear(answer):
    """A frozen linear scaled at its output or at its input."""
    # square: a wrong side does not fail by its shape
    x, W, b = torch.randn(2, 3, 5), torch.randn(5, 5), torch.randn(5)
    l, what = 1 + 0.5 * torch.randn(5), "ia3_linear(…)"  # noqa: E741
    plain, shape = x @ W.T, (2, 3, 5)
    got = expect(answer(x, W, b, l, False), shape=shape, dtype=torch.float32, what=what)
    both = {
        "l is not used: this is the frozen linear": plain + b,
        "the bias is missing": plain * l,
        "l is added: it multiplies": plain + b + l,
        "you divided by l: it multiplies": (plain + b) / l,
        "l is in it twice": (plain + b) * l * l,
        "the change is added to the old output: l replaces the factor 1, it"
        " does not come on top": ((plain + b) * (1 + l)),
    }
    outputs = {
        "W x is not scaled: l multiplies all that comes out of the linear": (
            plain + b * l
        ),
        "the bias is not scaled: l multiplies all that comes out of the linear": (
            plain * l + b
        ),
        "you scaled the input, where feedforward=False asks for the output": (
            (x * l) @ W.T + b
        ),
        "both sides are scaled: one is enough": ((x * l) @ W.T + b) * l,
    }
    diagnose(
        got,
        right=(plain + b) * l,
        mistakes=both | outputs,
        terms=[{"l ⊙ W x": plain * l, "l ⊙ b": b * l}],
        what=f"{what} with feedforward=False",
    )
    inside = (x * l) @ W.T
    got = expect(answer(x, W, b, l, True), shape=shape, dtype=torch.float32, what=what)
    inputs = {
        "you scaled the output, where feedforward=True asks for the input": (
            (plain + b) * l
        ),
        "the bias is scaled too: at the input, l touches x alone": inside + b * l,
        "both sides are scaled: one is enough": (inside + b) * l,
        "the bias is missing": inside,
        "l is not used: this is the frozen linear": plain + b,
        "l is added: it multiplies": (x + l) @ W.T + b,
        "you divided by l: it multiplies": (x / l) @ W.T + b,
        "l is in it twice": (x * l * l) @ W.T + b,
        "1 + l for l: it multiplies as it is": (x * (1 + l)) @ W.T + b,
    }
    diagnose(
        got,
        right=inside + b,
        mistakes=inputs,
        terms=[{"W (l ⊙ x)": inside, "b": b}],
        what=f"{what} with feedforward=True",
    )
    lost = cut(answer, Call([x, W, b, l, True], {}), {"x": 0, "scale": 3})
    if lost:
        raise Mistake(f"with feedforward=True {lost}")
    # without a bias, and with two different widths
    x, W = torch.randn(4, 3), torch.randn(7, 3)
    for side, width in ((False, 7), (True, 3)):
        l = torch.rand(width) - 0.5  # noqa: E741
        right = (x * l) @ W.T if side else x @ W.T * l
        if not close(
            expect(answer(x, W, None, l, side), shape=(4, 7), what=what), right
        ):
            raise Mistake(
                f"right for a square W with a bias, wrong for a {tuple(W.shape)}"
                f" without (feedforward={side})"
            )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Write the scaled linear as an ordinary one: which entries of W does l[i]"
            " reach, a row or a column?"
        ),
        (
            "l ⊙ (W x + b) scales row i of W and entry i of b. W (l ⊙ x) + b scales"
            " column j of W and leaves b alone."
        ),
        (
            "Rows: `l[:, None] * W`. Columns: `W * l`. Do it in float32 and convert"
            " once at the end."
        ),
    ),
)
def merge(answer):
    """The weight and bias of the plain linear that does what the scaled one does."""
    W, b = torch.randn(6, 6).bfloat16(), torch.randn(6).bfloat16()
    l = 1 + 0.5 * torch.randn(6)  # noqa: E741
    for feedforward in (False, True):
        what = f"merge(W, b, l, feedforward={feedforward})"
        pair = expect(answer(W, b, l, feedforward), kind=(tuple, list), what=what)
        if len(pair) != 2:
            raise Mistake(
                f"{what} returned {len(pair)} things: return the weight and the bias"
            )
        new_W = expect(
            pair[0], shape=(6, 6), dtype=torch.bfloat16, what=f"the weight of {what}"
        )
        if pair[1] is None:
            raise Mistake("b is dropped: a linear with a bias keeps one")
        new_b = expect(
            pair[1], shape=(6,), dtype=torch.bfloat16, what=f"the bias of {what}"
        )
        _judge_weight(new_W, W, l, feedforward, f"the weight of {what}")
        _judge_bias(new_b, b, l, feedforward, f"the bias of {what}")
    W = torch.randn(4, 3)
    pair = answer(W, None, torch.rand(3), True)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[1] is not None:
        raise Mistake(
            "a linear without a bias must stay without one: return the weight and None"
        )
    l = torch.rand(4)  # noqa: E741
    pair = answer(W, None, l, False)
    expect(
        pair[0],
        shape=(4, 3),
        dtype=torch.float32,
        what="the weight of merge(W, None, l, False), W in float32,",
    )
    if pair[1] is not None:
        raise Mistake(
            "a linear without a bias must stay without one: return None in its place"
        )
    x = torch.randn(5, 3)  # the oracle
    if not close(x @ pair[0].T, l * (x @ W.T)):
        raise Mistake(
            "for a weight of 4 × 3 without a bias, the merged linear does not give the"
            " scaled output"
        )


def _judge_weight(new_W, W, l, feedforward, what) -> None:  # noqa: E741
    """A Mistake when the merged weight is wrong."""
    wide = torch.float32
    rows, columns = (
        (l[:, None] * W.to(wide)).bfloat16(),
        (W.to(wide) * l).bfloat16(),
    )
    right_W, other_W = (columns, rows) if feedforward else (rows, columns)
    which = ("rows", "columns") if feedforward else ("columns", "rows")
    mistakes = {
        f"you scaled the {which[0]} of W: l reaches its {which[1]} here": other_W,
        "W is not scaled": W,
        "l was rounded to bfloat16 before the product: multiply in"
        " float32, round once": (
            l.bfloat16() * W if feedforward else l.bfloat16()[:, None] * W
        ),
        "1 + l for l: it multiplies as it is": (
            (W.to(wide) * (1 + (l if feedforward else l[:, None]))).bfloat16()
        ),
        "l is in W twice": (
            (W.to(wide) * (l if feedforward else l[:, None]) ** 2).bfloat16()
        ),
        "l is added to W: it multiplies": (
            (W.to(wide) + (l if feedforward else l[:, None])).bfloat16()
        ),
        "W is divided by l: that is unmerging": (
            (W.to(wide) / (l if feedforward else l[:, None])).bfloat16()
        ),
    }
    diagnose(
        new_W,
        right=right_W,
        mistakes=mistakes,
        tol=1e-6,
        what=what,
    )


def _judge_bias(new_b, b, l, feedforward, what) -> None:  # noqa: E741
    """A Mistake when the merged bias is wrong."""
    wide = torch.float32
    scaled_b = (l * b.to(wide)).bfloat16()
    if feedforward:
        diagnose(
            new_b,
            right=b,
            mistakes={"the bias is scaled: at the input, l never meets it": scaled_b},
            what=what,
        )
    else:
        mistakes = {
            "the bias is not scaled: l multiplies all that comes out, b too": b,
            "the bias is scaled in bfloat16: multiply in float32, round once": (
                l.bfloat16() * b
            ),
            "the bias is scaled by 1 + l: l multiplies as it is": (
                (b.to(wide) * (1 + l)).bfloat16()
            ),
            "the bias is scaled by l twice": (b.to(wide) * l * l).bfloat16(),
        }
        diagnose(
            new_b,
            right=scaled_b,
            mistakes=mistakes,
            tol=1e-6,
            what=what,
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Each row of the batch has one vector for all its tokens. Index the table"
            " of vectors by `ids`, then broadcast."
        ),
        (
            "`l[ids]` is (n, out); the output is (n, seq, out), so a dimension is"
            " missing in the middle."
        ),
        (
            "Where ids is −1 the scale must be 1: `torch.where(ids[:, None] >= 0,"
            " l[ids], 1.0)[:, None]`."
        ),
    ),
)
def serve(answer):
    """A batch in which each row has its own task's scales, or none."""
    ids = torch.tensor([2, -1, 0, 2, 1, -1])[torch.randperm(6)]
    x = torch.randn(6, 6, 5)
    W = torch.randn(6, 5)
    scales = 1 + 0.5 * torch.randn(3, 6)
    got = expect(
        answer(x, W, scales, ids),
        shape=(6, 6, 6),
        dtype=torch.float32,
        what="serve(x, W, l, ids)",
    )
    plain = x @ W.T
    on = (ids >= 0)[:, None, None]
    per_row = scales[ids][:, None]
    mistakes = {
        "rows with id −1 get the last task's scales: an index of −1 counts"
        " from the end": plain * per_row,
        "rows with id −1 get task 0's scales: they get none": (
            plain * scales[ids.clamp(min=0)][:, None]
        ),
        "rows with id −1 give 0: no scale means a scale of 1": (
            plain * torch.where(on, per_row, 0.0)
        ),
        "scales are laid along the tokens: l[ids] needs a dimension in the middle": (
            plain * torch.where(ids[:, None] >= 0, scales[ids], 1.0)
        ),
        "scales are laid along the tokens (l[ids] needs a dimension in the middle), and"
        " rows with id −1 get scales too": plain * scales[ids],
        "l multiplies as it is: 1 + l is for changes that start at 0": plain
        * torch.where(on, 1 + per_row, 1.0),
        "l multiplies as it is, not 1 + l; and rows with id −1 get scales too": (
            plain * (1 + per_row)
        ),
        "all rows get the first row's scales": plain * scales[ids[0]],
        "the scales are added: they multiply": plain + torch.where(on, per_row, 0.0),
        "rows with id −1 get task 1's scales: their sign is lost": (
            plain * scales[ids.abs()][:, None]
        ),
        "every row gets the sum of all tasks' scales: its own alone": plain
        * torch.where(on, scales.sum(0), 1.0),
        "every row gets the product of all tasks' scales: its own alone": plain
        * torch.where(on, scales.prod(0), 1.0),
        "the scales are applied twice": plain * torch.where(on, per_row**2, 1.0),
        "task 0 is a task too: only −1 means the plain model": plain
        * torch.where((ids > 0)[:, None, None], per_row, 1.0),
        "rows with id −1 get the mean of all tasks' scales: they get none": plain
        * torch.where(on, per_row, scales.mean(0)),
        "each row gets the scales of the task before its own: ids count from 0": plain
        * torch.cat([torch.ones(1, 6), scales])[ids][:, None],
        "one scale for a whole row, the mean: each output has its own": plain
        * torch.where(on, per_row.mean(-1, keepdim=True), 1.0),
        "this is W x: nobody's scales are used": plain,
        "ids is not used: row i gets the scales of task i mod 3": (
            plain * scales[torch.arange(6) % 3][:, None]
        ),
    }
    diagnose(
        got,
        right=torch.where(on, plain * per_row, plain),
        mistakes=mistakes,
        what="serve(x, W, l, ids)",
    )
    for i, task in enumerate(ids.tolist()):  # the oracle: each row alone
        if not close(got[i], x[i] @ W.T * (scales[task] if task >= 0 else 1.0)):
            raise Mistake(f"row {i} differs from what it gives alone with task {task}")
    if not close(answer(x, W, scales, torch.full((6,), -1)), plain):
        raise Mistake("with id −1 in every row the batch must go through W alone")
    no_loop(answer, (x, W, scales, ids), (x.repeat(4, 1, 1), W, scales, ids.repeat(4)))
