"""What marks the exercises of 04-peft/02-prompt-and-prefix-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.operations import Operations
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.peft.prompt_and_prefix_tuning import prefixes

check = Checks("04-peft/02-prompt-and-prefix-tuning")


def parts(value: object, n: int, what: str, names: str) -> tuple:
    """The `n` things that an answer returned, or a Mistake."""
    value = expect(value, kind=(tuple, list), what=what)
    if len(value) != n:
        raise Mistake(f"{what} returned {len(value)} things: return {names}")
    return tuple(value)


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "The prompt is (p, d) and the batch (B, T, d): `prompt.expand(B, -1, -1)`"
            " repeats it without copying, `torch.cat` joins."
        ),
        (
            "The mask needs p ones at the left of each row, of its own dtype:"
            " `mask.new_ones(B, p)`."
        ),
        (
            "Positions: take the running sum of the *extended* mask, less 1. It counts"
            " virtual and real tokens and skips padding."
        ),
    ),
    grads={"prompt": 0},
)
def prepend_prompt(answer):
    """A soft prompt before a padded batch, with the mask and the positions that go with
    it.
    """
    prompt, embeds = torch.randn(3, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    names = "the embeddings, the mask and the positions"
    got, got_mask, places = parts(
        answer(prompt, embeds, mask), 3, "prepend_prompt(…)", names
    )
    wide = (2, 9)
    if wide in (getattr(got_mask, "shape", None), getattr(places, "shape", None)):
        raise Mistake("p is the number of rows of the prompt, not its width")
    expect(got, shape=(2, 8, 4), dtype=torch.float32, what="your tensor of embeddings")
    expect(got_mask, shape=(2, 8), dtype=torch.int64, what="the mask")
    expect(places, shape=(2, 8), dtype=torch.int64, what="your tensor of positions")
    rows = prompt.expand(2, -1, -1)
    mistakes = {
        "the prompt comes after the input: it belongs before it": torch.cat(
            [embeds, rows], 1
        ),
        "the prompt's tokens are in reverse order": torch.cat(
            [rows.flip(1), embeds], 1
        ),
        "only the first row has the prompt: each row has it": torch.cat(
            [torch.stack([prompt, 0 * prompt]), embeds], 1
        ),
        "the prompt stands between the padding and the text: it comes first": (
            torch.stack(
                [
                    torch.cat([prompt, embeds[0]]),
                    torch.cat([embeds[1, :2], prompt, embeds[1, 2:]]),
                ]
            )
        ),
        "the virtual tokens are zeros: use prompt": torch.cat([0 * rows, embeds], 1),
        "padding is zeroed: leave the input as it is, the mask hides it": torch.cat(
            [rows, embeds * mask[..., None]], 1
        ),
        "the prompt is added to the input: it stands before it": F.pad(
            embeds, (0, 0, 3, 0)
        )
        + F.pad(rows, (0, 0, 0, 5)) * 2,
    }
    diagnose(
        got,
        right=torch.cat([rows, embeds], 1),
        mistakes=mistakes,
        what="your tensor of embeddings",
    )
    longer = F.pad(mask, (3, 0), value=1)
    if close(places, longer) and not close(got_mask, longer):
        raise Mistake(
            "they are in the wrong order: return the mask, then the positions"
        )
    mistakes = {
        "the mask hides the virtual tokens: they are 1, never padding": F.pad(
            mask, (3, 0)
        ),
        "the mask grows at the right: the virtual tokens stand at the left": F.pad(
            mask, (0, 3), value=1
        ),
        "the mask is all ones: padding must stay hidden": torch.ones_like(longer),
        "the virtual tokens are hidden in rows that begin with padding": torch.cat(
            [mask[:, :1].expand(-1, 3), mask], 1
        ),
    }
    diagnose(got_mask, right=longer, mistakes=mistakes, what="the mask")
    _judge_positions(places, mask, longer)
    one = answer(prompt[:1], embeds[1:], mask[1:])
    joined = torch.cat([prompt[:1], embeds[1]])[None]
    if not close(one[2][one[1].bool()], torch.arange(4)) or not close(one[0], joined):
        raise Mistake(
            "right for p = 3 and two rows, wrong for p = 1 and one row: take both from"
            " the arguments"
        )


def _judge_positions(places: Tensor, mask: Tensor, longer: Tensor) -> None:
    """A Mistake when a position other than padding's is wrong."""
    right = longer.cumsum(-1) - 1
    seen = longer.bool()
    count = torch.arange(8).expand(2, -1)
    mistakes = {
        "your positions count the padding: a row's first real token has"
        " position p": count[seen],
        "your positions start at 1: the first virtual token has position 0": right[seen]
        + 1,
        "the input starts at 0 again: its first token has position p": torch.cat(
            [count[:, :3], mask.cumsum(-1) - 1], 1
        )[seen],
        "the padding is taken off the positions of the virtual tokens too": (
            (count - (1 - mask).sum(1, keepdim=True)).clamp(min=0)[seen]
        ),
        "virtual tokens all have position 0: they take 0 … p − 1": torch.cat(
            [0 * count[:, :3], mask.cumsum(-1) + 2], 1
        )[seen],
        "the virtual tokens take no positions: the input starts at p": torch.cat(
            [0 * count[:, :3], mask.cumsum(-1) - 1], 1
        )[seen],
    }
    diagnose(
        places[seen],
        right=right[seen],
        mistakes=mistakes,
        what="your tensor of positions, padding left out,",
    )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "First `view` the row as it lies in memory, with an axis for each thing"
            " that varies; only then move axes."
        ),
        (
            "From the slowest to the fastest: token, layer, key or value, head,"
            " channel. So view(p, layers, 2, heads, −1)."
        ),
        (
            "`permute` to (2, layers, heads, p, D); its first axis then unpacks into"
            " keys and values."
        ),
    ),
    grads={"prefix": 0},
)
def split_prefix(answer):
    """Keys and values of each layer and head, cut out of one row for each virtual
    token.
    """
    p, L, K, D = 4, 3, 2, 5
    prefix = torch.randn(p, 2 * L * K * D)
    keys, values = parts(
        answer(prefix, L, K),
        2,
        "split_prefix(prefix, layers, heads)",
        "keys, then values",
    )
    for name, got in (("keys", keys), ("values", values)):
        expect(got, shape=(L, K, p, D), dtype=torch.float32, what=name)
    by_layer = prefix.view(p, L, 2, K, D).permute(2, 1, 3, 0, 4)
    halves = prefix.view(p, 2, L, K, D).permute(1, 2, 3, 0, 4)
    inner = prefix.view(p, L, K, 2, D).permute(3, 1, 2, 0, 4)
    channels = prefix.view(p, L, 2, D, K).permute(2, 1, 4, 0, 3)
    heads_out = prefix.view(p, K, L, 2, D).permute(3, 2, 1, 0, 4)
    got = torch.stack([keys, values])
    mistakes = {
        "keys and values are swapped: a layer's key comes first": by_layer.flip(0),
        "you took the first half of a row as keys and the second as values:"
        " they alternate, layer by layer": halves,
        "you let key and value alternate head by head: in a layer all heads'"
        " keys come first": inner,
        "you let heads vary faster than channels: a head's D numbers lie side"
        " by side": channels,
        "you cut a row by heads first: layers vary slowest": heads_out,
        "a `view` straight to the wanted shape mixes tokens: name the axes as"
        " they lie, then permute": prefix.view(2, L, K, p, D),
        "tokens and heads are exchanged without moving: `view` does not"
        " transpose, `permute` does": by_layer.permute(0, 1, 3, 2, 4).reshape(
            2, L, K, p, D
        ),
        "a `view` straight to the wanted axes mixes tokens: name the axes as they lie,"
        " then permute": prefix.view(L, 2, K, p, D).transpose(0, 1),
        "every second number is taken for a key: a head's D numbers lie side by side": (
            prefix.view(p, L, K, D, 2).permute(4, 1, 2, 0, 3)
        ),
        "you cut a row by heads, then by keys and values: layers vary slowest": (
            prefix.view(p, K, 2, L, D).permute(2, 3, 1, 0, 4)
        ),
        "the layers are in reverse order": by_layer.flip(1),
        "these are the keys twice": torch.stack([by_layer[0]] * 2),
        "these are the values twice": torch.stack([by_layer[1]] * 2),
    }
    diagnose(
        got,
        right=by_layer,
        mistakes=mistakes,
        parts={"your tensor of keys": 0, "your tensor of values": 1},
    )
    small = torch.randn(2, 12)  # the oracle: join puts them together again
    keys, values = answer(small, 1, 3)
    if keys.shape != (1, 3, 2, 2) or not close(
        prefixes.join([(k[None], v[None]) for k, v in zip(keys, values, strict=True)]),
        small,
    ):
        raise Mistake(
            "right for 3 layers and 2 heads, wrong for 1 layer and 3 heads: take both"
            " from the arguments"
        )


