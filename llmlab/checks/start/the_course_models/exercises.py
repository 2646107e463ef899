"""What marks the exercises of 01-start/02-the-course-models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlab.checks.start.the_course_models.models import (
    Reader,
    losses_from,
    nll_of,
    over,
    pair_counts,
    reference,
    tiny_model,
)
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.models import language_model

check = Checks("01-start/02-the-course-models")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "The logits at place t speak about the token at t + 1. Which logits have no"
            " token to speak about, and which token has no logits?"
        ),
        (
            "Drop the last logits and the first token, and drop the first column of the"
            " mask with it: the mask belongs to the token that is predicted."
        ),
        (
            "`F.cross_entropy(…, reduction='none')` wants the vocabulary in dimension"
            " 1: give it logits[:, :-1].transpose(1, 2) and tokens[:, 1:]. Then weigh"
            " with the mask, sum, and divide by the number of ones that you used."
        ),
    ),
    grads={"logits": 0},
)
def next_token_loss(answer):
    """The mean loss of predicting each next token, over those that a mask counts."""
    logits = 2 * torch.randn(2, 7, 5)
    tokens = torch.randint(5, (2, 7))
    tokens[0, 2] = tokens[1, 5] = 0  # a token like any other
    # 3 and 2 targets; a first token never is one
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1, 1]])
    logits.requires_grad_()
    got = expect(
        answer(logits, tokens, mask),
        shape=(),
        dtype=torch.float32,
        what="next_token_loss(…)",
    )
    nll = nll_of(logits[:, :-1], tokens[:, 1:]).detach()
    right = language_model.next_token_loss(logits, tokens, mask)
    mistakes = _wrong_means(logits, tokens, mask)
    diagnose(got, right=right.detach(), mistakes=mistakes, what="next_token_loss(…)")
    if not got.requires_grad:
        raise Mistake(
            "the loss has no gradient: keep to torch's operations, without .item(),"
            " .detach() or torch.no_grad()"
        )
    if not close(
        torch.autograd.grad(got, logits)[0], torch.autograd.grad(right, logits)[0]
    ):
        raise Mistake(
            "the value is right, its gradient with respect to the logits is not"
        )
    if not close(
        answer(logits[:1, :4], tokens[:1, :4], mask[:1, :4]).detach(),
        over(nll[:1, :3], mask[:1, 1:4]),
    ):
        raise Mistake(
            "right for 2 rows of 7 tokens, wrong for 1 row of 4: take the sizes from"
            " the arguments"
        )
    far = torch.full((1, 3, 5), -200.0)
    far[0, :, 2] = 0.0  # −log p of the others is 200: their p is 0 in float32
    if not close(
        answer(far, torch.tensor([[1, 4, 2]]), torch.ones(1, 3).long()), 100.0
    ):
        raise Mistake(
            "right for small logits, wrong for some that lie 200 apart: exp gives 0"
            " there, and its logarithm −∞. Is it `log_softmax` or `cross_entropy`?"
        )


def _wrong_means(logits: Tensor, tokens: Tensor, mask: Tensor) -> dict:
    """The losses that usual mistakes give."""
    nll = nll_of(logits[:, :-1], tokens[:, 1:]).detach()
    m = mask[:, 1:]
    backwards = nll_of(logits[:, 1:], tokens[:, :-1]).detach()
    same = nll_of(logits, tokens).detach()
    p = (-nll).exp()
    total = (nll * m).sum()
    rows = (nll * m).sum(1) / m.sum(1)
    scores = logits[:, :-1].detach().gather(-1, tokens[:, 1:, None])[..., 0]
    return {
        (
            "there is no shift: the logits at t predict the token at t + 1, not the one"
            " at t"
        ): over(same, mask),
        "there is no shift: compare logits[:, :-1] with tokens[:, 1:]": over(
            same[:, 1:], m
        ),
        "you shifted the wrong way: that is logits at t + 1 against the token at t": (
            over(backwards, mask[:, :-1])
        ),
        "you shifted the wrong way: the logits come first, the token after them": over(
            backwards, m
        ),
        (
            "the mask must be shifted with the tokens: it marks what is predicted, not"
            " where it is predicted from"
        ): over(nll, mask[:, :-1]),
        "the mask is upside down: 1 counts, 0 does not": over(nll, 1 - m),
        "the mask is not used": nll.mean(),
        "you divide by all places: divide by the number that the mask counts": (
            (nll * m).mean()
        ),
        (
            "you divide by all places of tokens: divide by the number that the mask"
            " counts"
        ): total / mask.numel(),
        (
            "you divide by mask.sum(), which counts the first tokens too; they are"
            " never predicted"
        ): total / mask.sum(),
        (
            "you average each row first: every counted token weighs the same, whatever"
            " its row"
        ): rows.mean(),
        "that is the sum: divide by the number of counted tokens": total,
        "hidden places still count, as those whose logits are all 0": nll_of(
            logits[:, :-1].detach() * m[..., None], tokens[:, 1:]
        ).mean(),
        "the last logits of a row are scored on its first token (roll wraps round)": (
            over(nll_of(logits.detach(), tokens.roll(-1, 1)), mask.roll(-1, 1))
        ),
        "the last logits of a row are scored on the first token of the next row: shift"
        " before you flatten": over(
            nll_of(
                logits.detach().flatten(0, 1)[None, :-1], tokens.flatten()[None, 1:]
            ),
            mask.flatten()[None, 1:],
        ),
        "only the first row is counted: all rows together": over(nll[:1], m[:1]),
        "that is the largest loss: the mean is asked": (nll * m).max(),
        "the softmax runs over the places: it runs over the vocabulary": over(
            -logits[:, :-1]
            .detach()
            .log_softmax(1)
            .gather(-1, tokens[:, 1:, None])[..., 0],
            m,
        ),
        "token 0 is a token like any other: only the mask says what counts": over(
            nll, m * (tokens[:, 1:] > 0)
        ),
        "you shifted by two: the logits at t speak about the token at t + 1": over(
            nll_of(logits[:, :-2].detach(), tokens[:, 2:]), mask[:, 2:]
        ),
        "that is the perplexity, e to the loss": over(nll, m).exp(),
        "the softmax is applied twice": over(
            nll_of(logits[:, :-1].detach().softmax(-1), tokens[:, 1:]), m
        ),
        "all tokens of the vocabulary are counted, not the right one alone": -over(
            logits[:, :-1].detach().log_softmax(-1).mean(-1), m
        ),
        "the sign is wrong: the loss is minus the log probability": -over(nll, m),
        "that is in bits: the loss is in nats, with the natural logarithm": (
            over(nll, m) / math.log(2)
        ),
        "that is the mean probability: the logarithm is missing": over(p, m),
        (
            "take the logarithm of each probability, then the mean; not the other way"
            " round"
        ): -over(p, m).log(),
        "logits are not log probabilities yet: a log-softmax is missing": -over(
            scores, m
        ),
    }


@check.exercise(
    points=1,
    minutes=5,
    difficulty=1,
    importance=4,
    hints=(
        "Three steps: nats to bits, one token to all tokens, all tokens to one byte.",
        (
            "A nat is 1 / ln 2 bits. A character is not a byte: `text.encode()` gives"
            " the bytes in UTF-8."
        ),
        "The sum of the losses, over math.log(2), over len(text.encode()).",
    ),
)
def bits_per_byte(answer):
    """Bits per byte from the losses of a text's tokens."""
    some = [
        "naïve",
        "the whale",
        "— “call me Ishmael” —",
        "你好",
        "état",
        "Ünion",
        "1851 £",
        "of the",
    ]
    text = " ".join(some[i] for i in torch.randint(len(some), (12,)).tolist())
    text = f"\n {text} é \n"  # what is blank at its ends counts, too
    losses = 5 * torch.rand(31)
    what = "bits_per_byte(losses, text)"
    got = expect(answer(losses, text), kind=float, what=what)
    total = losses.double().sum().item()
    n = len(text.encode())
    bits = total / math.log(2)
    mistakes = {
        "that is nats per byte: a nat is 1 / ln 2 bits": total / n,
        "you multiplied by ln 2: bits are more than nats, so divide by it": (
            total * math.log(2) / n
        ),
        (
            "you divided by characters, not by bytes: é takes two bytes in UTF-8, 你"
            " takes three"
        ): bits / len(text),
        "that is bits per token: divide all the bits by the bytes of the text": (
            bits / len(losses)
        ),
        "that is nats per token": total / len(losses),
        "you took the mean of the losses: all the bits count, so take the sum": (
            bits / len(losses) / n
        ),
        "those are all the bits: divide them by the bytes of the text": bits,
        "you divided by the bytes in UTF-16: UTF-8 is asked": (
            bits / len(text.encode("utf-16-le"))
        ),
        "you divided by the bytes in UTF-16, with its mark: UTF-8 is asked": (
            bits / len(text.encode("utf-16"))
        ),
        "characters beyond ASCII are left out: they have bytes, too": (
            bits / len(text.encode("ascii", "ignore"))
        ),
        "what is blank at the ends of the text is left out: it has bytes, too": (
            bits / len(text.strip().encode())
        ),
        "you divided by the words: by the bytes": bits / len(text.split()),
        "you took log₂ of each loss: a loss is a logarithm already, and is divided by"
        " ln 2": losses.log2().double().sum().item() / n,
        "you divided by ln 10: bits need ln 2": total / math.log(10) / n,
        "that is 2 to the bits per byte": 2 ** (bits / n),
        "that is e to the nats per byte": math.exp(total / n),
        "you divided by the number of different bytes: by all": (
            bits / len(set(text.encode()))
        ),
        "the first token is left out": losses[1:].double().sum().item()
        / math.log(2)
        / n,
        "the last token is left out": losses[:-1].double().sum().item()
        / math.log(2)
        / n,
        "that is bytes per bit: upside down": n / bits,
        (
            "eight bits make a byte, but here the bits are the model's and the bytes"
            " the text's: no factor of 8"
        ): bits / n / 8,
    }
    diagnose(
        got, right=language_model.bits_per_byte(losses, n), mistakes=mistakes, what=what
    )
    if not close(answer(torch.full((5,), math.log(256)), "whale"), 8.0):
        raise Mistake(
            "a fair draw from 256 tokens, each of them one byte, must cost 8 bits a"
            " byte"
        )


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Count the pairs into a table c of shape (V, V) first: c[a, b] is how often"
            " b came right after a. All else follows from that table: its row sums, and"
            " how many of its entries are above 0, by row and by column."
        ),
        (
            "Two different counts of kinds: N₊(a ·) counts the entries above 0 in row"
            " a, N₊(· b) those in column b. The sum of either is N₊(··), the number of"
            " different pairs."
        ),
        (
            "Where c(a) is 0 the formula is 0 / 0. Divide by `total.clamp(min=1)`, and"
            " put P_c into those rows with `torch.where`."
        ),
    ),
)
def kneser_ney_bigram(answer):
    """All probabilities P[a, b] of b after a, by interpolated Kneser-Ney."""
    V = 9
    D = 0.6
    what = "kneser_ney_bigram(tokens, 9, 0.6)"
    body = (torch.rand(70) ** 2 * 7).long()
    # 7 comes last only, 8 never
    tokens = torch.cat([torch.tensor([0, 6, 1, 2, 6, 1]), body, torch.tensor([7])])
    value = answer(tokens, V, D)
    if getattr(value, "shape", None) == (8, 8):
        raise Mistake(
            "the table has a row for each of `vocab_size` tokens, also for one that the"
            " text does not have"
        )
    got = expect(value, shape=(V, V), finite=False, what=what)
    if got[7:].isnan().all() and got[:7].isfinite().all():
        raise Mistake(
            "rows of tokens that nothing followed are 0 / 0: there P(b | a) is P_c(b)"
        )
    expect(got, what=what)
    mistakes = _wrong_tables(tokens, V, D)
    diagnose(
        got,
        right=reference(tokens, V, D),
        mistakes=mistakes,
        terms=[_two_terms(tokens, V, D)],
        what=what,
    )
    if not close(got.double().sum(1), torch.ones(V).double()):
        raise Mistake("each row must sum to 1")
    some = tokens[:20]
    got = expect(answer(some, 7, 0.3), what="kneser_ney_bigram(tokens, 7, 0.3)")
    if not close(got, reference(some, 7, 0.3)):
        for text, wrong in _wrong_tables(some, 7, 0.3).items():
            if close(got, wrong):
                raise Mistake(text)
        raise Mistake(
            "right for vocab_size=9 and discount=0.6, wrong for 7 and 0.3: take both"
            " from the arguments"
        )


