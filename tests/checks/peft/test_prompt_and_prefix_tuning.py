"""Wrong answers to the exercises of 04-peft/02-prompt-and-prefix-tuning, each with the
diagnosis that it must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.peft.prompt_and_prefix_tuning import check
from tests.checks.rejecting import Wrong, rejects, verdict


def before(
    embeds=lambda prompt, e, m: torch.cat([prompt.expand(len(e), -1, -1), e], 1),
    mask=lambda m, p: F.pad(m, (p, 0), value=1),
    positions=lambda m, p: (F.pad(m, (p, 0), value=1).cumsum(-1) - 1).clamp(min=0),
):
    """prepend_prompt with another way to make one of its three results."""

    def prepend_prompt(prompt, e, m):
        return embeds(prompt, e, m), mask(m, len(prompt)), positions(m, len(prompt))

    return prepend_prompt


def count(m, p):
    return torch.arange(p + m.shape[1]).expand(len(m), -1)


def only_embeddings(prompt, e, m):
    return torch.cat([prompt.expand(len(e), -1, -1), e], 1)


def mask_untouched(prompt, e, m):
    return only_embeddings(prompt, e, m), m, m.cumsum(-1) - 1 + len(prompt)


def float_mask(prompt, e, m):
    return (
        only_embeddings(prompt, e, m),
        F.pad(m.float(), (len(prompt), 0), value=1.0),
        count(m, len(prompt)),
    )


def three_tokens(prompt, e, m):
    right = before()(prompt, e, m)
    return (
        right[0],
        right[1],
        (F.pad(m, (3, 0), value=1).cumsum(-1) - 1)[:, 3 - len(prompt) :],
    )


PREPEND = [
    Wrong(
        "prepend_prompt",
        before(lambda p, e, m: torch.cat([e, p.expand(len(e), -1, -1)], 1)),
        "comes after the input",
    ),
    Wrong(
        "prepend_prompt",
        before(lambda p, e, m: torch.cat([p.flip(0).expand(len(e), -1, -1), e], 1)),
        "reverse order",
    ),
    Wrong(
        "prepend_prompt",
        before(lambda p, e, m: F.pad(e, (0, 0, len(p), 0))),
        "are zeros",
    ),
    Wrong(
        "prepend_prompt",
        before(
            lambda p, e, m: torch.cat([p.expand(len(e), -1, -1), e * m[..., None]], 1)
        ),
        "padding is zeroed",
    ),
    Wrong(
        "prepend_prompt",
        before(mask=lambda m, p: F.pad(m, (p, 0))),
        "hides the virtual tokens",
    ),
    Wrong(
        "prepend_prompt",
        before(mask=lambda m, p: F.pad(m, (0, p), value=1)),
        "grows at the right",
    ),
    Wrong(
        "prepend_prompt",
        before(mask=lambda m, p: torch.ones_like(F.pad(m, (p, 0)))),
        "all ones",
    ),
    Wrong("prepend_prompt", before(positions=count), "count the padding"),
    Wrong(
        "prepend_prompt",
        before(positions=lambda m, p: F.pad(m, (p, 0), value=1).cumsum(-1)),
        "start at 1",
    ),
    Wrong(
        "prepend_prompt",
        before(
            positions=lambda m, p: torch.cat([count(m, p)[:, :p], m.cumsum(-1) - 1], 1)
        ),
        "starts at 0 again",
    ),
    Wrong("prepend_prompt", only_embeddings, "tuple or list"),
    Wrong("prepend_prompt", mask_untouched, "shape"),
    Wrong("prepend_prompt", float_mask, "int64"),
    Wrong("prepend_prompt", three_tokens, "wrong for p = 1"),
]


def cut(shape, order, flip=False):
    """split_prefix by another view and another permutation; p, L, K and -1 by name."""

    def split_prefix(prefix, layers, heads):
        p = len(prefix)
        D = prefix.shape[1] // (2 * layers * heads)
        sizes = {"p": p, "L": layers, "2": 2, "K": heads, "D": D}
        axes = prefix.reshape([sizes[c] for c in shape]).permute(
            [shape.index(c) for c in order]
        )
        keys, values = axes.flip(0) if flip else axes
        return keys, values

    return split_prefix


def straight(prefix, layers, heads):
    keys, values = prefix.view(2, layers, heads, len(prefix), -1)
    return keys, values


def token_first(prefix, layers, heads):
    keys, values = prefix.view(len(prefix), layers, 2, heads, -1).permute(2, 1, 0, 3, 4)
    return keys, values


def not_transposed(prefix, layers, heads):
    keys, values = token_first(prefix, layers, heads)
    shape = (layers, heads, len(prefix), -1)
    return keys.reshape(shape), values.reshape(shape)


def twice_the_keys(prefix, layers, heads):
    keys, _ = cut("pL2KD", "2LKpD")(prefix, layers, heads)
    return keys, keys


def two_heads(prefix, layers, heads):
    return cut("pL2KD", "2LKpD")(prefix, layers, 2)


def stacked(prefix, layers, heads):
    return torch.stack(cut("pL2KD", "2LKpD")(prefix, layers, heads))


def backwards(prefix, layers, heads):
    keys, values = cut("pL2KD", "2LKpD")(prefix, layers, heads)
    return keys.flip(0), values.flip(0)


SPLIT = [
    Wrong("split_prefix", cut("pL2KD", "2LKpD", flip=True), "swapped"),
    Wrong("split_prefix", cut("p2LKD", "2LKpD"), "first half of a row"),
    Wrong("split_prefix", cut("pLK2D", "2LKpD"), "head by head"),
    Wrong("split_prefix", cut("pL2DK", "2LKpD"), "side by side"),
    Wrong("split_prefix", cut("pKL2D", "2LKpD"), "by heads first"),
    Wrong("split_prefix", straight, "mixes tokens"),
    Wrong("split_prefix", not_transposed, "does not transpose"),
    Wrong("split_prefix", token_first, "swapped"),
    Wrong("split_prefix", twice_the_keys, "keys twice"),
    Wrong("split_prefix", two_heads, "3 heads"),
    Wrong("split_prefix", stacked, "tuple or list"),
    Wrong("split_prefix", backwards, "reverse order"),
]


def attend(
    diagonal=lambda p, T: p,
    scale=lambda D: D**-0.5,
    spread=lambda t, n: t.repeat_interleave(n, 1),
    swap=False,
):
    """prefix_attention with another mask, scale or sharing of heads."""

    def prefix_attention(q, k, v, prefix_k, prefix_v):
        if swap:
            prefix_k, prefix_v = prefix_v, prefix_k
        (B, H, T, D), (K, p, _) = q.shape, prefix_k.shape
        k, v = (
            torch.cat([t.expand(B, -1, -1, -1), o], 2)
            for t, o in ((prefix_k, k), (prefix_v, v))
        )
        k, v = spread(k, H // K), spread(v, H // K)
        visible = torch.ones(T, p + T, dtype=torch.bool).tril(diagonal(p, T))
        return (q @ k.mT * scale(D)).masked_fill(~visible, -torch.inf).softmax(-1) @ v

    return prefix_attention


def without_prefix(q, k, v, prefix_k, prefix_v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def prefix_alone(q, k, v, prefix_k, prefix_v):
    pk, pv = (t.expand(len(q), -1, -1, -1) for t in (prefix_k, prefix_v))
    return F.scaled_dot_product_attention(q, pk, pv, enable_gqa=True)


def two_softmaxes(q, k, v, prefix_k, prefix_v):
    return without_prefix(q, k, v, prefix_k, prefix_v) + prefix_alone(
        q, k, v, prefix_k, prefix_v
    )


def after_the_text(q, k, v, prefix_k, prefix_v):
    (B, H, T, D), (K, p, _) = q.shape, prefix_k.shape
    k, v = (
        torch.cat([o, t.expand(B, -1, -1, -1)], 2).repeat_interleave(H // K, 1)
        for t, o in ((prefix_k, k), (prefix_v, v))
    )
    visible = torch.ones(T, p + T, dtype=torch.bool).tril()
    return (q @ k.mT * D**-0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def zero_values(q, k, v, prefix_k, prefix_v):
    return attend()(q, k, v, prefix_k, torch.zeros_like(prefix_v))


def by_token(q, k, v, prefix_k, prefix_v):
    return attend()(q, k, v, prefix_k, prefix_v).transpose(1, 2)


ATTEND = [
    Wrong("prefix_attention", attend(lambda p, T: 0), "starts at the prefix"),
    Wrong(
        "prefix_attention", attend(lambda p, T: p - 1), "does not see token i itself"
    ),
    Wrong("prefix_attention", attend(lambda p, T: p + 1), "token i + 1"),
    Wrong("prefix_attention", attend(lambda p, T: p + T), "no causal mask"),
    Wrong("prefix_attention", attend(scale=lambda D: 1.0), "not divided"),
    Wrong("prefix_attention", attend(scale=lambda D: 1 / D), "divided by D"),
    Wrong(
        "prefix_attention",
        attend(spread=lambda t, n: t.repeat(1, n, 1, 1)),
        "wrong key/value heads",
    ),
    Wrong("prefix_attention", attend(swap=True), "swapped"),
    Wrong("prefix_attention", without_prefix, "prefix is missing"),
    Wrong("prefix_attention", prefix_alone, "text is missing"),
    Wrong("prefix_attention", two_softmaxes, "one softmax"),
    Wrong("prefix_attention", zero_values, "values are zeros"),
    Wrong("prefix_attention", after_the_text, "prefix is missing"),
    Wrong("prefix_attention", by_token, "dimensions 1 and 2 are swapped"),
]

# Kinds of mistake that once had no sentence, or got through.


def prepended(change):
    """prepend_prompt whose three results are changed."""

    def answer(prompt, embeds, mask):
        rows = prompt.expand(len(embeds), -1, -1)
        longer = torch.nn.functional.pad(mask, (len(prompt), 0), value=1)
        three = torch.cat([rows, embeds], 1), longer, longer.cumsum(1) - 1
        return change(*three, prompt, embeds, mask)

    return answer


def of_the_first_row(e, m, at, prompt, embeds, mask):
    rows = torch.stack([prompt, *[0 * prompt] * (len(embeds) - 1)])
    return torch.cat([rows, embeds], 1), m, at


def behind_the_padding(e, m, at, prompt, embeds, mask):
    rows = []
    for row, pad in zip(embeds, (1 - mask).sum(1).tolist(), strict=True):
        rows.append(torch.cat([row[:pad], prompt, row[pad:]]))
    return torch.stack(rows), m, at


def all_moved(e, m, at, prompt, embeds, mask):
    count = torch.arange(m.shape[1]) - (1 - mask).sum(1, keepdim=True)
    return e, m, count.clamp(min=0)


def width_for_p(prompt, embeds, mask):
    longer = torch.nn.functional.pad(mask, (prompt.shape[1], 0), value=1)
    rows = prompt.expand(len(embeds), -1, -1)
    return torch.cat([rows, embeds], 1), longer, longer.cumsum(1) - 1


def attention(
    hide=lambda s, hidden: s.masked_fill(hidden, -torch.inf),
    soften=lambda s, hidden: s.softmax(-1),
    order=1,
    read=lambda t: t,
):
    """prefix_attention with one thing changed."""

    def answer(q, k, v, prefix_k, prefix_v):
        (B, H, T, D), p = q.shape, prefix_k.shape[1]

        def joined(prefix, own):
            parts = [read(prefix).expand(B, -1, -1, -1), own][::order]
            return torch.cat(parts, 2).repeat_interleave(H // own.shape[1], 1)

        scores = q @ joined(prefix_k, k).mT / D**0.5
        hidden = ~torch.ones(T, p + T, dtype=torch.bool).tril(p)
        return soften(hide(scores, hidden), hidden) @ joined(prefix_v, v)

    return answer


def without_the_largest(scores, hidden):
    e = scores.exp()
    return e / e.sum(-1, keepdim=True)


MORE = [
    Wrong("prepend_prompt", prepended(of_the_first_row), "only the first row"),
    Wrong("prepend_prompt", prepended(behind_the_padding), "between the padding"),
    Wrong("prepend_prompt", prepended(all_moved), "taken off the positions"),
    Wrong("prepend_prompt", width_for_p, "not its width"),
    Wrong(
        "prepend_prompt", prepended(lambda e, m, at, *_: (e, at, m)), "the wrong order"
    ),
    Wrong(
        "split_prefix",
        lambda prefix, layers, heads: prefix.view(
            layers, 2, heads, len(prefix), -1
        ).unbind(1),
        "mixes tokens",
    ),
    Wrong("prefix_attention", attention(order=-1), "stands behind the text"),
    Wrong(
        "prefix_attention",
        attention(hide=lambda s, hidden: s * ~hidden),
        "hidden scores are set to 0",
    ),
    Wrong(
        "prefix_attention",
        attention(
            hide=lambda s, hidden: s, soften=lambda s, hidden: s.softmax(-1) * ~hidden
        ),
        "after the softmax",
    ),
    Wrong(
        "prefix_attention",
        attention(read=lambda t: t[:1].expand_as(t)),
        "prefix of head 0",
    ),
    Wrong("prefix_attention", attention(soften=without_the_largest), "exp overflows"),
]


def first_real_token(prompt, embeds, mask):
    (B, T, _), p = embeds.shape, len(prompt)
    places = torch.arange(T) - mask.argmax(1, keepdim=True) + p
    return (
        torch.cat([prompt[None].repeat(B, 1, 1), embeds], 1),
        torch.cat([mask.new_ones(B, p), mask], 1),
        torch.cat([torch.arange(p).expand(B, p), places], 1),
    )


def piece_by_piece(prefix, layers, heads):
    blocks = [torch.stack(b.chunk(heads, 1)) for b in prefix.chunk(2 * layers, 1)]
    return torch.stack(blocks[::2]), torch.stack(blocks[1::2])


def two_pieces(q, k, v, prefix_k, prefix_v):
    (B, H, T, D), K, p = q.shape, k.shape[1], prefix_k.shape[1]
    q = q.reshape(B, K, H // K, T, D)
    far = torch.full((T, T), -torch.inf).triu(1)
    scores = [
        torch.einsum("bkgtd,kpd->bkgtp", q, prefix_k),
        torch.einsum("bkgtd,bksd->bkgts", q, k) + far,
    ]
    w = (torch.cat(scores, -1) / D**0.5).softmax(-1)
    out = torch.einsum("bkgtp,kpd->bkgtd", w[..., :p], prefix_v)
    out = out + torch.einsum("bkgts,bksd->bkgtd", w[..., p:], v)
    return out.reshape(B, H, T, D)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("prepend_prompt", first_real_token),
        ("split_prefix", piece_by_piece),
        ("prefix_attention", two_pieces),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/02-prompt-and-prefix-tuning", PREPEND + SPLIT + ATTEND + MORE
)
