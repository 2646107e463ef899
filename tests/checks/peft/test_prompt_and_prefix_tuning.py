"""Wrong answers to the exercises of 04-peft/02-prompt-and-prefix-tuning, each with the
diagnosis that it must get.
"""

import torch
import torch.nn.functional as F

from tests.checks.rejecting import Wrong, rejects


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

test_wrong_answers = rejects(
    "04-peft/02-prompt-and-prefix-tuning", PREPEND + SPLIT + ATTEND
)