def _row_by_row(rows: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return rows / rows.sum(1, keepdim=True)


def _table(c: Tensor, D: float) -> Tensor:
    """The probabilities from another table of counts."""
    n = c.sum(1, keepdim=True)
    kinds = (c > 0).sum(1, keepdim=True)
    lower = (c > 0).sum(0) / (c > 0).sum()
    rows = ((c - D).clamp(min=0) + D * kinds * lower) / n.clamp(min=1)
    return torch.where(n > 0, rows, lower)


RAW = (
    "P_c(b) counts how often b was seen: it must count how many different tokens b was"
    " seen after"
)


def _two_terms(tokens: Tensor, V: int, D: float) -> dict[str, Tensor]:
    """The two terms of P, by name; where nothing followed, the second is P_c."""
    c = pair_counts(tokens, V)
    n = c.sum(1, keepdim=True)
    kinds = (c > 0).sum(1, keepdim=True)
    lower = (c > 0).sum(0) / (c > 0).sum()
    weight = torch.where(n > 0, D * kinds / n.clamp(min=1), 1.0)
    return {
        "the first term, max(c(a, b) − D, 0) / c(a),": (c - D).clamp(min=0)
        / n.clamp(min=1),
        "the second term, with P_c(b),": weight * lower,
    }


def _wrong_tables(tokens: Tensor, V: int, D: float) -> dict:
    """The probabilities that usual mistakes give."""
    c = pair_counts(tokens, V)
    total = c.sum(1, keepdim=True)
    kinds = (c > 0).sum(1, keepdim=True)
    last = torch.bincount(tokens, minlength=V)[:, None]
    seen = (c - D).clamp(min=0)
    n = total.clamp(min=1)
    lower = (c > 0).sum(0) / (c > 0).sum()

    def fill(rows: Tensor, p: Tensor = lower) -> Tensor:
        """`rows`, and p where nothing followed the token of a row."""
        return torch.where(total > 0, rows, p.expand(V, V))

    def with_lower(p: Tensor) -> Tensor:
        return fill(seen / n + D * kinds / n * p, p)

    rows = seen / n + D * kinds / n * lower
    n_last = last.clamp(min=1)
    rows_last = seen / n_last + D * kinds / n_last * lower
    every = torch.bincount(tokens, minlength=V) / len(tokens)
    uniform = torch.full((V,), 1 / V, dtype=torch.float64)
    return {
        RAW: with_lower(c.sum(0) / c.sum()),
        RAW + " (and all places count, the first too)": with_lower(every),
        "P_c is uniform: it must be N₊(· b) / N₊(··)": with_lower(uniform),
        (
            "P_c(b) counts what follows b: it must count what b follows (columns of the"
            " table, not rows)"
        ): with_lower((c > 0).sum(1) / (c > 0).sum()),
        (
            "N₊(a ·) is missing: the probability taken from row a is D for each kind of"
            " pair in it"
        ): fill(seen / n + D / n * lower),
        "N₊(a ·) counts kinds, not occurrences: how many different b follow a": fill(
            seen / n + D * total / n * lower
        ),
        "the second term must go to all b: it is not for unseen pairs alone": fill(
            torch.where(c > 0, seen / n, D * kinds / n * lower)
        ),
        "nothing was taken away: the first term needs max(c − D, 0)": fill(
            c / n + D * kinds / n * lower
        ),
        "a count less than D must give 0, not a negative probability: max(c − D, 0)": (
            fill((c - D) / n + D * kinds / n * lower)
        ),
        "rows of tokens that nothing followed are not P_c": torch.where(
            total > 0, rows, torch.zeros(V, V).double()
        ),
        "rows of tokens that nothing followed must be P_c, not uniform": (
            fill(rows, uniform)
        ),
        (
            "c(a) counts the last token too, which nothing follows: take the sums of"
            " the rows of pairs"
        ): torch.where(last > 0, rows_last, lower.expand(V, V)),
        "P is the other way round: P[a, b] is b after a, so each row must sum to 1": (
            fill(rows).T
        ),
        "D is missing from what row a gives up, D · N₊(a ·)": fill(
            seen / n + kinds / n * lower
        ),
        "nothing was taken away, and the rows are divided by their sums instead": fill(
            _row_by_row(c / n + D * kinds / n * lower)
        ),
        "D is missing from what row a gives up, and the rows are divided by their sums"
        " instead": fill(_row_by_row(seen / n + kinds / n * lower)),
        "the text is read backwards: b comes right after a": lambda: reference(
            tokens.flip(0), V, D
        ),
        "pairs that come again are counted once: c[a, b] += 1 with an index adds once"
        " (torch.bincount, or index_put_ with accumulate=True)": lambda: _table(
            (c > 0).double(), D
        ),
        "the last pair is missing": lambda: reference(tokens[:-1], V, D),
        "the first pair is missing": lambda: reference(tokens[1:], V, D),
        "the last token is followed by the first: the text has an end": lambda: (
            reference(torch.cat([tokens, tokens[:1]]), V, D)
        ),
        "P_c is added as it is: it is weighted by D · N₊(a ·) / c(a)": fill(
            seen / n + lower
        ),
        "the second term is missing": fill(seen / n),
        "that is add-one smoothing: the formula takes D from each pair seen": (
            (c + 1) / (total + V)
        ),
        "P_c is mixed in with the weight D: it is D · N₊(a ·) / c(a)": fill(
            (1 - D) * c / n + D * lower
        ),
        "the discount is not the argument D": lambda: reference(tokens, V, 0.75),
    }


@check.exercise(
    points=3,
    minutes=25,
    difficulty=4,
    importance=4,
    hints=(
        (
            "Write down by hand, for 10 tokens, context 4 and stride 3, what each"
            " window reads and what it is the first to predict:"
            " `language_model.windows(10, 4, 3)` has the answer."
        ),
        (
            "Window k reads tokens[start : stop] with start = k · stride and stop ="
            " min(start + context, N − 1), and its logits speak about tokens start + 1"
            " … stop. Keep the losses of those that no window before it predicted."
        ),
        (
            "Keep `done`, the number of tokens predicted so far. Of each window's"
            " losses keep the last `stop − done`, then set done = stop. Leave the loop"
            " when done = N − 1."
        ),
    ),
)
def strided_losses(answer):
    """The loss of every token of a text longer than the context, each counted once."""
    model = tiny_model()
    tokens = torch.randint(13, (21,))
    context = 6
    stride = 4
    reading = Reader(model, context)
    got = answer(reading, tokens, context, stride)
    expect(got, kind=Tensor, what="strided_losses(…)")
    needed = len(language_model.windows(21, context, stride))
    if got.dim() == 1 and len(got) > 20:
        raise Mistake(
            f"{len(got)} losses for 21 tokens: each token but the first is counted"
            " once, also where windows overlap"
        )
    if got.dim() == 1 and len(got) < 20:
        raise Mistake(
            f"{len(got)} losses for 21 tokens, where 20 are asked: did the end of the"
            " text (a shorter window) or the start of a window get lost?"
        )
    expect(got, shape=(20,), dtype=torch.float32, what="strided_losses(…)")
    got = got.detach()
    mistakes = _wrong_windows(model, tokens, context, stride, needed)
    right = language_model.token_losses(model, tokens, context, stride)
    diagnose(got, right=right, mistakes=mistakes, tol=1e-4, what="strided_losses(…)")
    _reads_what_it_needs(reading, 21, context, stride)
    for n, c, s in ((5, 6, 2), (13, 6, 6), (14, 4, 1), (7, 6, 3), (2, 6, 1)):
        reading = Reader(model, c)
        again = answer(reading, tokens[:n], c, s)
        if not close(
            again, language_model.token_losses(model, tokens[:n], c, s), tol=1e-4
        ):
            raise Mistake(
                f"right for 21 tokens, context 6 and stride 4; wrong for {n} tokens,"
                f" context {c} and stride {s}"
            )
        _reads_what_it_needs(reading, n, c, s)


def _reads_what_it_needs(reading: Reader, n: int, context: int, stride: int) -> None:
    """A Mistake when the model read more windows, or longer ones, than it must."""
    windows = language_model.windows(n, context, stride)
    case = f"for {n} tokens, context {context} and stride {stride}"
    if len(reading.lengths) > len(windows):
        raise Mistake(
            f"the losses are right, but {case} the model read {len(reading.lengths)}"
            f" windows, where {len(windows)} are enough: stop when all are predicted"
        )
    if sum(reading.lengths) > sum(stop - start for start, stop, _ in windows):
        raise Mistake(
            f"the losses are right, but {case} a window reads the last token, after"
            " which there is nothing to predict"
        )


@torch.no_grad()
def _windowed(
    model, tokens, context, stride, keep="earlier", full=False, shift=1, log=True
) -> Tensor:
    """The losses window by window, with one thing changed."""
    n = len(tokens)
    total = torch.zeros(n - 1)
    times = torch.zeros(n - 1)
    done = 0
    for first in range(0, n - 1, stride):
        start = max(0, min(first, n - 1 - context)) if full else first
        stop = min(start + context, n - 1)
        scores = model(tokens[None, start:stop])[0]
        scores = scores.log_softmax(-1) if log else scores
        own = tokens[start + shift : stop + shift]
        losses = -scores.gather(1, own[:, None])[:, 0]
        if keep == "mean":
            total[start:stop] += losses
            times[start:stop] += 1
        elif keep == "first":
            total[done:stop] = losses[: stop - done]
        else:
            total[done:stop] = losses[done - start :]
        done = stop
        if done == n - 1:
            break
    return total / times if keep == "mean" else total


def _wrong_windows(
    model, tokens: Tensor, context: int, stride: int, windows: int
) -> dict:
    """The losses that usual mistakes give."""

    def starts(rule) -> Tensor:
        """Losses of tokens 1 … 20, each with the window that begins at rule(token)."""
        return losses_from(model, tokens, [rule(t) for t in range(1, 21)])

    def k(t: int, first: int) -> int:
        return stride * max(0, math.ceil((t - first) / stride))

    # of each token under the logits at its own place
    own = nll_of(model(tokens[None]), tokens[None])[0].detach()
    return {
        "your windows move by context, not by stride: they do not overlap": starts(
            lambda t: (t - 1) // context * context
        ),
        "your windows move by 1, not by stride": starts(lambda t: max(0, t - context)),
        (
            "a window of context tokens predicts context tokens: its last logits speak"
            " about the token after it"
        ): starts(lambda t: k(t, context - 1)),
        (
            "where two windows overlap keep the loss of the earlier one, which had more"
            " context"
        ): starts(lambda t: min((t - 1) // stride, windows - 1) * stride),
        (
            "the whole text went through the model at once: it may read context tokens"
            " at a time"
        ): starts(lambda t: 0),
        "there is no shift: the logits at t speak about token t + 1": own[1:],
        "where two windows overlap each loss is their mean: keep the earlier one": (
            _windowed(model, tokens, context, stride, keep="mean")
        ),
        "of a later window you keep its first losses: the last ones are new": (
            _windowed(model, tokens, context, stride, keep="first")
        ),
        "the last window begins at k · stride, too, and is shorter": (
            _windowed(model, tokens, context, stride, full=True)
        ),
        "windows read context − 1 tokens: context is what they read": _windowed(
            model, tokens, context - 1, stride
        ),
        "windows move by context − stride: by stride": (
            _windowed(model, tokens, context, context - stride)
        ),
        "there is no shift: the logits at t speak about token t + 1, and you took"
        " token t": _windowed(model, tokens, context, stride, shift=0),
        "a log-softmax is missing: these are minus the logits": _windowed(
            model, tokens, context, stride, log=False
        ),
        "these are probabilities: −log p is asked": lambda: (
            -language_model.token_losses(model, tokens, context, stride)
        ).exp(),
        "the losses are in bits: nats are asked": lambda: (
            language_model.token_losses(model, tokens, context, stride) / math.log(2)
        ),
        "the sign is wrong: a loss is minus a log probability": lambda: (
            -language_model.token_losses(model, tokens, context, stride)
        ),
    }
