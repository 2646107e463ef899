"""MiniLLM by enumeration: a language of three tokens, whose every text can be read.

A student is a table of logits, one row for each beginning of a text. So KL(q‖p) between
whole texts is a finite sum, autograd gives its gradient, and the expectation of the
estimator is a sum over all texts, each with its probability.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from llmlab.compression.distillation import minillm
from llmlab.compression.distillation.divergences import kl
from llmlab.compression.distillation.minillm import MiniLLMConfig

V, LENGTH = 3, 3
END = 0  # ends a text in the languages with an end
ROWS = sum(V**t for t in range(LENGTH))  # beginnings of 0, 1, 2 tokens


def tables(seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = [
        torch.randn(ROWS, V, generator=random, dtype=torch.float64) for _ in range(2)
    ]
    return draw[0], draw[1].requires_grad_()


def every_text(with_end: bool):
    """(tokens, mask) of all texts; what comes after an end is END and masked."""
    texts = {}
    for text in itertools.product(range(V), repeat=LENGTH):
        mask = [True] * LENGTH
        if with_end and END in text:
            stop = text.index(END)
            text = text[: stop + 1] + (END,) * (LENGTH - stop - 1)
            mask = [i <= stop for i in range(LENGTH)]
        texts[text] = mask
    return torch.tensor(list(texts)), torch.tensor(list(texts.values()))


def rows_of(tokens):
    """Which row of a table predicts each token: (texts, LENGTH)."""
    rows = torch.zeros_like(tokens)
    offset, code = 0, torch.zeros(len(tokens), dtype=torch.long)
    for t in range(LENGTH):
        rows[:, t] = offset + code
        code = code * V + tokens[:, t]
        offset += V**t
    return rows


class Language:
    """All texts of a teacher's and a student's table, and what they say of them."""

    def __init__(self, seed=0, with_end=False):
        self.table_p, self.table_q = tables(seed)
        self.tokens, self.mask = every_text(with_end)
        self.rows = rows_of(self.tokens)

    def logits(self):
        return self.table_p[self.rows], self.table_q[self.rows]

    def text_log_probs(self):
        found = []
        for z in self.logits():
            of_tokens = minillm.of_tokens(z.log_softmax(-1), self.tokens)
            found.append(of_tokens.masked_fill(~self.mask, 0).sum(-1))
        return found

    def mixed_probs(self, alpha):
        """Probability of each text when token by token α p + (1−α) q writes."""
        p, q = (minillm.of_tokens(z.softmax(-1), self.tokens) for z in self.logits())
        mixed = (alpha * p + (1 - alpha) * q).masked_fill(~self.mask, 1)
        return mixed.prod(-1).detach()

    def exact_gradient(self):
        log_p, log_q = self.text_log_probs()
        loss = kl(log_q, log_p)
        return torch.autograd.grad(loss, self.table_q)[0]

    def expected_gradient(self, config):
        total = torch.zeros_like(self.table_q)
        drawn = self.mixed_probs(config.alpha)
        torch.testing.assert_close(drawn.sum().item(), 1.0)
        for i, probability in enumerate(drawn):
            teacher, student = self.logits()
            one = slice(i, i + 1)
            loss = minillm.loss(
                teacher[one],
                student[one],
                self.tokens[one],
                self.mask[one],
                config,
            )
            total += probability * torch.autograd.grad(loss, self.table_q)[0]
        return total


@pytest.mark.parametrize("with_end", [False, True])
def test_on_its_own_texts_the_estimate_is_unbiased(with_end):
    language = Language(with_end=with_end)
    config = MiniLLMConfig(alpha=0.0, length_norm=False)
    expected = language.expected_gradient(config)
    torch.testing.assert_close(expected, language.exact_gradient())


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_with_exact_weights_the_teacher_may_write_along(alpha, with_end):
    language = Language(seed=1, with_end=with_end)
    config = MiniLLMConfig(alpha, "exact", length_norm=False)
    expected = language.expected_gradient(config)
    torch.testing.assert_close(expected, language.exact_gradient())


def test_the_papers_weights_are_biased_and_its_full_product_too():
    language = Language(seed=1)
    exact = language.exact_gradient()
    bias = {}
    for weights in ("exact", "prefix", "token"):
        config = MiniLLMConfig(0.2, weights, length_norm=False)
        gap = language.expected_gradient(config) - exact
        bias[weights] = float(gap.norm() / exact.norm())
    assert bias["exact"] < 1e-12
    assert 0.01 < bias["prefix"] < bias["token"] < 0.5


def test_for_texts_of_one_token_there_is_only_the_single_step():
    """Then every weighting is exact, and no luck is left where q itself writes."""
    p, q = (t[:1].detach() for t in tables())
    q.requires_grad_()
    exact = torch.autograd.grad(kl(q.log_softmax(-1), p.log_softmax(-1)).sum(), q)[0]
    for token in range(V):
        config = MiniLLMConfig(alpha=0.0)
        tokens = torch.tensor([[token]])
        loss = minillm.loss(p[None], q[None], tokens, torch.ones(1, 1), config)
        torch.testing.assert_close(torch.autograd.grad(loss, q)[0], exact)


def test_the_decomposition_is_the_plain_policy_gradient_with_less_spread():
    """−(R_t − 1) ∇ log q has the same mean; the variance over texts is larger."""
    language = Language(seed=2)
    drawn = language.mixed_probs(0.0)
    config = MiniLLMConfig(alpha=0.0, length_norm=False)
    gradients = {"plain": [], "decomposed": []}
    for i in range(len(drawn)):
        teacher, student = (z[i : i + 1] for z in language.logits())
        one = language.tokens[i : i + 1], language.mask[i : i + 1]
        log_p = minillm.of_tokens(teacher.log_softmax(-1), one[0])
        log_q = minillm.of_tokens(student.log_softmax(-1), one[0])
        r = (log_p - log_q).detach()
        R = r.flip(-1).cumsum(-1).flip(-1)
        plain = -((R - 1) * log_q).sum()
        decomposed = minillm.loss(teacher, student, *one, config)
        for name, value in (("plain", plain), ("decomposed", decomposed)):
            grad = torch.autograd.grad(value, language.table_q, retain_graph=True)[0]
            gradients[name].append(grad.flatten())
    spread = {}
    for name, found in gradients.items():
        found = torch.stack(found)
        mean = (drawn[:, None] * found).sum(0)
        torch.testing.assert_close(mean, language.exact_gradient().flatten())
        spread[name] = float((drawn[:, None] * (found - mean) ** 2).sum())
    assert spread["decomposed"] < 0.8 * spread["plain"]


def test_importance_weights_average_to_one():
    language = Language(seed=3)
    alpha = 0.4
    p, q = (
        minillm.of_tokens(z.log_softmax(-1), language.tokens) for z in language.logits()
    )
    log_mixed = minillm.mixture(p, q, alpha)
    drawn = language.mixed_probs(alpha)
    for product in (False, True):
        w = minillm.importance_weights(q, log_mixed, language.mask, product)
        assert not w.requires_grad
        mean = (drawn[:, None] * w).sum(0)
        torch.testing.assert_close(mean, torch.ones(LENGTH, dtype=torch.float64))
    own = minillm.importance_weights(q, q, language.mask, product=True)
    torch.testing.assert_close(own, torch.ones_like(own))


def test_the_product_starts_with_the_reply():
    log_q = torch.tensor([[0.7, 0.5, 0.5, 0.2, 0.9]]).log()
    log_mixed = torch.tensor([[0.1, 0.25, 0.5, 0.4, 0.3]]).log()
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    w = minillm.importance_weights(log_q, log_mixed, mask)
    torch.testing.assert_close(w, torch.tensor([[1.0, 2.0, 1.0, 0.5, 1.0]]))
    w = minillm.importance_weights(log_q, log_mixed, mask, product=True)
    torch.testing.assert_close(w, torch.tensor([[1.0, 2.0, 2.0, 1.0, 1.0]]))


def test_reward_to_go_by_hand():
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    # the prompt and the padding (9 and 7) count for nothing
    sums = minillm.reward_to_go(rewards, mask, length_norm=False)
    assert sums[0, 1:4].tolist() == [6.0, 4.0, 0.0]
    means = minillm.reward_to_go(rewards, mask)
    assert means[0, 1:4].tolist() == [3.0, 4.0, 0.0]


def test_length_norm_makes_a_long_reply_of_equal_rewards_worth_a_short_one():
    for length in (2, 5):
        rewards = torch.full((1, length), -3.0)
        found = minillm.reward_to_go(rewards, torch.ones(1, length))
        assert found[0].tolist() == [-3.0] * (length - 1) + [0.0]


def test_what_the_mask_hides_has_no_gradient_and_no_say():
    language = Language(seed=1, with_end=True)
    i = language.mask.sum(-1).tolist().index(2)
    teacher, student = (z[i : i + 1].detach().clone() for z in language.logits())
    tokens, mask = language.tokens[i : i + 1], language.mask[i : i + 1]
    gradients = []
    for hidden in (0.0, 5.0):
        z = student.clone()
        z[:, 2, 0] += hidden
        z.requires_grad_()
        minillm.loss(teacher, z, tokens, mask).backward()
        assert (z.grad[:, 2] == 0).all()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_no_gradient_reaches_the_teacher_or_passes_through_weights_and_rewards():
    language = Language()
    teacher, student = (z[:4].detach().requires_grad_() for z in language.logits())
    minillm.loss(teacher, student, language.tokens[:4], language.mask[:4]).backward()
    assert teacher.grad is None
    # by hand, with numbers in the place of weights and rewards
    log_p, log_q = (z.log_softmax(-1) for z in (teacher.detach(), student))
    p_y, q_y = (minillm.of_tokens(x, language.tokens[:4]) for x in (log_p, log_q))
    q = q_y.exp().detach()
    w = q / (0.2 * p_y.exp() + 0.8 * q)
    r = (p_y - q_y).detach()
    R = torch.stack([(r[:, 1] + r[:, 2]) / 2, r[:, 2], 0 * r[:, 0]], 1)
    value = (w * (kl(log_q, log_p) - R * q_y)).sum() / 4
    torch.testing.assert_close(student.grad, torch.autograd.grad(value, student)[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": -0.1}, "alpha=-0.1 must be 0 … 1"),
        ({"weights": "all"}, "weights='all' must be one of"),
    ],
)
def test_settings_that_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        MiniLLMConfig(**changes)


def test_shapes_that_are_refused():
    z = torch.zeros(2, 3, 5)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones(2, 3)
    for given, says in (
        ((z[..., :4], z, tokens, mask), "vocabularies differ"),
        ((z, z, tokens[:, 1:], mask), r"tokens has shape \(2, 2\)"),
        ((z, z, tokens, mask[:1]), r"mask has shape \(1, 3\)"),
        ((z, z, tokens, 0 * mask), "mask is all zeros"),
    ):
        with pytest.raises(ValueError, match=says):
            minillm.loss(*given)