@check.exercise(
    points=3,
    minutes=20,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Join first: [P_K; K] along the token axis, with the prefix expanded over"
            " the batch. Then repeat heads for GQA."
        ),
        (
            "The scores are (B, H, T, p+T). Query i may look at columns 0 … p+i:"
            " `torch.ones(T, p+T).tril(p)`."
        ),
        (
            "`repeat_interleave(H // K, dim=1)` gives neighbours the same head;"
            " `repeat` would give them different ones."
        ),
    ),
    grads={"q": 0, "k": 1, "v": 2, "prefix_k": 3, "prefix_v": 4},
)
def prefix_attention(answer):
    """Causal grouped-query attention in which every token also sees a prefix."""
    B, H, K, T, D, p = 2, 4, 2, 5, 6, 3
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, K, T, D), torch.randn(B, K, T, D)
    prefix_k, prefix_v = torch.randn(K, p, D), torch.randn(K, p, D)
    what = "prefix_attention(…)"
    got = expect(
        answer(q, k, v, prefix_k, prefix_v),
        shape=(B, H, T, D),
        dtype=torch.float32,
        what=what,
    )
    right, mistakes = _attentions(q, k, v, prefix_k, prefix_v)
    diagnose(got, right=right, mistakes=mistakes, what=what)
    large = answer(300 * q, k, v, prefix_k, prefix_v)
    if not close(large, _attention(300 * q, k, v, prefix_k, prefix_v)):
        raise Mistake(
            "right for small scores, wrong for scores of several hundred: exp"
            " overflows where the largest is not taken away first, as torch.softmax"
            " does, or a mask is a finite number, which is reached"
        )
    mask = torch.ones(T, p + T, dtype=torch.bool).tril(p)
    pair = (prefix_k[None], prefix_v[None])  # the oracle: the fused kernel
    fused = F.scaled_dot_product_attention(
        q, *prefixes.prefix_attention_inputs(pair, k, v), mask, enable_gqa=True
    )
    if not close(got, fused):
        raise Mistake("the fused kernel gives another result for [P_K; K] and [P_V; V]")
    with Operations() as seen:
        alone = answer(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], prefix_k, prefix_v)
    if not close(alone, got[:1, :, :1]):
        raise Mistake(
            "token 0 alone must get what it gets in the whole text: nothing after it"
            " counts"
        )
    if seen.called("scaled_dot_product"):
        raise Mistake(
            "the values are right, and torch's own: write it without"
            " `scaled_dot_product_attention`"
        )


