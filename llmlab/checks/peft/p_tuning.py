"""What marks the exercises of 04-peft/03-p-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.peft import label_head

check = Checks("04-peft/03-p-tuning")


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Two loops, or one with two states: s goes from the first vector to the"
            " last, t from the last to the first. Both start at zero."
        ),
        (
            "Collect the states in lists. The backward ones come last token first:"
            " `flip(0)` puts them in the tokens' order."
        ),
        (
            "Stack both to (p, m), join them along the last dimension to (p, 2m),"
            " forward half first, and multiply by W's transpose."
        ),
    ),
    grads={"h": 0, "Wf": 1, "Uf": 2, "Wb": 3, "Ub": 4, "W": 5},
)
def encode_prompt(answer):
    """Virtual tokens made by a bidirectional recurrence over free vectors."""
    p, d, m = 4, 5, 3
    h, W = torch.randn(p, d), torch.randn(d, 2 * m)
    Wf, Wb, Uf, Ub = (
        torch.randn(m, d),
        torch.randn(m, d),
        torch.randn(m, m),
        torch.randn(m, m),
    )
    what = "encode_prompt(…)"
    got = expect(
        answer(h, Wf, Uf, Wb, Ub, W), shape=(p, d), dtype=torch.float32, what=what
    )
    right, mistakes = _encoded(h, Wf, Uf, Wb, Ub, W)
    diagnose(got, right=right, mistakes=mistakes, what=what)
    rnn = torch.nn.RNN(d, m, bidirectional=True, bias=False)  # the oracle
    weights = {
        "weight_ih_l0": Wf,
        "weight_hh_l0": Uf,
        "weight_ih_l0_reverse": Wb,
        "weight_hh_l0_reverse": Ub,
    }
    rnn.load_state_dict(weights)
    if not close(got, (rnn(h)[0] @ W.T).detach()):
        raise Mistake("torch.nn.RNN gives other states for the same weights")
    if not close(
        answer(h[:1], Wf, Uf, Wb, Ub, W),
        torch.cat([torch.tanh(h[:1] @ Wf.T), torch.tanh(h[:1] @ Wb.T)], 1) @ W.T,
    ):
        raise Mistake(
            "right for p = 4, wrong for p = 1, where both states before are zero"
        )


def _encoded(h, Wf, Uf, Wb, Ub, W) -> tuple[Tensor, dict[str, Tensor]]:
    """The virtual tokens, and what mistakes make of them."""
    s, t = _states(h, Wf, Uf), _states(h.flip(0), Wb, Ub).flip(0)
    join = lambda a, b: torch.cat([a, b], -1) @ W.T  # noqa: E731
    p, m = s.shape
    zero = torch.zeros_like(s)
    ones = torch.ones(m)
    near_s, near_t = torch.tanh(h @ Wf.T), torch.tanh(h @ Wb.T)

    def both(**other):
        """Both recurrences with one thing changed."""
        back = _states(h.flip(0), Wb, Ub, **other).flip(0)
        return join(_states(h, Wf, Uf, **other), back)

    mistakes = {
        "the backward states are not turned round: t_i belongs to token i": join(
            s, t.flip(0)
        ),
        "both directions read from left to right: t_i comes from t_{i+1}": join(
            s, _states(h, Wb, Ub)
        ),
        "both directions use the forward weights": join(
            s, _states(h.flip(0), Wf, Uf).flip(0)
        ),
        "the states are joined the wrong way round: [s_i; t_i], forward first": join(
            t, s
        ),
        "the backward half is missing": join(s, zero),
        "the forward half is missing": join(zero, t),
        "the states do not remember: U times the state before is missing": join(
            _states(h, Wf, 0 * Uf), _states(h, Wb, 0 * Ub)
        ),
        "tanh is missing": join(
            _states(h, Wf, Uf, lambda x: x),
            _states(h.flip(0), Wb, Ub, lambda x: x).flip(0),
        ),
        "that is ReLU, where tanh is asked": join(
            _states(h, Wf, Uf, F.relu), _states(h.flip(0), Wb, Ub, F.relu).flip(0)
        ),
        "U is transposed: the state is a column, U s": join(
            _states(h, Wf, Uf.T), _states(h.flip(0), Wb, Ub.T).flip(0)
        ),
        "every token gets the two last states: each has its own s_i and t_i": join(
            s[-1].expand(p, -1), t[0].expand(p, -1)
        ),
        "that is a sigmoid, where tanh is asked": both(squash=torch.sigmoid),
        "the state before comes in after tanh: it belongs inside": both(
            step=lambda W, row, U, before: torch.tanh(W @ row) + U @ before
        ),
        "the states do not begin at zero, but at one": both(first=ones),
        "the backward states begin where the forward ones ended: t_p = 0": join(
            s, _states(h.flip(0), Wb, Ub, first=s[-1]).flip(0)
        ),
        "each token gets the states before it: s_i and t_i have read token i": join(
            torch.cat([zero[:1], s[:-1]]), torch.cat([t[1:], zero[:1]])
        ),
        "the states remember one token only: U multiplies the whole state before": join(
            torch.tanh(h @ Wf.T + torch.cat([zero[:1], near_s[:-1]]) @ Uf.T),
            torch.tanh(h @ Wb.T + torch.cat([near_t[1:], zero[:1]]) @ Ub.T),
        ),
        "the first token has no backward state: the loop ends too early": join(
            s, torch.cat([zero[:1], t[1:]])
        ),
        "the last token has no forward state: the loop ends too early": join(
            torch.cat([s[:-1], zero[:1]]), t
        ),
        "Wf and Uf are those of the forward direction, Wb and Ub of the backward": join(
            _states(h, Wb, Ub), _states(h.flip(0), Wf, Uf).flip(0)
        ),
        "h is added to P: there is no residual": join(s, t) + h,
        "s and t alternate number by number: they are joined end to end": (
            torch.stack([s, t], -1).flatten(1) @ W.T
        ),
        "P_i has no tanh: only the states do": torch.tanh(join(s, t)),
    }
    return join(s, t), mistakes


def _states(
    h: Tensor, W: Tensor, U: Tensor, squash=torch.tanh, first=None, step=None
) -> Tensor:
    """(p, m): what a recurrence over the rows of h remembers after each."""
    states = [torch.zeros(len(U)) if first is None else first]
    for row in h:
        if step is None:
            states.append(squash(W @ row + U @ states[-1]))
        else:
            states.append(step(W, row, U, states[-1]))
    return torch.stack(states[1:])


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "`log_softmax` over the labels' dimension, then pick each token's own"
            " label. −100 is no index: leave those tokens out first."
        ),
        (
            "`kept = labels != -100` gives a mask; `scores[kept]` is (n, C) and"
            " `labels[kept]` is (n,)."
        ),
        (
            "The mean is over the n labelled tokens of the batch. Nothing is shifted:"
            " token t has label t."
        ),
    ),
    grads={"scores": 0},
)
def labelling_loss(answer):
    """The mean cross-entropy over all tokens that have a label."""
    B, T, C = 3, 6, 4
    scores = 2 * torch.randn(B, T, C)
    labels = torch.randint(C, (B, T))
    labels[0, 4:] = labels[1, 0] = labels[2, 2:] = -100
    what = "labelling_loss(scores, labels)"
    got = expect(answer(scores, labels), shape=(), dtype=torch.float32, what=what)
    right, mistakes = _losses(scores, labels)
    diagnose(got, right=right, mistakes=mistakes, what=what)
    odd = torch.tensor(
        [[[0.0, 150.0], [40.0, 50.0], [-90.0, 70.0], [1.0, 2.0], [99.0, 0.0]]]
    ) + torch.randn(1, 5, 2)
    # softmax gives 0 for a label 150 below another: its logarithm is lost
    few = torch.tensor([[0, 1, 1, -100, 1]])
    if not close(answer(odd, few), F.cross_entropy(odd[0], few[0])):
        raise Mistake(
            "right for small scores and 4 labels, wrong for large scores and 2: is it"
            " `log_softmax`?"
        )


def _losses(scores: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what mistakes make of it."""
    B, T, C = scores.shape
    # 0 where there is no label
    each = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")
    kept = labels != -100
    rows = torch.stack(
        [F.cross_entropy(s, y) for s, y in zip(scores, labels, strict=True)]
    )
    as_last = -scores.log_softmax(-1).gather(-1, (labels % C)[..., None])[..., 0]
    p_last = -scores.log_softmax(-1).gather(-1, labels.where(kept, C - 1)[..., None])[
        ..., 0
    ]
    shifted = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    mistakes = {
        "you shifted the labels as a language model does: token t is scored on"
        " its own label": shifted,
        "the labels are shifted the other way: token t is scored on its own"
        " label": F.cross_entropy(
            scores[:, 1:].flatten(0, 1), labels[:, :-1].flatten()
        ),
        "you divided by all tokens: the mean is over those that have a"
        " label": each.mean(),
        "you took the sum: the mean is asked": each.sum(),
        "you averaged each row first: every labelled token counts the"
        " same": rows.mean(),
        "tokens without a label are counted as label 0": _with_label(scores, labels, 0),
        "tokens without a label are counted as the last label": p_last.mean(),
        "tokens without a label are counted: −100 % C is a label": as_last.mean(),
        "the sign is wrong: the loss is minus the log-probability": -each.sum()
        / kept.sum(),
        "you divided by the rows: the mean is over labelled tokens": each.sum() / B,
        "the softmax runs over the tokens: it runs over the labels": F.nll_loss(
            scores.log_softmax(1)[kept], labels[kept]
        ),
        "the softmax is missing": F.nll_loss(scores[kept], labels[kept]),
        "the softmax is applied twice": F.cross_entropy(
            scores.softmax(-1)[kept], labels[kept]
        ),
        "that is the median: the mean is asked": F.cross_entropy(
            scores[kept], labels[kept], reduction="none"
        ).median(),
        "you divided by the length of a row: the mean is over labelled tokens": (
            each.sum() / T
        ),
        "tokens without a label still count, as tokens whose scores are all 0": (
            F.cross_entropy(
                (scores * kept[..., None]).flatten(0, 1), labels.clamp(min=0).flatten()
            )
        ),
        "these are squared errors: −log softmax(scores)[label] is asked": (
            (scores[kept].softmax(-1) - F.one_hot(labels[kept], C)).square().mean()
        ),
        "label 0 is a label: only −100 means none": F.cross_entropy(
            scores[labels > 0], labels[labels > 0]
        ),
        "the logarithm is missing: this is minus the mean probability": -(
            scores.softmax(-1)[kept].gather(1, labels[kept][:, None]).mean()
        ),
        "take the logarithm of each probability, then the mean": -(
            scores.softmax(-1)[kept].gather(1, labels[kept][:, None]).mean().log()
        ),
        "all labels are counted, not the right one alone": -(
            scores.log_softmax(-1)[kept].mean()
        ),
        "the labels are smoothed: −log softmax(scores)[label] alone is asked": (
            F.cross_entropy(scores[kept], labels[kept], label_smoothing=0.1)
        ),
        "the loss is in bits: take the natural logarithm": each.sum()
        / kept.sum()
        / torch.log(torch.tensor(2.0)),
    }
    return each.sum() / kept.sum(), mistakes


