"""The rule of acceptance: the target's distribution, by going through all that can
happen.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.inference.sampling_and_speculation import (
    accept,
    accept_children,
    acceptance_rate,
    draw,
    emitted,
    outcomes,
    residual,
    target_distribution,
)
from llmlab.models.generation import keep_top_k


def table(seed, vocab=3, top_k=None, temperature=1.0):
    """A model that is a table: its distribution depends on the whole text."""
    rows = {}

    def model(text):
        if text not in rows:
            number = seed * 10_007 + sum((t + 1) * 7**i for i, t in enumerate(text))
            random = torch.Generator().manual_seed(number)
            logits = 1.5 * torch.randn(1, vocab, generator=random, dtype=torch.float64)
            if top_k is not None:
                logits = keep_top_k(logits, top_k)
            rows[text] = (logits / temperature).softmax(-1)[0]
        return rows[text]

    return model


def greedy(model):
    """The same, all its probability on the largest."""
    return lambda text: torch.eye(len(model(())), dtype=torch.float64)[
        model(text).argmax()
    ]


def assert_same(found, wanted):
    assert sum(found.values()) == pytest.approx(1)
    for text, chance in wanted.items():
        assert found.get(text, 0.0) == pytest.approx(chance, abs=1e-12)


PAIRS = {
    "any two": (table(1), table(2)),
    "top-k of both": (table(1, top_k=2), table(2, top_k=2)),
    "top-k of the target alone": (table(1, top_k=2), table(2)),
    "another temperature": (table(1), table(2, temperature=0.4)),
    "equal": (table(1), table(1)),
    "greedy": (greedy(table(1)), greedy(table(2))),
    "looked up, not drawn": (table(1), greedy(table(2))),
    "greedy target, drawn draft": (greedy(table(1)), table(2)),
    "four tokens": (table(3, vocab=4), table(4, vocab=4)),
    "nothing in common": (
        lambda text: torch.tensor([0.3, 0.7, 0.0]).double(),
        lambda text: torch.tensor([0.0, 0.0, 1.0]).double(),
    ),
}


@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_output_has_the_distribution_of_the_target(pair, gamma):
    target, draft = PAIRS[pair]
    if pair == "four tokens" and gamma == 3:
        gamma = 2  # as telling, and 20 times as fast
    found = emitted(accept, target, draft, gamma)
    assert_same(found, target_distribution(target, gamma + 1))


def no_residual(p, q, drafted, u):
    """Draws the correction from p: the usual mistake."""
    for i, x in enumerate(drafted):
        if u[i] * q[i, x] >= p[i, x]:
            return [*drafted[:i], draw(p[i], u[-1])]
    return [*drafted, draw(p[-1], u[-1])]


def half_ratio(p, q, drafted, u):
    """Keeps a token with half of the right probability."""
    return accept(p / 2, q, drafted, u) if drafted else accept(p, q, drafted, u)


def test_enumeration_sees_a_wrong_rule():
    target, draft = PAIRS["any two"]
    wanted = target_distribution(target, 3)

    def error(found):
        return max(abs(found.get(text, 0.0) - wanted[text]) for text in wanted)

    assert error(emitted(no_residual, target, draft, 2)) > 0.01
    # told another q than the one that drew
    assert error(emitted(accept, target, draft, 2, claimed=table(5))) > 0.01
    assert error(emitted(half_ratio, target, draft, 2, grid=5)) > 0.01
    assert error(emitted(accept, target, draft, 2, grid=5)) < 1e-12


def test_what_a_wrong_q_gives_in_closed_form():
    """One token drawn from q, judged by r: min(q, q p / r), and the rest by r."""
    p, q, r = table(1)(()), table(2)(()), table(5)(())
    found = emitted(accept, lambda t: p, lambda t: q, 1, claimed=lambda t: r)
    first = torch.zeros(3, dtype=torch.float64)
    for text, chance in found.items():
        first[text[0]] += chance
    stays = torch.minimum(q, q * p / r)
    torch.testing.assert_close(first, stays + (1 - stays.sum()) * residual(p, r))


def test_outcomes_agree_with_the_formula():
    p, q = table(1)(()), table(2)(())
    P, Q = torch.stack([p, table(1)((0,))]), q[None]
    for x in range(3):
        found = outcomes(accept, P, Q, [x])
        stays = min(1.0, float(p[x] / q[x]))
        assert sum(v for k, v in found.items() if len(k) == 2) == pytest.approx(stays)
        for y in range(3):
            wanted = (1 - stays) * float(residual(p, q)[y])
            assert found.get((y,), 0.0) == pytest.approx(wanted, abs=1e-12)
    rate = float(acceptance_rate(p, q))
    assert rate == pytest.approx(1 - float((p - q).abs().sum()) / 2)


def test_given_uniforms_give_given_tokens():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]]).double()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).double()
    # 0.3 / 0.5 = 0.6 and 0.1 / 0.8 = 0.125
    assert accept(p, q, [1, 1], torch.tensor([0.59, 0.12, 0.9]).double()) == [1, 1, 1]
    # rejected in the second place: the residual has token 2 alone
    assert accept(p, q, [1, 1], torch.tensor([0.59, 0.13, 0.1]).double()) == [1, 2]
    # rejected in the first place: residual (1, 0, 0), as 0.2 < 0.25
    assert accept(p, q, [1, 1], torch.tensor([0.61, 0.0, 0.99]).double()) == [0]
    assert accept(p[:1], q[:0], [], torch.tensor([0.6]).double()) == [1]


def test_draw_and_residual_at_their_borders():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).double()
    assert [draw(p, u) for u in (0.0, 0.49, 0.5, 0.999999)] == [1, 1, 3, 3]
    short = torch.tensor([0.25, 0.25, 0.0]).double()  # ends below 1
    assert draw(short, 0.9) == 1
    assert torch.equal(residual(p, p), p)
    other = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0]).double()
    torch.testing.assert_close(
        residual(p, other), torch.tensor([0.0, 1 / 3, 0.0, 2 / 3, 0.0]).double()
    )


def of_children(p, q, width):
    """The distribution that comes out when `width` children are drawn from q."""
    found = torch.zeros_like(p)
    for children in itertools.permutations(range(len(p)), width):
        chance, left = 1.0, q.clone()
        for x in children:
            chance *= float(left[x] / left.sum())
            left[x] = 0
        if chance == 0:
            continue
        for token, share in enumerate_children(p, q, children).items():
            found[token] += chance * share
    return found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_children_without_replacement_keep_the_distribution(pair, width):
    target, draft = PAIRS[pair]
    p, q = target(()), draft(())
    width = min(width, int((q > 0).sum()))
    torch.testing.assert_close(of_children(p, q, width), p)


@pytest.mark.parametrize("seed", range(8))
def test_children_of_five_tokens(seed):
    """Where p has more than one token left after a rejection."""
    p, q = (table(10 * seed + i, vocab=5)(()) for i in range(2))
    torch.testing.assert_close(of_children(p, q, 2), p)


def enumerate_children(p, q, children):
    """The same as `outcomes`, on a fine grid made of all possible borders."""
    cuts, end = [], p
    left = q.clone()
    ends = []
    for x in children:
        cuts.append([min(1.0, float(end[x] / left[x])), 0.25, 0.5, 0.75])
        end = residual(end, left)
        left[x] = 0
        left = left / left.sum() if left.sum() > 0 else left
        ends += end.cumsum(-1).tolist()
    cuts.append(ends)
    cells = []
    for each in cuts:
        borders = sorted({0.0, 1.0, *(c for c in each if 0 < c < 1)})
        cells.append(list(itertools.pairwise(borders)))
    found = {}
    for combination in itertools.product(*cells):
        u = torch.tensor([(a + b) / 2 for a, b in combination]).double()
        size = 1.0
        for a, b in combination:
            size *= b - a
        which, token = accept_children(p, q, list(children), u)
        assert which is None or children[which] == token
        found[token] = found.get(token, 0.0) + size
    return found


def test_transformers_takes_the_same_tokens_where_its_draws_are_ours(monkeypatch):
    """Its function, with our uniforms in the place of its own."""
    from transformers.generation.utils import _speculative_sampling

    for seed in range(40):
        random = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 4, 7, generator=random, dtype=torch.float64)
        near = logits[:, :3] + 0.7 * torch.randn(
            1, 3, 7, generator=random, dtype=torch.float64
        )
        q = near.softmax(-1)[0]
        drafted = torch.multinomial(q, 1, generator=random)[:, 0].tolist()
        u = torch.rand(4, generator=random, dtype=torch.float64)
        monkeypatch.setattr(
            torch, "rand_like", lambda like, u=u: u[None, : like.numel()]
        )
        monkeypatch.setattr(
            torch,
            "multinomial",
            lambda p, num_samples, u=u: torch.tensor([[draw(p[0], u[-1])]]),
        )
        ids = torch.tensor([[1, 2, *drafted]])
        their_tokens, _ = _speculative_sampling(ids, near, 3, logits)
        monkeypatch.undo()
        ours = accept(logits.softmax(-1)[0], q, drafted, u)
        assert their_tokens[0].tolist() == ours
