"""Checks of 06-compression/07-llm-qat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression import llm_qat
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/07-llm-qat")


# 1 ------------------------------------------------------------------------------------


def rounded(
    x: Tensor,
    bits: int,
    *,
    top: float | None = None,
    dims: tuple[int, ...] = (-1,),
    size: Callable = torch.abs,
    rounding: Callable = torch.round,
    low: float | None = None,
    clip: float = 1.0,
) -> Tensor:
    """x̂, and what comes out with one thing changed."""
    top = 2 ** (bits - 1) - 1 if top is None else top
    alpha = size(x).amax(dims, keepdim=True) * clip / top
    alpha = torch.where(alpha == 0, 1.0, alpha)
    return rounding(x / alpha).clamp(-top if low is None else low, top) * alpha


def tokens_of(*shape: int) -> Tensor:
    """Activations of tokens of unequal size; the largest are below zero, too."""
    x = torch.randn(*shape)
    return x * torch.linspace(0.3, 3.0, shape[-2])[:, None]


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Two parts: x̂ itself, then a result whose value is x̂ and whose gradient"
            " is that of x."
        ),
        (
            "`x.detach().abs().amax(-1, keepdim=True)` is the largest size in each"
            " token. For the second part, what is the gradient of"
            " `(something).detach()`?"
        ),
        (
            "`x + (x_hat - x).detach()`: the value is x̂, the gradient is 1. Where α"
            " is 0, divide by 1 instead."
        ),
    ),
)
def fake_quantize(answer):
    """Round each token, and let the gradient straight through."""
    what = "fake_quantize(x, 3)"
    x, _ = telling(lambda: (tokens_of(2, 4, 4), 3), rounded, wrong_rounding, tol=1e-4)
    got = expect(
        answer(x.clone().requires_grad_(), 3),
        shape=(2, 4, 4),
        dtype=torch.float32,
        what=what,
    )
    right = rounded(x, 3)
    diagnose(got, right=right, mistakes=wrong_rounding(x, 3), tol=1e-5, what=what)
    gradient(answer, x, 3)
    for shape, bits in (((3, 2, 7), 4), ((1, 5, 6), 8), ((2, 1, 5), 2)):
        x = tokens_of(*shape)
        got = expect(answer(x, bits), shape=shape, what="x̂")
        if not close(got, rounded(x, bits), tol=1e-5):
            raise Mistake(
                f"right for 3 bits, wrong for {bits} bits and shape {shape}: take both"
                " from the arguments"
            )
    x[0, 0] = 0
    got = answer(x, 4)
    if not close(got, rounded(x, 4), tol=1e-5):
        raise Mistake(
            "a token of zeros must come back as zeros: its α would be 0, and 0 / 0 is"
            " NaN"
        )


def wrong_rounding(x: Tensor, bits: int) -> dict[str, Tensor]:
    """What usual mistakes make of x̂."""
    top = 2 ** (bits - 1) - 1
    alpha = x.abs().amax(-1, keepdim=True) / top
    of_mean = x.abs().mean(-1, keepdim=True) / top
    of_largest = x.amax(-1, keepdim=True) / top  # and nothing is clipped
    return {
        "α is one per channel, over the tokens: one per token is asked": rounded(
            x, bits, dims=(-2,)
        ),
        "α is the same for all tokens: each has its own": rounded(x, bits, dims=(1, 2)),
        "α is the same for the whole tensor: each token has its own": rounded(
            x, bits, dims=(0, 1, 2)
        ),
        "the codes go up to 2^(bits − 1): with as many below zero as above they end at"
        " 2^(bits − 1) − 1": rounded(x, bits, top=top + 1),
        "the codes go up to 2^bits − 1: one bit is for the sign": rounded(
            x, bits, top=2 * top + 1
        ),
        "the codes go up to (2^bits − 1) / 2: whole numbers are asked, 2^(bits − 1)"
        " − 1": rounded(x, bits, top=top + 0.5),
        "α comes from the largest value, not from the largest |value|": rounded(
            x, bits, size=torch.clone
        ),
        "α comes from the largest value, where the largest |value| is asked": (
            torch.round(x / of_largest) * of_largest
        ),
        "α comes from the mean |value|: the largest is asked": (
            torch.round(x / of_mean) * of_mean
        ),
        "half of the range is clipped: MinMax clips nothing": rounded(
            x, bits, clip=0.5
        ),
        "these are the codes: multiply them by α": torch.round(x / alpha),
        "you cut off instead of rounding to nearest": rounded(
            x, bits, rounding=torch.trunc
        ),
        "you rounded down: to the nearest is asked": rounded(
            x, bits, rounding=torch.floor, low=-top - 1
        ),
        "nothing is rounded: this is x": x,
        "you multiplied by α and divided by it: the other way round": (
            torch.round(x * alpha) / alpha
        ),
        "the rounded numbers lack their sign": rounded(x, bits).abs(),
    }


def gradient(answer: Callable, x: Tensor, bits: int) -> None:
    """Straight through: what comes from above goes down as it is."""
    upstream = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    out = answer(leaf, bits)
    if not out.requires_grad:
        raise Mistake(
            "the value is right, but no gradient passes: x itself must stay in the sum,"
            " and only the difference be detached"
        )
    (got,) = torch.autograd.grad(out, leaf, upstream)
    top = 2 ** (bits - 1) - 1
    alpha = x.abs().amax(-1, keepdim=True) / top
    leaf = x.clone().requires_grad_()
    step = leaf.abs().amax(-1, keepdim=True) / top
    codes = (leaf / step).round().detach()
    through = (leaf / step - (leaf / step - codes).detach()) * step
    (with_alpha,) = torch.autograd.grad(through, leaf, upstream, retain_graph=True)
    (only_alpha,) = torch.autograd.grad(codes * step, leaf, upstream)
    after_it = upstream + only_alpha
    largest = x.abs() == x.abs().amax(-1, keepdim=True)
    diagnose(
        got,
        right=upstream,
        mistakes={
            "no gradient passes: that of `round` is 0 everywhere, so let x carry it": (
                torch.zeros_like(x)
            ),
            "the gradient runs through α alone: compute α from x.detach(), and let x"
            " carry the gradient": only_alpha,
            "the gradient runs through α, too: compute α from x.detach()": with_alpha,
            "the gradient runs through the α that the codes are multiplied by, too:"
            " compute it from x.detach()": after_it,
            "the largest value of each token gets no gradient: nothing is clipped, so"
            " all get it": upstream.masked_fill(largest, 0),
            "values whose code is the last one get no gradient: nothing is clipped, so"
            " all get it": upstream.masked_fill(codes.abs() == top, 0),
            "the gradient is multiplied by α: it passes as it is": upstream * alpha,
            "the gradient is divided by α: it passes as it is": upstream / alpha,
            "the gradient comes twice: x must carry it once": 2 * upstream,
            "the gradient has the wrong sign": -upstream,
        },
        tol=1e-5,
        what="the gradient of fake_quantize(x, 3)",
    )


# 2 ------------------------------------------------------------------------------------


class Writer:
    """A small language model: the newest two tokens, and the place, decide the next."""

    def __init__(self, vocabulary: int) -> None:
        self.newest = 1.5 * torch.randn(vocabulary, vocabulary)
        self.before = 1.5 * torch.randn(vocabulary, vocabulary)
        self.place = torch.randn(64, vocabulary)
        self.with_grad = False

    def __call__(self, ids: Tensor) -> Tensor:
        self.with_grad |= torch.is_grad_enabled()
        earlier = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
        return self.newest[ids] + self.before[earlier] + self.place[: ids.shape[1]]


def written(
    model: Writer,
    first: Tensor,
    greedy: int,
    length: int,
    seed: int,
    *,
    is_greedy: Callable[[int, int], bool] = lambda made, greedy: made < greedy,
    reads: Callable[[Tensor], Tensor] = lambda ids: ids,
    place: int = -1,
    weights: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(-1),
    draws: Callable[[bool], bool] = lambda greedy: not greedy,
    likeliest: Callable = torch.argmax,
) -> Tensor:
    """The text of exercise 2, and what comes out with one thing changed."""
    dice = torch.Generator().manual_seed(seed)
    ids = first[:, None]
    with torch.no_grad():
        for made in range(length - 1):
            said = model(reads(ids))[:, place]
            by_rule = is_greedy(made, greedy)
            new = likeliest(said, -1)
            if draws(by_rule):
                drawn = torch.multinomial(weights(said), 1, generator=dice)[:, 0]
                new = new if by_rule else drawn
            ids = torch.cat([ids, new[:, None]], dim=1)
    return ids


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "A loop that makes length − 1 tokens. The model reads all tokens so far;"
            " of its logits the last position counts."
        ),
        (
            "Token number `made` (from 0) is greedy while `made < greedy`. The first"
            " token was given, so it does not count."
        ),
        (
            "`torch.multinomial(logits.softmax(-1), 1, generator=generator)` has shape"
            " (B, 1), ready for `torch.cat([ids, new], dim=1)`. All under"
            " `torch.no_grad()`."
        ),
    ),
)
def write_text(answer):
    """The model writes its own training text: some tokens greedy, the rest drawn."""

    def draw() -> tuple:
        return Writer(7), torch.randint(7, (5,)), 4, 11, int(torch.randint(999, (1,)))

    case = telling(draw, written, wrong_texts, tol=1e-4)
    model, first, greedy, length, seed = case
    what = "write_text(model, first, 4, 11, generator)"
    got = asked(answer, model, first, greedy, length, seed, what)
    learners = model.with_grad
    if not torch.equal(got, asked(answer, *case, what)):
        raise Mistake(
            "two calls with generators of the same seed give two texts: hand"
            " `generator` to torch.multinomial"
        )
    mistakes = wrong_texts(*case)
    diagnose_text(got, answer, case, mistakes, what)
    if learners:
        raise Mistake(
            "the model was called with gradients on: text is data, so use"
            " torch.no_grad()"
        )
    for B, greedy, length in ((3, 0, 6), (1, 9, 5), (4, 2, 1)):
        case = Writer(7), torch.randint(7, (B,)), greedy, length, 5
        got = asked(answer, *case, f"greedy={greedy}, length={length}")
        if not torch.equal(got, written(*case)):
            raise Mistake(
                f"right for 4 greedy tokens and length 11, wrong for {greedy} and"
                f" {length}: take both from the arguments"
            )


def diagnose_text(
    got: Tensor, answer: Callable, case: tuple, mistakes: dict, what: str
) -> None:
    """The text against usual mistakes, and against that of another generator."""
    known = [written(*case), *mistakes.values()]
    if not any(torch.equal(got, text) for text in known):
        *same, seed = case
        if torch.equal(got, asked(answer, *same, seed + 1, what)):
            raise Mistake(
                "another generator gives the same text: draw with `generator`, not with"
                " one of your own"
            )
    diagnose(got, right=known[0], mistakes=mistakes, what=what)


def asked(answer, model, first, greedy, length, seed, what) -> Tensor:
    """What the learner's function writes."""
    dice = torch.Generator().manual_seed(seed)
    got = answer(model, first, greedy, length, dice)
    if isinstance(got, Tensor) and got.shape == (len(first), length - 1):
        raise Mistake(
            "one token is missing: the first one counts as part of the text, and"
            f" {length} tokens are asked"
        )
    if isinstance(got, Tensor) and got.shape == (len(first), length + 1):
        raise Mistake(
            f"one token too many: {length} are asked, the first one among them"
        )
    return expect(got, shape=(len(first), length), dtype=torch.int64, what=what)