def _with_label(scores: Tensor, labels: Tensor, label: int) -> Tensor:
    """The loss when tokens without a label get this one."""
    return F.cross_entropy(
        scores.flatten(0, 1), labels.where(labels != -100, label).flatten()
    )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Find for each row the largest place at which the mask is 1; then index"
            " rows and places together."
        ),
        (
            "`torch.arange(T) * mask` holds each token's place, and 0 at padding. Where"
            " is its maximum?"
        ),
        "`scores[torch.arange(B), places]` takes one vector from each row.",
    ),
    grads={"scores": 0},
)
def last_token(answer):
    """The scores at the last real token of each row, with padding on either side."""
    scores = torch.randn(4, 6, 3)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    )
    what = "last_token(scores, mask)"
    value = answer(scores, mask)
    if getattr(value, "shape", None) == (4, 4, 3):
        raise Mistake(
            "every row is read at the places of all rows: index rows and places"
            " together, scores[torch.arange(B), places]"
        )
    got = expect(value, shape=(4, 3), dtype=torch.float32, what=what)
    row, length = torch.arange(4), mask.sum(-1)
    last = torch.tensor([5, 5, 2, 3])
    mean = (scores * mask[..., None]).sum(1) / length[:, None]
    last_place = scores[:, -1]
    mistakes = {
        "you took the last place of each row: on the right there may be"
        " padding": last_place,
        "you counted the tokens: with padding on the left the last one lies"
        " further on": scores[row, length - 1],
        "one too far: places count from 0": scores[row, (last + 1).clamp(max=5)],
        "one too far: the last of n tokens has place n − 1, and padding on the"
        " left moves it": scores[row, length.clamp(max=5)],
        "you took the first real token: it has read nothing": scores[
            row, mask.argmax(-1)
        ],
        "you took the first place of each row": scores[:, 0],
        "you took the mean over the tokens: only the last has read everything": mean,
        "you took the mean over padding too": scores.mean(1),
        "you took the largest score over the tokens": scores.amax(1),
        "you took the largest score over the real tokens: the last one's are asked": (
            scores.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
        ),
        "these are probabilities: scores are asked": scores[row, last].softmax(-1),
        "these are log-probabilities: scores are asked": (
            scores[row, last].log_softmax(-1)
        ),
        "you took the place before the first padding: padding may be on the left": (
            scores[row, mask.argmin(-1) - 1]
        ),
        "you took the sum over the real tokens: only the last has read everything": (
            (scores * mask[..., None]).sum(1)
        ),
        "you took the mean of the last two tokens": (
            scores[row, last] + scores[row, last - 1]
        )
        / 2,
        "you took the token in the middle": scores[
            row, (last + mask.argmax(-1)).div(2, rounding_mode="floor")
        ],
        "rows that end in padding give 0: look for their last token": (
            scores[:, -1] * mask[:, -1:]
        ),
        "you took the last padding": scores[
            row, ((1 - mask) * torch.arange(6)).argmax(-1)
        ],
        "a place counted from the end is used as one from the start": scores[
            row, mask.flip(1).argmax(-1)
        ],
        "you took the token before the last": scores[row, last - 1],
        "you took the last token's scores of row 0 for every row's place": scores[
            0, last
        ],
    }
    diagnose(got, right=scores[row, last], mistakes=mistakes, what=what)
    if not close(got, label_head.last_token(scores, mask)):
        raise Mistake("the reference finds another token")
    single = torch.randn(1, 2, 5)
    if not close(answer(single, torch.tensor([[1, 0]])), single[:, 0]):
        raise Mistake(
            "wrong for one row of one token and one padding: take the sizes from the"
            " arguments"
        )
