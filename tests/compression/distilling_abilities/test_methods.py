"""Each method: its filter, its loss or its score, by enumeration and in closed form."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from llmlab.compression.distillation import gkd
from llmlab.compression.distilling_abilities import (
    consistency,
    contrastive,
    counterfactuals,
    exact_match,
    in_context,
    keep,
    learning,
    lion,
    mt_cot_loss,
    rationales,
    socratic,
    tasks,
)

CHAINS = list(dict.fromkeys(tasks.draw(60, (1, 2, 3), random.Random(0))))


# Fine-tune-CoT ------------------------------------------------------------------------


def test_rationales_are_true_and_end_in_the_answer():
    for chain in CHAINS:
        for dice in (None, random.Random(chain)):
            text = rationales.rationale(chain, dice)
            assert tasks.last_number(text) == tasks.answer(chain)
            assert rationales.sound(text)
            assert text.count("=") == len(tasks.steps_of(chain))
    assert rationales.rationale("3+5*2-4") == "3+5=8;8*2=6;6-4=2#2"


def test_sums_and_products_are_written_both_ways_and_differences_are_not():
    dice = random.Random(0)
    texts = {rationales.rationale("3+5*2-4", dice) for _ in range(200)}
    assert len(texts) == 4
    assert all("6-4=2" in text for text in texts)


def test_mistakes_come_at_their_rate_and_are_carried_on():
    dice = random.Random(0)
    texts = [rationales.rationale("3+5", dice, 0.3) for _ in range(3000)]
    assert sum(map(rationales.sound, texts)) / 3000 == pytest.approx(0.7, abs=0.03)
    wrong = rationales.rationale("3+5*2", random.Random(3), 1.0)
    first, second = wrong.split("#")[0].split(";")
    assert first[4] in second[:3]
    assert not rationales.sound(wrong)


def test_keep_against_a_loop():
    dice = random.Random(1)
    sampled = [rationales.rationale("3+5*2-4", dice, 0.4) for _ in range(60)]
    for most in (None, 1, 3, 100):
        kept = []
        for text in sampled:
            if text.endswith("#2") and text not in kept and len(kept) < (most or 99):
                kept.append(text)
        assert keep(sampled, 2, most) == kept
    assert keep(["8#12", "2#8", "#2"], 2) == ["#2"]


def test_the_filter_lets_mistakes_through_that_cancel():
    """5 · 2 and 5 · 4 are both 0: the answer does not see it."""
    text = "3+5=5;5*5=5#5"
    assert keep([text], 5) == [text]
    assert not rationales.sound(text)


def test_diverse_gives_each_question_different_right_rationales():
    examples = rationales.diverse(CHAINS, 3, random.Random(0))
    assert len(set(examples)) == len(examples)
    for prompt, group in itertools.groupby(examples, lambda e: e.prompt):
        texts = [e.reply[:-1] for e in group]
        answers = [tasks.answer(prompt[:-1])] * len(texts)
        assert exact_match(texts, answers) == 1


# MT-CoT -------------------------------------------------------------------------------


def test_mt_cot_weighs_two_means():
    torch.manual_seed(0)
    a, r = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 9, 7)
    of_a, of_r = torch.randint(7, (3, 5)), torch.randint(7, (3, 9))
    of_a[:, :3] = -100
    of_r[0, :4] = -100

    def mean(logits, wanted):
        flat = logits[:, :-1].reshape(-1, 7)
        return F.cross_entropy(flat, wanted[:, 1:].reshape(-1), ignore_index=-100)

    for alpha in (0.0, 0.3, 1.0):
        found = mt_cot_loss(a, of_a, r, of_r, alpha)
        wanted = alpha * mean(a, of_a) + (1 - alpha) * mean(r, of_r)
        torch.testing.assert_close(found, wanted)
        (grad,) = torch.autograd.grad(found, a)
        (theirs,) = torch.autograd.grad(wanted, a)
        torch.testing.assert_close(grad, theirs)


def test_both_tasks_ask_the_same_questions():
    seen = []

    class Reader(torch.nn.Module):
        def forward(self, ids):
            seen.append([tasks.decode(row.tolist()) for row in ids])
            return torch.zeros(*ids.shape, len(tasks.CHARACTERS))

    loss = rationales.both_tasks(CHAINS, batch=5)(Reader(), random.Random(0))
    assert loss.item() == pytest.approx(torch.tensor(27.0).log().item(), abs=0.2)
    answers, long = seen
    for short, explained in zip(answers, long, strict=True):
        assert short[0] == "A" and explained[0] == "R"
        assert short.split(":")[0][1:] == explained.split(":")[0][1:]
        assert short.split("#")[1].strip("_") == explained.split("#")[1].strip("_")


# SOCRATIC -----------------------------------------------------------------------------


class ByRule:
    """Stands in for a student: writes what a rule says."""

    def __init__(self, rule):
        self.rule = rule


def test_perfect_students_solve_every_chain(monkeypatch):
    def write(student, prompts, new_tokens):
        return [student.rule(prompt)[:new_tokens] for prompt in prompts]

    monkeypatch.setattr(socratic, "write", write)
    split = ByRule(lambda p: ";".join(socratic.sub_questions(p[:-1])))
    solver = ByRule(lambda p: str(tasks.answer(p[:-1])))
    replies = socratic.solve(split, solver, CHAINS)
    assert exact_match(replies, [tasks.answer(c) for c in CHAINS]) == 1
    assert replies == [rationales.rationale(c) for c in CHAINS]


def test_sub_questions_and_what_the_solver_reads():
    assert socratic.sub_questions("3+5*2-4") == ["3+5", "?*2", "?-4"]
    [split] = socratic.for_decomposer(["3+5*2"])
    assert split == ("3+5*2:", "3+5;?*2.")
    assert socratic.for_solver(["3+5*2"]) == [("3+5=", "8."), ("8*2=", "6.")]


# DISCO --------------------------------------------------------------------------------


def test_edits_change_one_digit_and_never_the_letter():
    dice = random.Random(0)
    for question, _ in tasks.draw_comparisons(300, 0.5, dice):
        edited = counterfactuals.edit(question, dice)
        differ = [i for i in range(6) if question[i] != edited[i]]
        assert len(differ) == 1 and edited[differ[0]].isdigit()
        assert edited[0] == question[0] and "0" not in (edited[1], edited[4])


def test_shift_is_the_growth_of_the_new_label():
    before = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    after = torch.tensor([[0.3, 0.7], [0.1, 0.9]])
    found = counterfactuals.shift(before, after, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.6, -0.1]))


def test_a_perfect_teacher_keeps_what_turned(monkeypatch):
    def sure(model, questions):
        yes = torch.tensor([float(tasks.compare(q) == "y") for q in questions])
        return torch.stack([1 - yes, yes], dim=1)

    monkeypatch.setattr(counterfactuals, "beliefs", sure)
    pairs = tasks.draw_comparisons(500, 0.9, random.Random(0))
    everything = counterfactuals.disco(pairs, None, random.Random(1))
    kept = counterfactuals.disco(pairs, object(), random.Random(1))
    assert kept == [(q, label) for q, label in everything if tasks.compare(q) == label]
    assert 0 < len(kept) < len(everything) == 500


def test_beliefs_are_of_two_labels():
    student = learning.new_student(0, width=16)
    found = counterfactuals.beliefs(student, ["a47>38", "b12>90"])
    logits = student(torch.tensor([tasks.encode("a47>38:")]))[0, -1]
    expected = logits[tasks.encode("ny")].softmax(-1)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_consistency_of_all_pairs_by_enumeration():
    rows = list(itertools.product("yn", repeat=4))
    a, label, b, other = zip(*rows, strict=True)
    changed, both = consistency(a, label, b, other)
    assert changed == 0.5 and both == 0.25
    assert consistency("yy", "yn", "nn", "ny") == (1.0, 0.5)
    assert consistency("y", "y", "y", "n") == (0.0, 0.0)


# SCOTT --------------------------------------------------------------------------------


def test_contrastive_score_in_closed_form():
    likely = torch.tensor([0.6, 0.3, 0.05, 0.05])
    alone = torch.tensor([0.6, 0.05, 0.05, 0.3])
    score = contrastive(likely.log() + 3, alone.log() - 2, 1.0)
    torch.testing.assert_close(score, (likely / alone).log())
    assert likely.argmax() == 0 and score.argmax() == 1
    torch.testing.assert_close(
        contrastive(likely.log(), alone.log(), 0.0), likely.log()
    )


def test_contrastive_ignores_what_shifts_all_logits():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 7)
    moved = contrastive(a + torch.randn(3, 5, 1), b + torch.randn(3, 5, 1), 0.5)
    torch.testing.assert_close(moved, contrastive(a, b, 0.5), rtol=1e-5, atol=1e-5)


def test_only_the_answer_of_a_counterfactual_is_learnt():
    example = counterfactuals.counterfactual("3+5", 6)
    assert example == ("C3+5:3+5=6#", "6.")
    _, wanted = learning.collate([example])
    assert (wanted != learning.IGNORED).sum() == 2
    assert counterfactuals.factual("3+5", 6) == ("F3+5:", "3+5=6#8.")


# In-context ---------------------------------------------------------------------------


def test_streams_show_what_they_say():
    dice = random.Random(0)
    task = in_context.code(dice)
    text, shown = in_context.stream(task, 3, 12, dice)
    assert len(text) == 24 and len(set(text[0::2])) <= 3
    for i, (letter, digit) in enumerate(zip(text[0::2], text[1::2], strict=True)):
        assert task[letter] == digit
        assert shown[i] == (letter in text[: 2 * i : 2])


def test_icl_loss_is_hard_plus_weighted_soft():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher, wanted = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    hard = F.cross_entropy(student.reshape(6, 5), wanted.reshape(6))
    soft = gkd.loss(teacher, student, torch.ones(2, 3), beta=0)
    found = in_context.icl_loss(student, wanted, teacher, 0.7)
    torch.testing.assert_close(found, hard + 0.7 * soft)
    (grad,) = torch.autograd.grad(found, student, retain_graph=True)
    (theirs,) = torch.autograd.grad(hard + 0.7 * soft, student)
    torch.testing.assert_close(grad, theirs)
    torch.testing.assert_close(in_context.icl_loss(student, wanted), hard)
    assert not torch.equal(grad, torch.zeros_like(grad))


def test_the_teacher_of_icl_gets_no_gradient():
    teacher = torch.randn(1, 2, 5, requires_grad=True)
    student = torch.randn(1, 2, 5, requires_grad=True)
    in_context.icl_loss(student, torch.tensor([[0, 1]]), teacher).backward()
    assert teacher.grad is None


def test_a_reader_that_looks_back_is_always_right():
    class LooksBack(torch.nn.Module):
        def forward(self, ids):
            out = torch.zeros(*ids.shape, len(tasks.CHARACTERS))
            for b, t in itertools.product(*map(range, ids.shape)):
                same = (ids[b, :t] == ids[b, t]).nonzero()
                if len(same):
                    out[b, t, ids[b, same[-1] + 1]] = 9.0
            return out

    assert in_context.accuracy(LooksBack(), 20, random.Random(0)) == 1


# Lion ---------------------------------------------------------------------------------


def test_hard_is_a_mean_over_both_orders_and_holds_the_threshold():
    teacher = torch.tensor([[9.0, 9.0], [9.0, 7.0], [8.0, 8.0], [5.0, 5.0]])
    student = torch.tensor([[8.0, 8.0], [9.0, 6.0], [7.5, 7.0], [9.0, 9.0]])
    # differences 1, 0.5, 0.75, −4
    assert lion.hard(teacher, student).tolist() == [True, False, False, False]
    assert lion.hard(teacher, student, 0.6).tolist() == [True, False, True, False]


def test_generated_chains_are_as_long_as_what_they_are_like():
    dice = random.Random(0)
    made = lion.generate(["1+1*2-3"], ["1+1"], 100, dice, 0.3)
    lengths = [len(tasks.steps_of(chain)) for chain in made]
    assert lengths.count(3) == 30 and lengths.count(1) == 70
    assert {len(tasks.steps_of(c)) for c in lion.generate([], ["1+1"], 9, dice)} == {1}
    assert {len(tasks.steps_of(c)) for c in lion.generate(["1+1-1"], [], 9, dice)} == {
        2
    }


def test_the_referee_reads_the_last_number():
    assert lion.score("3+5=8#8", 8) == 10 and lion.score("8#7", 8) == 1


D = random.Random(0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rationales.rationale("3+5", D, 1.5), "mistakes=1.5"),
        (lambda: rationales.rationale("3+5", None, 0.5), "mistakes=0.5 need dice"),
        (lambda: keep([], 1, 0), "most=0"),
        (lambda: mt_cot_loss(None, None, None, None, -0.1), "alpha=-0.1"),
        (lambda: consistency("y", "y", "y", ""), "as many"),
        (lambda: consistency("", "", "", ""), "at least one"),
        (lambda: contrastive(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda: contrastive(torch.ones(2), torch.ones(2), -1), "weight=-1"),
        (lambda: in_context.stream({}, 9, 3, D), "letters=9"),
        (lambda: in_context.stream({}, 2, 0, D), "queries=0"),
        (
            lambda: in_context.icl_loss(
                torch.ones(1, 1, 2), torch.zeros(1, 1), None, -1
            ),
            "weight=-1",
        ),
        (lambda: lion.hard(torch.ones(2, 2), torch.ones(3, 2)), "same instructions"),
        (lambda: lion.generate([], [], 3, D), "both empty"),
        (lambda: lion.generate(["1+1"], [], 3, D, 2), "share=2"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
