"""Kneser-Ney against a dictionary version written from the paper's formula, and against
the axioms of probability.
"""

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models.ngrams import fit

V = 6
texts = st.lists(st.integers(0, V - 1), min_size=8, max_size=60)


def reference(text: list[int], order: int):
    """p(w | h) by the definition, with sets and dictionaries."""
    grams = {
        n: [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        for n in range(1, order + 1)
    }
    counts = {order: Counter(grams[order])}
    kinds = set(grams[order])
    for n in range(order - 1, 0, -1):
        before = defaultdict(set)
        for g in kinds:
            before[g[1:]].add(g[0])
        counts[n] = Counter({g: len(v) for g, v in before.items()})
        kinds = set(counts[n])

    def p(w, h):
        n = len(h) + 1
        lower = p(w, h[1:]) if h else 1 / V
        after = {g[-1]: c for g, c in counts[n].items() if g[:-1] == h}
        n1, n2 = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        D = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        total = sum(after.values())
        return (
            lower
            if not total
            else max(after.get(w, 0) - D, 0) / total + D * len(after) / total * lower
        )

    return p


@settings(deadline=None, max_examples=40)
@given(texts, st.integers(1, 4), st.data())
def test_distribution_equals_the_definition_and_sums_to_one(text, order, data):
    history = tuple(data.draw(st.lists(st.integers(0, V - 1), max_size=5)))
    got = fit(torch.tensor(text), order, V).distribution(
        torch.tensor(history, dtype=torch.long)
    )
    assert got.sum().item() == pytest.approx(1, abs=1e-12)
    assert (got > 0).all()
    p, h = reference(text, order), history[max(0, len(history) - order + 1) :]
    torch.testing.assert_close(
        got, torch.tensor([p(w, h) for w in range(V)], dtype=torch.float64)
    )


@settings(deadline=None, max_examples=20)
@given(texts, texts, st.integers(1, 4))
def test_losses_are_minus_log_of_the_distribution(text, other, order):
    model = fit(torch.tensor(text), order, V)
    other = torch.tensor(other)
    each = [
        -model.distribution(other[:t])[other[t]].log() for t in range(1, len(other))
    ]
    torch.testing.assert_close(model.losses(other), torch.stack(each))


def test_continuation_counts_beat_raw_counts():
    """'Francisco' is frequent but follows one word only: after an unknown word it is
    the less likely one.
    """
    san, francisco, glass = 0, 1, 2
    text = [san, francisco] * 20 + [3, glass, 4, glass, 5, glass]
    after_an_end = fit(torch.tensor(text), 2, V).distribution(
        torch.tensor([], dtype=torch.long)
    )
    assert after_an_end[glass] > after_an_end[francisco]
    assert fit(torch.tensor(text), 1, V).distribution(
        torch.tensor([], dtype=torch.long)
    ).argmax() in (san, francisco)


def test_a_higher_order_sees_more():
    text = torch.tensor([0, 1, 2, 0, 3, 4] * 30)
    loss = [fit(text, n, V).losses(text).mean() for n in (1, 2, 3)]
    assert loss[0] > loss[1] > loss[2]


@pytest.mark.parametrize(
    "tokens, order, vocab, named",
    [
        ([0, 1], 0, V, "order=0"),
        ([0, 1], 6, 2048, "order=6"),
        ([0], 2, V, "order=2"),
        ([0, 6], 1, V, "vocab_size - 1 = 5"),
    ],
)
def test_fit_refuses(tokens, order, vocab, named):
    with pytest.raises(ValueError, match=named):
        fit(torch.tensor(tokens), order, vocab)
