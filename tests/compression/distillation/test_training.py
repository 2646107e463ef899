"""The loop: alignment, who writes the replies, our model and transformers'."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from llmlab.compression.distillation import gkd, hinton, minillm, training
from llmlab.compression.distillation.training import Batch, DistilConfig
from tests.models.hugging_face import make, theirs

V = 61  # of the small models


def texts(B=4, T=9, prompt=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=random)
    return Batch(ids, training.reply_mask(ids, prompt), prompt)


def reverse(a):
    return gkd.loss(a.teacher_logits, a.student_logits, a.mask, beta=1)


def pair(**student):
    return make(seed=1), make(seed=2, **student)


class Always(nn.Module):
    """A language model that gives the same probabilities after every token."""

    def __init__(self, probabilities):
        super().__init__()
        self.z = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids):
        return self.z.expand(*ids.shape, -1)


def test_the_logits_at_t_meet_the_token_at_t_plus_one():
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = Batch(ids, training.reply_mask(ids, 2), 2)
    z = torch.arange(4.0)[None, :, None].expand(1, 4, V)
    a = training.aligned(z + 10, z, batch)
    assert a.tokens.tolist() == [[6, 7, 8]]
    assert a.student_logits[0, :, 0].tolist() == [0, 1, 2]
    assert a.teacher_logits[0, :, 0].tolist() == [10, 11, 12]
    # the prompt's last token predicts the first of the reply
    assert a.mask.tolist() == [[False, True, True]]


def test_only_the_reply_is_learnt():
    """Whatever the prompt's own logits say, the loss is the same."""
    teacher, student = pair()
    batch = texts(T=6, prompt=5)
    a = training.aligned(teacher(batch.ids), student(batch.ids), batch)
    assert a.mask.sum() == 4
    last = reverse(a)
    of_last = gkd.loss(
        teacher(batch.ids)[:, 4:5], student(batch.ids)[:, 4:5], torch.ones(4, 1), 1
    )
    torch.testing.assert_close(last, of_last)


def test_a_reply_ends_with_its_first_end_token():
    ids = torch.tensor([[9, 9, 1, 9, 3, 9], [1, 2, 3, 4, 5, 6], [1, 1, 9, 9, 9, 9]])
    mask = training.reply_mask(ids, 2, end=9)
    # the 9s of a prompt end nothing; the end token itself is learnt
    assert mask.long().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0],
    ]


@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_replies_are_drawn_from_the_mixture(mixed):
    teacher, student = Always([0.7, 0.2, 0.1]), Always([0.1, 0.2, 0.7])
    dice = torch.Generator().manual_seed(0)
    prompts = torch.zeros(400, 2, dtype=torch.long)
    batch = training.write(student, prompts, 10, dice, teacher, mixed)
    assert batch.ids.shape == (400, 12)
    seen = torch.bincount(batch.ids[:, 2:].flatten(), minlength=3) / 4000
    expected = mixed * teacher.z.exp() + (1 - mixed) * student.z.exp()
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.03)  # 4 deviations


@pytest.mark.parametrize("mixed", [0.0, 0.5, 1.0])
def test_the_cache_changes_no_reply(mixed):
    """Ours reads each token once, transformers' all anew. Same dice, same text."""
    teacher, student = pair(num_key_value_heads=2, tie_word_embeddings=True)
    prompts = texts().ids[:, :3]
    found = []
    for models in ((student, teacher), (theirs(student), theirs(teacher))):
        dice = torch.Generator().manual_seed(5)
        found.append(training.write(models[0], prompts, 6, dice, models[1], mixed).ids)
    assert torch.equal(*found)
    assert torch.equal(found[0][:, :3], prompts)


def test_a_student_of_transformers_learns_as_ours_does():
    teacher, student = pair(num_key_value_heads=1)
    other = theirs(student)
    batches = [texts(seed=i) for i in range(4)]
    config = DistilConfig(on_policy=0.5, mixed=0.3, new_tokens=5)
    ours = training.distil(student, teacher, batches, reverse, config)
    same = training.distil(other, theirs(teacher), batches, reverse, config)
    assert ours == pytest.approx(same, rel=1e-3)


def test_the_student_comes_nearer_and_the_teacher_stays():
    teacher, student = pair()
    before = deepcopy(teacher.state_dict())
    batches = [texts(seed=0)] * 25
    losses = training.distil(student, teacher, batches, reverse)
    assert losses[-1] < 0.5 * losses[0]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in teacher.parameters())


def test_on_policy_texts_follow_the_student():
    """λ = 1: the batch's own replies are never read. λ = 0: they always are."""
    seen = []

    def watch(a):
        seen.append(a.tokens[:, 2:])
        return reverse(a)

    batches = [texts(seed=i) for i in range(12)]
    teacher, student = pair()
    for share in (0.0, 0.5, 1.0):
        seen.clear()
        config = DistilConfig(on_policy=share, new_tokens=6, seed=3)
        training.distil(deepcopy(student), teacher, batches, watch, config)
        both = zip(seen, batches, strict=True)
        kept = sum(torch.equal(tokens, batch.ids[:, 3:]) for tokens, batch in both)
        least, most = {0.0: (12, 12), 0.5: (3, 9), 1.0: (0, 0)}[share]
        assert least <= kept <= most


