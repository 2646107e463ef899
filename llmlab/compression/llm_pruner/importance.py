"""Importance of coupled units: what the loss would grow by without them.

Ma et al. 2023, https://arxiv.org/abs/2305.11627, equations 3 to 5. A weight w that is
set to 0 changes the loss by

    L(w) − L(0)  ≈  g w − ½ H w²

g is the slope of the loss and H its curvature, which is nearly the Fisher information:
the mean of the squared slopes of single texts.

    w    a weight
    g    ∂L/∂w over all texts
    F    mean_j g_j², g_j over text j alone: stands for H

A unit has many weights, in several members. First a score for each row (or column):

    magnitude   Σ_k w_k²
    vector      |Σ_k g_k w_k|              the row moves as one, and terms cancel
    first       Σ_k |g_k w_k|              each weight for itself
    second      Σ_k F_k w_k²
    mix         Σ_k |g_k w_k − ½ F_k w_k²|

then the rows of a unit are summed, and then its members: sum, product, largest, last.

Simplified: as in the authors' code, F is a mean over texts; in the paper it is a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import calibration
from llmlab.compression.dependencies import Group

KINDS = ("magnitude", "vector", "first", "second", "mix")
AGGREGATES = ("sum", "prod", "max", "last")


@dataclass(frozen=True, eq=False)
class Slopes:
    """How the loss depends on one parameter."""

    mean: Float[Tensor, "..."]  # g
    square: Float[Tensor, "..."]  # F


def weight_scores(
    w: Float[Tensor, "..."], slopes: Slopes | None, kind: str
) -> Float[Tensor, "..."]:
    """A score for each weight, which is not negative but for "vector".

    Raises:
        ValueError: no such kind, or it needs slopes and there are none.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {KINDS}")
    w = w.detach().float()
    if kind == "magnitude":
        return w.square()
    if slopes is None:
        raise ValueError(f"slopes=None: kind={kind!r} needs the slopes of the loss")
    first = slopes.mean * w
    second = slopes.square * w.square()
    match kind:
        case "vector":
            return first
        case "first":
            return first.abs()
        case "second":
            return second
    return (first - second / 2).abs()


def axis_scores(
    w: Float[Tensor, "..."], slopes: Slopes | None, kind: str, axis: int
) -> Float[Tensor, "n"]:
    """A score for each row (axis 0) or column (axis 1) of a parameter."""
    scores = weight_scores(w, slopes, kind).movedim(axis, 0)
    return scores.flatten(1).sum(1).abs() if scores.dim() > 1 else scores.abs()


def group_importance(
    parameters: Mapping[str, Tensor],
    slopes: Mapping[str, Slopes],
    group: Group,
    kind: str = "first",
    aggregate: str = "sum",
) -> Float[Tensor, "units"]:
    """What each unit of a group is worth.

    Args:
        parameters: by name, the group's at least.
        slopes: by name; empty does for "magnitude".
        aggregate: of the members. "last": only that in the last linear that ran.
    Raises:
        ValueError: no such kind or aggregate, or slopes are missing.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate={aggregate!r} must be one of {AGGREGATES}")
    found = []
    for member in group.members:
        w = parameters[member.name]
        scores = axis_scores(w, slopes.get(member.name), kind, member.axis)
        found.append(scores[member.index.to(scores.device)].sum(1))  # (units, each) →
    members = torch.stack(found)  # (members, units)
    match aggregate:
        case "sum":
            return members.sum(0)
        case "prod":
            return members.prod(0)
        case "max":
            return members.amax(0)
    return members[-1]


def slopes(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    names: Iterable[str],
) -> dict[str, Slopes]:
    """g and F of some parameters, in float32; each row of a batch is one text.

    The loss is the mean cross-entropy of the next token. No `.grad` is touched.

    Args:
        names: of the parameters.
    Raises:
        ValueError: `batches` is no text, or its rows are of one token; a name is none
            of a parameter's; a slope is not finite.
    """
    batches = calibration.checked(batches)
    if any(batch.shape[1] < 2 for batch in batches):
        raise ValueError("a text of batches has one token: there is none to predict")
    parameters = dict(model.named_parameters())
    chosen = {}
    for name in names:
        if name not in parameters:
            raise ValueError(f"names holds {name!r}: the model has no such parameter")
        chosen[name] = parameters[name]
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}

    def run() -> dict[str, Slopes]:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        try:
            return sums(
                model, [row[None] for batch in batches for row in batch], chosen
            )
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])

    return calibration.in_eval_mode(model, run)


def sums(
    model: nn.Module,
    texts: list[Int[Tensor, "1 seq"]],
    parameters: Mapping[str, Tensor],
) -> dict[str, Slopes]:
    """g and F, one backward pass for each text."""
    found = {}
    for name, parameter in parameters.items():
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        found[name] = Slopes(zeros, zeros.clone())
    for text in texts:
        with torch.enable_grad():
            out = model(text)
            logits = getattr(out, "logits", out)[0, :-1].float()  # (T − 1, V)
            loss = F.cross_entropy(logits, text[0, 1:])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            calibration.check_finite(f"the slope of {name}", grad)
            grad = grad.float()
            found[name].mean.add_(grad, alpha=1 / len(texts))
            found[name].square.addcmul_(grad, grad, value=1 / len(texts))
    return found