def wrong_texts(model, first, greedy, length, seed) -> dict[str, Tensor]:
    """What usual mistakes write."""

    def but(**changes) -> Tensor:
        return written(model, first, greedy, length, seed, **changes)

    return {
        "one greedy token too few: the first token was given and does not count": but(
            is_greedy=lambda made, n: made < n - 1
        ),
        "one greedy token too many": but(is_greedy=lambda made, n: made <= n),
        "all tokens are greedy: only the first `greedy` are": but(
            is_greedy=lambda made, n: True
        ),
        "no token is greedy: the first `greedy` are": but(
            is_greedy=lambda made, n: False
        ),
        "drawn first and greedy after that: the other way round": but(
            is_greedy=lambda made, n: made >= n
        ),
        "the model reads the newest token alone: it needs all tokens so far": but(
            reads=lambda ids: ids[:, -1:]
        ),
        "the model reads the newest two tokens alone: it needs all tokens so far": but(
            reads=lambda ids: ids[:, -2:]
        ),
        "greedy steps take the unlikeliest token": but(likeliest=torch.argmin),
        "you used the logits of the first position: the last one predicts the next"
        " token": but(place=0),
        "the text starts after the first token: that is a part of it, at its start": (
            written(model, first, greedy, length + 1, seed)[:, 1:]
        ),
        "the drawn tokens are others: greedy steps drew, too, and threw it away, which"
        " moves the generator": but(draws=lambda greedy: True),
        "every token has the same chance: draw by the softmax of the logits": but(
            weights=torch.ones_like
        ),
        "the softmax has a minus: likely tokens come least": but(
            weights=lambda said: (-said).softmax(-1)
        ),
        "the softmax is taken twice": but(
            weights=lambda said: said.softmax(-1).softmax(-1)
        ),
        "the softmax runs over the texts: over the vocabulary is asked": but(
            weights=lambda said: said.softmax(0)
        ),
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Probabilities of the teacher, log-probabilities of the student, both over"
            " the vocabulary."
        ),
        "Sum over the vocabulary, then the mean over texts and positions.",
        (
            "`-(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1)` is one"
            " number for each position."
        ),
    ),
    grads={"student": 0},
)
def soft_label_loss(answer):
    """The teacher's whole distribution is the label, at every position."""
    what = "soft_label_loss(student, teacher)"

    def draw() -> tuple[Tensor, Tensor]:
        return 2 * torch.randn(2, 4, 6), 2 * torch.randn(2, 4, 6)

    student, teacher = telling(draw, llm_qat.soft_label_loss, wrong_losses, tol=1e-4)
    leaf = student.clone().requires_grad_()
    label = teacher.clone().requires_grad_()
    loss = expect(answer(leaf, label), shape=(), dtype=torch.float32, what=what)
    right = llm_qat.soft_label_loss(student, teacher)
    diagnose(loss, right=right, mistakes=wrong_losses(student, teacher), what=what)
    if loss.requires_grad:
        (to_teacher,) = torch.autograd.grad(
            loss, label, retain_graph=True, allow_unused=True
        )
        if to_teacher is not None and to_teacher.any():
            raise Mistake("the gradient reaches the teacher, too: detach its logits")
    for shape in ((1, 3, 5), (3, 2, 9), (2, 1, 4)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        got = answer(student, teacher)
        if not close(got, llm_qat.soft_label_loss(student, teacher), tol=1e-5):
            raise Mistake(
                f"right for shape (2, 4, 6), wrong for {shape}: take the sizes from the"
                " arguments"
            )
    student = torch.tensor([[[300.0, 0.0, -300.0]]])
    got = expect(answer(student, student.flip(-1)), shape=(), what=what, finite=False)
    if not close(got, torch.tensor(600.0), tol=1e-4):
        raise Mistake(
            "logits far apart come out wrong: the log of a softmax is −∞ there, or what"
            " was added to it; take log_softmax of the student as it is"
        )


def wrong_losses(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """What usual mistakes give for the loss."""
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    each = -(p * log_q).sum(-1)  # (B, T)
    B, T, V = student.shape
    late = -(p[:, 1:] * log_q[:, :-1]).sum(-1)
    early = -(p[:, :-1] * log_q[:, 1:]).sum(-1)
    hard = -log_q.gather(-1, teacher.argmax(-1, keepdim=True))
    swapped = -(student.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    entropy = -(p * teacher.log_softmax(-1)).sum(-1)
    return {
        "the labels are shifted by one: both models have read the same tokens, so"
        " position t has its label at position t": late.mean(),
        "the labels are shifted by one, the other way: position t has its label at"
        " position t": early.mean(),
        "the last position is left out: it has a label, too": each[:, :-1].mean(),
        "the first position is left out: it has a label, too": each[:, 1:].mean(),
        "this is the mean over the vocabulary: its sum is asked": each.mean() / V,
        "this is the sum over all positions: their mean is asked": each.sum(),
        "this is the sum over positions and the mean over texts (`batchmean`): the"
        " mean over both is asked": each.sum() / B,
        "this is the sum over texts and the mean over positions: the mean over both is"
        " asked": each.sum() / T,
        "the teacher's likeliest token is the label: its whole distribution is asked": (
            hard.mean()
        ),
        "student and teacher are swapped: the teacher gives the probabilities": (
            swapped.mean()
        ),
        "this is the Kullback-Leibler divergence, less by the teacher's entropy: the"
        " cross-entropy is asked": (each - entropy).mean(),
        "this is the Kullback-Leibler divergence, with `batchmean`, which sums over"
        " positions: the cross-entropy is asked, and its mean over both": (
            (each - entropy).sum() / B
        ),
        "this is KL(p_S‖p_T), the other way round: −Σ p_T log p_S is asked": (
            -(student.softmax(-1) * (teacher.log_softmax(-1) - log_q)).sum(-1).mean()
        ),
        "this is the squared difference of the probabilities": (
            (student.softmax(-1) - p).square().mean()
        ),
        "the teacher's log-probabilities are the weights: its probabilities are": (
            -(teacher.log_softmax(-1) * log_q).sum(-1).mean()
        ),
        "`cross_entropy` takes dimension 1 for the vocabulary, and here it is the"
        " positions": torch.nn.functional.cross_entropy(student, p),
        "the minus is missing": -each.mean(),
        "the logits stand in for log-probabilities: take log_softmax": (
            -(p * student).sum(-1).mean()
        ),
        "the teacher's logits stand in for probabilities: take their softmax": (
            -(teacher * log_q).sum(-1).mean()
        ),
        "the softmax runs over the positions: over the vocabulary is asked": (
            -(teacher.softmax(1) * student.log_softmax(1)).sum(-1).mean()
        ),
        "this is the squared difference of the logits": (
            (student - teacher).square().mean()
        ),
    }


# 4 ------------------------------------------------------------------------------------

Store = tuple[Tensor, Tensor, Tensor]  # codes, alpha, k_hat


def appended(
    codes: Tensor,
    alpha: Tensor,
    k: Tensor,
    bits: int,
    *,
    top: int | None = None,
    shared: tuple[int, ...] = (1, 3),
    size: Callable = torch.abs,
    rounding: Callable = torch.round,
    stored: Callable = torch.Tensor.half,
    codes_by: Callable = lambda exact, kept: kept,
    order: int = 1,
) -> Store:
    """What exercise 4 gives, and what comes out with one thing changed."""
    top = 2 ** (bits - 1) - 1 if top is None else top
    exact = size(k).amax(shared, keepdim=True) / top
    exact = torch.where(exact == 0, 1.0, exact)
    kept = stored(exact)
    by = codes_by(exact, kept).float()
    limit = 2 ** (bits - 1) - 1
    new = rounding(k / by).clamp(-limit - 1, limit).to(torch.int8)
    B, K, T, D = k.shape
    before = codes.float() * alpha.float()[:, None, :, None]
    k_hat = torch.cat([before, new.float() * kept.float()][::order], dim=2)
    codes = torch.cat([codes, new][::order], dim=2)
    one_each = kept.expand(B, K, T, D)[:, 0, :, 0]  # (B, T)
    alpha = torch.cat([alpha.to(kept.dtype), one_each][::order], dim=1)
    return codes, alpha, k_hat


def filled(B: int, K: int, S: int, T: int, D: int, bits: int) -> tuple:
    """S tokens in the cache, and T new ones of unequal size."""
    k = torch.randn(B, K, S + T, D) * torch.linspace(3.0, 0.4, S + T)[:, None]
    # from token to token another head has the largest
    turn = (torch.arange(K)[:, None] + torch.arange(S + T)) % K
    k = k * torch.linspace(1.0, 0.3, K)[turn][:, :, None]
    k[0] *= 1.7
    empty = torch.zeros(B, K, 0, D, dtype=torch.int8), torch.zeros(B, 0).half()
    codes, alpha, _ = appended(*empty, k[:, :, :S], bits)
    return codes, alpha, k[:, :, S:], bits


@check.exercise(
    points=4,
    minutes=20,
    difficulty=4,
    importance=4,
    hints=(
        (
            "Four steps: α of each new token, rounded to float16; their codes; both"
            " joined to what is there; codes times α."
        ),
        (
            "k is (B, K, T, D), and a token's α covers heads and channels:"
            " `k.abs().amax((1, 3), keepdim=True)` is (B, 1, T, 1). Divide by the α"
            " that is stored, as that is the one that will be multiplied."
        ),
        (
            "Codes are joined along dim 2, α along dim 1. For the product α needs two"
            " more dimensions: `alpha[:, None, :, None]`. Where α is 0, store 1."
        ),
    ),
)
def append(answer):
    """New keys go into a cache of codes, and all keys come out again."""
    what = "append(codes, alpha, k, 8)"

    def keys(*case) -> Tensor:
        return appended(*case)[2]

    case = telling(lambda: filled(2, 3, 3, 4, 5, 8), keys, wrong_keys, tol=1e-4)
    codes, alpha, k_hat = three(answer(*case), (2, 3, 7, 5), what)
    right = appended(*case)
    diagnose(
        k_hat, right=right[2], mistakes=wrong_keys(*case), tol=1e-5, what="the keys"
    )
    if not torch.equal(codes, right[0]) or not torch.equal(alpha, right[1]):
        raise Mistake(
            "the keys are right, but not what is stored: the cache must give them back"
            " from codes and α alone"
        )
    kept_as_they_are(answer)
    one_by_one(answer)
    for sizes in ((1, 2, 0, 3, 4, 4), (3, 1, 5, 1, 6, 3), (2, 2, 1, 2, 3, 2)):
        case = filled(*sizes)
        B, K, S, T, D, bits = sizes
        _, _, k_hat = three(answer(*case), (B, K, S + T, D), "append")
        if not close(k_hat, keys(*case), tol=1e-5):
            raise Mistake(
                f"right for 8 bits and 3 tokens in the cache, wrong for {bits} bits and"
                f" {S} tokens in it: take both from the arguments"
            )
    codes, alpha, k, bits = filled(2, 2, 1, 2, 4, 4)
    k[:, :, 1] = 0
    _, kept, k_hat = three(answer(codes, alpha, k, bits), (2, 2, 3, 4), "append")
    if not close(k_hat, keys(codes, alpha, k, bits), tol=1e-5) or (kept == 0).any():
        raise Mistake(
            "a token of zeros must come back as zeros, with an α of 1: 0 / 0 is NaN"
        )
    if (kept[:, 2] != 1).any():
        raise Mistake(
            f"a token of zeros is stored with an α of {kept[0, 2]:.2g}: it is to be 1"
        )


def three(got, shape: tuple[int, ...], what: str) -> Store:
    """The three tensors of an answer, of the right shapes and types."""
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Mistake(f"{what} must return three tensors: codes, alpha and k_hat")
    B, K, S, _ = shape

    def keeps_heads(value: Tensor) -> bool:
        return value.shape[1] == K

    codes, alpha, k_hat = got
    if (
        isinstance(codes, Tensor)
        and codes.dim() == 4
        and codes.shape[2] < S
        and keeps_heads(codes)
    ):
        raise Mistake("the cache holds the new tokens alone: the old ones must stay")
    if isinstance(alpha, Tensor) and alpha.dtype == torch.float32:
        raise Mistake("alpha is stored in float32: float16 is asked, 2 bytes a token")
    if (
        isinstance(k_hat, Tensor)
        and k_hat.dim() == 4
        and k_hat.shape[2] < S
        and keeps_heads(k_hat)
    ):
        raise Mistake(
            "k_hat holds the new keys alone: all keys are asked, the old ones in front"
        )
    codes = expect(codes, shape=shape, dtype=torch.int8, what="codes")
    alpha = expect(alpha, shape=(B, S), dtype=torch.float16, what="alpha")
    return codes, alpha, expect(k_hat, shape=shape, dtype=torch.float32, what="k_hat")


def kept_as_they_are(answer: Callable) -> None:
    """What is stored already stays, also where its codes do not reach the last one."""
    codes, alpha, k, bits = filled(2, 2, 3, 2, 4, 8)
    codes = codes // 2
    now, steps, _ = three(answer(codes, alpha, k, bits), (2, 2, 5, 4), "append")
    if not (torch.equal(now[:, :, :3], codes) and torch.equal(steps[:, :3], alpha)):
        raise Mistake(
            "the keys in the cache were rounded once more: their codes and α stay, the"
            " new ones are joined to them"
        )


def one_by_one(answer: Callable) -> None:
    """A prompt at once gives what its tokens give one after the other."""
    codes, alpha, k, bits = filled(2, 3, 0, 5, 4, 4)
    whole = answer(codes, alpha, k, bits)[2]
    for t in range(5):
        codes, alpha, k_hat = answer(codes, alpha, k[:, :, t : t + 1], bits)
    if not close(whole, k_hat, tol=1e-6):
        raise Mistake("five tokens at once and one by one must give the same keys")


def wrong_keys(codes: Tensor, alpha: Tensor, k: Tensor, bits: int) -> dict[str, Tensor]:
    """What usual mistakes give back."""

    def but(**changes) -> Tensor:
        return appended(codes, alpha, k, bits, **changes)[2]

    right = but()
    S = alpha.shape[1]
    newest = right.clone()
    _, steps, _ = appended(codes, alpha, k, bits)
    newest[:, :, :S] = codes.float() * steps[:, -1, None, None, None].float()
    exact = right.clone()
    exact[:, :, S:] = k
    unrounded = right.clone()
    step = k.abs().amax((1, 3), keepdim=True) / (2 ** (bits - 1) - 1)
    unrounded[:, :, S:] = torch.round(k / step.half().float()) * step
    return {
        "all new tokens share one α: each token has its own, or a prompt would differ"
        " from its tokens one by one": but(shared=(1, 2, 3)),
        "α comes from the first head alone: from all heads is asked": but(
            size=lambda k: k[:, :1].abs()
        ),
        "α comes from the last head alone: from all heads is asked": but(
            size=lambda k: k[:, -1:].abs()
        ),
        "α comes from the mean of what the heads have: from the largest is asked": but(
            size=lambda k: k.abs().amax(3, keepdim=True).mean(1, keepdim=True)
        ),
        "all texts of the batch share an α: each has its own": but(shared=(0, 1, 3)),
        "each head has its own α: one per token is asked, over all heads": but(
            shared=(3,)
        ),
        "α is one per channel, over the tokens: one per token is asked": but(
            shared=(1, 2)
        ),
        "the codes go up to 2^(bits − 1): they end at 2^(bits − 1) − 1": but(
            top=2 ** (bits - 1)
        ),
        "α is half as large as it must be: the codes end at 2^(bits − 1) − 1, as one"
        " bit is for the sign": but(top=2**bits - 1),
        "α comes from the largest value, not from the largest |value|": but(
            size=torch.clone
        ),
        "α was rounded to float16 only after the codes and the keys were made: the"
        " cache holds the rounded one": but(stored=torch.clone),
        "the keys come from α before it was rounded to float16: the cache holds the"
        " rounded one": unrounded,
        "the codes are made with α before it was rounded to float16: divide by the one"
        " that is stored": but(codes_by=lambda exact, kept: exact),
        "the new tokens stand before the old ones": but(order=-1),
        "you cut off instead of rounding to nearest": but(rounding=torch.trunc),
        "you rounded down: to the nearest is asked": but(rounding=torch.floor),
        "the new keys come back as they were: they must pass through their codes, or"
        " the next step will see other ones": exact,
        "the old tokens get the α of the newest one: each keeps its own": newest,
        "α is missing: the keys are codes times α": (
            appended(codes, alpha, k, bits)[0].float()
        ),
    }
