"""What marks the exercises of 04-peft/09-mam-and-unipelt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("04-peft/09-mam-and-unipelt")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Beside, not after: the MLP and the bottleneck both read x, and their"
            " outputs are added."
        ),
        (
            "The bottleneck is relu(x @ down.T) @ up.T, with (m, d) going down and (d,"
            " m) going up."
        ),
        (
            "mlp(x) + s * relu(x @ down.T) @ up.T; no residual of its own, since the"
            " block adds the stream later."
        ),
    ),
    grads={"x": 0, "down": 2, "up": 3},
)
def parallel(answer):
    """What an MLP gives with a scaled parallel adapter beside it."""
    x, W = torch.randn(2, 5, 8), torch.randn(8, 8)
    down, up, s, what = torch.randn(3, 8), torch.randn(8, 3), 2.5, "parallel(…)"
    mlp = lambda t: torch.tanh(t @ W)  # noqa: E731
    got = expect(
        answer(x, mlp, down, up, s), shape=(2, 5, 8), dtype=torch.float32, what=what
    )
    m, low = mlp(x), torch.relu(x @ down.T) @ up.T
    after = torch.relu(m @ down.T) @ up.T
    mistakes = {
        "the adapter reads the MLP's output: beside means that it reads x": (
            m + s * after
        ),
        "the adapter reads the MLP's output, and the scale is missing": m + after,
        "the scale is missing: the adapter's output is multiplied by s": m + low,
        "the MLP's output is scaled too: s belongs to the adapter alone": s * (m + low),
        "the scale is on the wrong path: it multiplies the adapter's output": (
            s * m + low
        ),
        "the scale is applied twice": m + s * s * low,
        "x is added as well: the block adds the stream itself": x + m + s * low,
        "the MLP is missing": s * low,
        "the adapter is missing": m,
        "the activation is missing": m + s * x @ down.T @ up.T,
        "the activation is in the wrong place: it comes between the two matrices": (
            m + s * torch.relu(x @ down.T @ up.T)
        ),
        "the adapter's output is divided by s": m + low / s,
        "s is given: it need not be the paper's 4": m + 4 * low,
        "the activation is another one: relu is asked": (
            m + s * F.gelu(x @ down.T) @ up.T
        ),
        "the activation is another one, silu: relu is asked": (
            m + s * F.silu(x @ down.T) @ up.T
        ),
        "the activation is another one, tanh: relu is asked": (
            m + s * torch.tanh(x @ down.T) @ up.T
        ),
        "the adapter's output is subtracted: it is added": m - s * low,
        "relu is taken of the sum, too: it stands between the adapter's matrices": (
            torch.relu(m + s * low)
        ),
        "the two outputs are multiplied: they are added": m * (s * low),
        "the MLP's input is scaled: s multiplies the adapter's output": (
            mlp(s * x) + s * low
        ),
        "the MLP reads what the adapter gives: beside means that it reads x": (
            mlp(x + s * low)
        ),
        "the MLP reads the adapter's output alone: beside means that it reads x": (
            mlp(s * low)
        ),
        "s is the whole scale: it is not divided by m": m + s / 3 * low,
    }
    terms = [{"the MLP's output": m, "the adapter's output": s * low}]
    diagnose(
        got, right=m + s * low, mistakes=mistakes, tol=1e-4, terms=terms, what=what
    )
    if not close(answer(x[0], mlp, down, torch.zeros_like(up), s), m[0]):
        raise Mistake("with up at zero, the start, the MLP's own output must come back")


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Attention over [P_K; K] is one softmax. λ is the part of its weight that"
            " lies on the prefix."
        ),
        (
            "Scores are q · k / √D over p + S keys; exponentiate them, and divide the"
            " prefix's sum by the whole sum."
        ),
        (
            "torch.softmax(q @ cat([P, K]).T / √D, -1) gives all weights; sum its first"
            " p columns."
        ),
    ),
)
def prefix_share(answer):
    """λ: the share of a query's attention that a prefix takes."""
    q, P, K = torch.randn(5, 8), torch.randn(3, 8), torch.randn(7, 8)
    got = expect(
        answer(q, P, K), shape=(5,), dtype=torch.float32, what="prefix_share(q, P, K)"
    )
    a, b = q @ P.T / 8**0.5, q @ K.T / 8**0.5
    right = torch.softmax(torch.cat([a, b], 1), 1)[:, :3].sum(1)
    raw = torch.softmax(torch.cat([a, b], 1) * 8**0.5, 1)
    logs = torch.cat([a, b], 1)
    mistakes = {
        "the scores are not divided by √D, D being the width of a key": (
            raw[:, :3].sum(1)
        ),
        "the scores are divided by D, not by √D": (
            torch.softmax(logs / 8**0.5, 1)[:, :3].sum(1)
        ),
        "that is 1 − λ, the share of the real keys": 1 - right,
        "that is the share of the last keys: the prefix comes first, or take"
        " it from its own scores": (torch.softmax(logs, 1)[:, -3:].sum(1)),
        "that is the ratio of prefix to keys: divide by the sum over both": (
            right / (1 - right)
        ),
        "that is the mean weight of a prefix token: λ is their sum": right / 3,
        "only the first prefix token is counted": torch.softmax(logs, 1)[:, 0],
        "the exponentials are missing: λ comes from softmax weights": (
            a.sum(1) / logs.sum(1)
        ),
        "the softmax runs over the queries: each query has its own": (
            torch.softmax(logs, 0)[:, :3].sum(1)
        ),
        "p / (p + S) is the share only if all scores are equal": torch.full((5,), 0.3),
        "a softmax over the prefix alone always sums to 1": torch.ones(5),
        "prefix and keys had a softmax each: one over both is asked": (
            torch.full((5,), 0.5)
        ),
        "the largest score is taken off each part by itself: take the same off both": (
            _share(_own(a), _own(b))
        ),
        "you compared means: with p + S keys in one softmax, their sums count": (
            right / 3 / (right / 3 + (1 - right) / 7)
        ),
        "that is the largest weight of a prefix token: λ is the sum of all": (
            torch.softmax(logs, 1)[:, :3].amax(1)
        ),
        "the last prefix token is left out of the sum": (
            torch.softmax(logs, 1)[:, :2].sum(1)
        ),
        "you compared the largest scores alone: all keys count, by their exp": (
            torch.sigmoid(a.amax(1) - b.amax(1))
        ),
        "you compared mean scores: all keys count, by their exponentials": (
            torch.sigmoid(a.mean(1) - b.mean(1))
        ),
        "you divided by √p: D is the width of a key": (
            torch.softmax(logs * 8**0.5 / 3**0.5, 1)[:, :3].sum(1)
        ),
    }
    diagnose(got, right=right, mistakes=mistakes, what="prefix_share(q, P, K)")
    sizes = torch.tensor([1.0, 50, 400, 900, 3])[:, None]
    large = torch.softmax(sizes * logs, 1)[:, :3].sum(1)
    if not close(answer(sizes * q, P, K), large):
        raise Mistake(
            "right for small scores, wrong for scores of several hundred, or for"
            " queries of different sizes: exp overflows, or gives 0 / 0. Take each"
            " query's largest score off first"
        )
    V, P_V = torch.randn(7, 8), torch.randn(3, 8)  # the oracle: He et al.'s equation 7
    lam = answer(q, P, K)[:, None]
    parts = (1 - lam) * (torch.softmax(b, 1) @ V) + lam * (torch.softmax(a, 1) @ P_V)
    whole = F.scaled_dot_product_attention(
        q[None], torch.cat([P, K])[None], torch.cat([P_V, V])[None]
    )[0]
    if not close(parts, whole, tol=1e-4):
        raise Mistake(
            "(1 − λ) · attention + λ · prefix attention must be attention over both"
            " together"
        )


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "First σ(w · x + b) at each token; only then the mean. Padding must count"
            " neither above nor below the line."
        ),
        (
            "g = torch.sigmoid(x @ w + b) is (n, seq); mask is 1 at real tokens. Sum g"
            " · mask, divide by the sum of the mask."
        ),
        (
            "Keys and values are (n, heads, p, D): a g of shape (n,) must become (n, 1,"
            " 1, 1) before it multiplies them."
        ),
    ),
    grads={"x": 0, "w": 1, "b": 2, "P_K": 4, "P_V": 5},
)
def gated_prefix(answer):
    """A prefix's keys and values behind a gate that the input opens."""
    x, w, b, mask = (
        torch.randn(3, 6, 8),
        torch.randn(8),
        torch.tensor(0.4),
        torch.ones(3, 6),
    )
    mask[1, 4:], mask[2, :3] = 0, 0
    P_K, P_V, what = torch.randn(2, 4, 5), torch.randn(2, 4, 5), "gated_prefix(…)"
    K, V = _pair(answer(x, w, b, mask, P_K, P_V))
    right, mistakes = _gated(x, w, b, mask, P_K, P_V)
    diagnose(
        torch.stack([K, V]),
        right=right,
        mistakes=mistakes,
        what=what,
        parts={"your tensor of keys": 0, "your tensor of values": 1},
    )
    K, V = _pair(answer(x, torch.zeros(8), torch.tensor(0.0), mask, P_K, P_V))
    if not (
        close(K, P_K.expand(3, -1, -1, -1) / 2)
        and close(V, P_V.expand(3, -1, -1, -1) / 2)
    ):
        raise Mistake(
            "with w and b at zero every gate is 1/2, however long a row's padding is"
        )