def test_the_loop_lets_the_teacher_write_along():
    """With α = 1 it writes alone, and never the token that the student would."""
    teacher, student = Always([1.0, 0.0, 1e-9]), Always([1e-9, 0.0, 1.0])
    seen = []

    def watch(a):
        seen.append(a.tokens)
        return hinton.hard_loss(a.student_logits, a.tokens, a.mask)

    ids = torch.ones(8, 4, dtype=torch.long)
    batch = Batch(ids, training.reply_mask(ids, 2), 2)
    for mixed in (0.0, 1.0):
        config = DistilConfig(on_policy=1.0, mixed=mixed, new_tokens=5)
        training.distil(deepcopy(student), teacher, [batch], watch, config)
    assert (seen[0][:, 1:] == 2).all()
    assert (seen[1][:, 1:] == 0).all()


def test_nothing_flows_through_the_sampling():
    """The gradient of a step is that of the loss on the texts as data."""
    teacher, student = pair()
    same = deepcopy(student)
    batch = texts()
    seen = []

    def watch(a):
        seen.append(a)
        return reverse(a)

    config = DistilConfig(on_policy=1.0, new_tokens=6, clip=1e6)
    training.distil(student, teacher, [batch], watch, config)
    ids = torch.cat([batch.ids[:, :1], seen[0].tokens], dim=1)
    assert not torch.equal(ids, batch.ids)
    data = batch._replace(ids=ids)
    reverse(training.aligned(teacher(ids).detach(), same(ids), data)).backward()
    for a, b in zip(student.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("method", ["minillm", "hinton", "hard"])
def test_every_method_fits_the_loop(method):
    losses = {
        "minillm": lambda a: minillm.loss(*a),
        "hinton": lambda a: hinton.loss(*a, temperature=2.0, alpha=0.5),
        "hard": lambda a: hinton.hard_loss(a.student_logits, a.tokens, a.mask),
    }
    teacher, student = pair()
    before = gap(teacher, student)
    config = DistilConfig(on_policy=float(method == "minillm"), mixed=0.2, lr=3e-3)
    own = [texts(B=16, T=3, seed=i).ids for i in range(30)]
    dice = torch.Generator().manual_seed(0)
    batches = [training.write(teacher, ids, 8, dice) for ids in own]
    training.distil(student, teacher, batches, losses[method], config)
    assert gap(teacher, student) < 0.9 * before


@torch.no_grad()
def gap(teacher, student):
    batch = texts(B=8, seed=77)
    return reverse(
        training.aligned(teacher(batch.ids), student(batch.ids), batch)
    ).item()


def test_the_learning_rate_rises_and_falls():
    config = DistilConfig(lr=1.0, warmup=4)
    rates = [training.learning_rate(s, 20, config) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == max(rates)
    assert rates[-1] == pytest.approx(0.05)
    assert training.learning_rate(0, 1, config) > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"on_policy": 1.5}, "on_policy=1.5 must be 0 … 1"),
        ({"mixed": -1}, "mixed=-1 must be 0 … 1"),
        ({"new_tokens": 0}, "new_tokens=0 must be at least 1"),
        ({"warmup": 0}, "warmup=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"clip": float("nan")}, "clip=nan must be positive"),
    ],
)
def test_settings_that_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        DistilConfig(**changes)


def test_what_the_loop_refuses_leaves_the_student_as_it_was():
    teacher, student = pair()
    before = deepcopy(student.state_dict())
    good = texts()
    marked = good._replace(reply=torch.ones_like(good.reply))
    cases = [
        ([], reverse, "batches is empty"),
        ([good, good._replace(reply=good.reply[:, 1:])], reverse, r"batches\[1\]: ids"),
        ([good, good._replace(prompt=0)], reverse, r"batches\[1\].prompt=0 must be 1"),
        ([marked], reverse, "marks a token of the prompt"),
        ([good], lambda a: a.student_logits.sum() * torch.nan, "is not finite"),
    ]
    for batches, loss, says in cases:
        with pytest.raises(ValueError, match=says):
            training.distil(student, teacher, batches, loss)
        for name, value in student.state_dict().items():
            assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="vocabularies differ"):
        training.distil(student, make(vocab_size=70), [good], reverse)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        training.distil(student, teacher, [good], reverse)
    dice = torch.Generator()
    with pytest.raises(ValueError, match=r"mixed=0\.5 needs a teacher"):
        training.write(student, good.ids, 2, dice, mixed=0.5)
    with pytest.raises(ValueError, match=r"mixed=2 must be 0 … 1"):
        training.write(student, good.ids, 2, dice, teacher, mixed=2)