def _attentions(q, k, v, prefix_k, prefix_v) -> tuple[Tensor, dict[str, Tensor]]:
    """The attention asked for, and what mistakes make of it."""
    (B, _, T, D), (K, p, _) = q.shape, prefix_k.shape
    run = lambda **other: _attention(q, k, v, prefix_k, prefix_v, **other)  # noqa: E731
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    alone = F.scaled_dot_product_attention(
        q,
        prefix_k.expand(B, -1, -1, -1),
        prefix_v.expand(B, -1, -1, -1),
        enable_gqa=True,
    )
    mistakes = {
        "the causal mask starts at the prefix: query i sees the whole prefix"
        " and tokens 0 … i, so the diagonal lies at p": run(diagonal=0),
        "query i does not see token i itself: the diagonal lies at p": run(
            diagonal=p - 1
        ),
        "query i sees token i + 1: the diagonal lies at p": run(diagonal=p + 1),
        "there is no causal mask: query i must not see later tokens": run(
            diagonal=p + T
        ),
        "the scores are not divided by √D": run(scale=1.0),
        "the scores are divided by D, not by √D": run(scale=1 / D),
        "query heads read the wrong key/value heads: the first H/K of them"
        " share head 0": run(heads="cycle"),
        "the prefix stands behind the text, and the mask does not: [P_K; K], prefix"
        " first": run(order="behind"),
        "hidden scores are set to 0, and e⁰ = 1 counts: they must be −∞": run(
            hide=lambda scores, hidden: scores.masked_fill(hidden, 0.0)
        ),
        "the hidden scores are lowered, but not to −∞: they still count": run(
            hide=lambda scores, hidden: scores - 10.0 * hidden
        ),
        "the mask comes after the softmax, so the weights no longer add up to 1": run(
            after=True
        ),
        "all heads read the prefix of head 0": _attention(
            q, k, v, prefix_k[:1].expand(K, -1, -1), prefix_v[:1].expand(K, -1, -1)
        ),
        "the softmax runs over the queries: it runs over what they look at": run(
            over=-2
        ),
        "query i sees the prefix only up to place i: it sees all of it": run(
            hide=lambda scores, hidden: _to_minus_infinity(
                scores, hidden | ~torch.ones_like(hidden).tril()
            )
        ),
        "the mask is the wrong way round: query i sees tokens i and later": run(
            hide=lambda scores, hidden: _to_minus_infinity(
                scores,
                ~torch.ones_like(hidden).triu(p) & (torch.arange(p + T) >= p),
            )
        ),
        "the scores lose their sign": run(
            hide=lambda scores, hidden: _to_minus_infinity(scores.abs(), hidden)
        ),
        "the prefix has its keys as values": _attention(q, k, v, prefix_k, prefix_k),
        "the prefix is missing: this is plain attention": plain,
        "the text is missing: the queries see the prefix alone": alone,
        "there must be one softmax over prefix and text, not one for each,"
        " added up": plain + alone,
        "there must be one softmax over prefix and text, not the mean of two": (
            plain + alone
        )
        / 2,
        "keys and values of the prefix are swapped": _attention(
            q, k, v, prefix_v, prefix_k
        ),
        "only the keys have the prefix's place: its values are zeros": _attention(
            q, k, v, prefix_k, 0 * prefix_v
        ),
    }
    return run(), mistakes


def _to_minus_infinity(scores: Tensor, hidden: Tensor) -> Tensor:
    return scores.masked_fill(hidden, -torch.inf)


def _attention(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    diagonal=None,
    scale=None,
    heads="share",
    order="before",
    hide=_to_minus_infinity,
    after=False,
    over=-1,
) -> Tensor:
    """The attention asked for, with the usual mistakes as options."""
    (B, H, T, D), (K, p, _) = q.shape, prefix_k.shape
    k, v = (
        torch.cat([t.expand(B, -1, -1, -1), own][:: 1 if order == "before" else -1], 2)
        for t, own in ((prefix_k, k), (prefix_v, v))
    )
    spread = (
        (lambda t: t.repeat_interleave(H // K, 1))
        if heads == "share"
        else (lambda t: t.repeat(1, H // K, 1, 1))
    )
    visible = torch.ones(T, p + T, dtype=torch.bool).tril(
        p if diagonal is None else diagonal
    )
    scores = q @ spread(k).mT * (D**-0.5 if scale is None else scale)
    if after:
        return (scores.softmax(-1) * visible) @ spread(v)
    return hide(scores, ~visible).softmax(over) @ spread(v)