def _gated(x, w, b, mask, P_K, P_V) -> tuple[Tensor, dict[str, Tensor]]:
    """The gated keys and values, and what mistakes make of them."""
    s, shape = torch.sigmoid(x @ w + b), (3, 1, 1, 1)
    real = mask.sum(1)

    def made(g, h=None):
        h = g if h is None else h
        return torch.stack([g.reshape(shape) * P_K, h.reshape(shape) * P_V])

    g, one = (s * mask).sum(1) / real, torch.ones(3)
    mistakes = {
        "padding is counted: only tokens with mask 1 belong to the mean": made(
            s.mean(1)
        ),
        "padding still counts, as σ(b): leave it out of the mean, zeroing x is"
        " not enough": made(torch.sigmoid((x * mask[..., None]) @ w + b).mean(1)),
        "padding still adds σ(b): leave it out of the sum, zeroing x is not enough": (
            made(torch.sigmoid((x * mask[..., None]) @ w + b).sum(1) / real)
        ),
        "the sum is divided by the whole length: divide by the number of real tokens": (
            made((s * mask).mean(1))
        ),
        "the mean comes before the sigmoid: take σ at each token, then the mean": made(
            torch.sigmoid(((x @ w + b) * mask).sum(1) / real)
        ),
        "the sigmoid is missing": made(((x @ w + b) * mask).sum(1) / real),
        "b is missing": made((torch.sigmoid(x @ w) * mask).sum(1) / real),
        "only the keys are gated: the gate scales both": made(g, one),
        "only the values are gated: the gate scales both": made(one, g),
        "that is 1 − g: an open gate lets the prefix through": made(1 - g),
        "the gate is not used": made(one),
        "keys and values are swapped": made(g).flip(0),
        "the mean runs over the batch too: each row has its own gate": made(
            (s * mask).sum() / mask.sum() * one
        ),
        "only the last token opens the gate: take the mean over all real ones": made(
            s[:, -1]
        ),
        "only the first token opens the gate: take the mean over all real ones": made(
            s[:, 0]
        ),
        "the gates are summed, not averaged": made((s * mask).sum(1)),
        "padding counts as σ(0) = ½ in the sum: mask after the sigmoid": made(
            torch.sigmoid((x @ w + b) * mask).sum(1) / real
        ),
        "padding counts as σ(0) = ½ in the mean: mask after the sigmoid": made(
            torch.sigmoid((x @ w + b) * mask).mean(1)
        ),
        "only the last real token opens the gate: take the mean over all": made(
            s[torch.arange(3), (mask * torch.arange(6)).argmax(1)]
        ),
        "padding may be on the left: the first n tokens are not the real ones": made(
            torch.stack([s[i, : int(n)].mean() for i, n in enumerate(real)])
        ),
        "every row is divided by the same count: by its own real tokens": made(
            (s * mask).sum(1) / real.mean()
        ),
        "only the widest gate counts: take the mean over the real tokens": made(
            (s * mask).amax(1)
        ),
        "b stands outside the sigmoid: σ(w · x + b)": made(
            ((torch.sigmoid(x @ w) + b) * mask).sum(1) / real
        ),
        "b is subtracted: it is added": made(
            (torch.sigmoid(x @ w - b) * mask).sum(1) / real
        ),
        "that is a softmax over the tokens: each has a sigmoid of its own": made(
            ((x @ w + b).softmax(1) * mask).sum(1)
        ),
        "the gate is squared in the values: once is enough": made(g, g * g),
        "the gate is squared: once is enough": made(g * g),
        "that is tanh, where a sigmoid is asked": made(
            (torch.tanh(x @ w + b) * mask).sum(1) / real
        ),
    }
    return made(g), mistakes


def _own(scores: Tensor) -> Tensor:
    """Scores less the largest of their row."""
    return scores - scores.amax(1, keepdim=True)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """The share of exp(a) in each row."""
    return a.exp().sum(1) / (a.exp().sum(1) + b.exp().sum(1))


def _pair(value: object) -> tuple[torch.Tensor, torch.Tensor]:
    pair = expect(value, kind=(tuple, list), what="gated_prefix(…)")
    if len(pair) != 2:
        raise Mistake(
            f"gated_prefix returned {len(pair)} things: return keys and values"
        )
    K = expect(pair[0], shape=(3, 2, 4, 5), dtype=torch.float32, what="the keys")
    return K, expect(
        pair[1], shape=(3, 2, 4, 5), dtype=torch.float32, what="the values"
    )
