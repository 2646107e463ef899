"""Labels against TRL's, the loss against transformers', and the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from llmlab.compression.distilling_abilities import (
    Example,
    fit,
    labels,
    learning,
    rationales,
    tasks,
    write,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "distilling_abilities.json").read_text()
)
COMPLETIONS = [case for case in GOLDEN["cases"] if case["completion_only"] is not False]


@pytest.mark.parametrize(
    "case", COMPLETIONS, ids=lambda c: f"pad {c['pad']} {c['completion_only']}"
)
def test_labels_are_those_of_trl(case):
    """Also where the pad token is the end token: the end is learnt all the same."""
    ids = torch.tensor(case["ids"])
    prompts = torch.tensor([len(prompt) for prompt, _ in GOLDEN["examples"]])
    lengths = torch.tensor([len(p) + len(r) for p, r in GOLDEN["examples"]])
    assert labels(ids, prompts, lengths).tolist() == case["labels"]


def test_trl_learns_prompts_only_if_told_to():
    for case in GOLDEN["cases"]:
        learnt = case["labels"][0][0] != learning.IGNORED
        assert learnt == (case["completion_only"] is False)


def test_labels_by_enumeration():
    torch.manual_seed(0)
    ids = torch.randint(9, (6, 11))
    prompts, lengths = (
        torch.tensor([1, 3, 4, 9, 10, 2]),
        torch.tensor([2, 7, 5, 11, 11, 8]),
    )
    before = ids.clone()
    found = labels(ids, prompts, lengths)
    for row in range(6):
        for t in range(11):
            learnt = prompts[row] <= t < lengths[row]
            assert found[row, t] == (ids[row, t] if learnt else learning.IGNORED)
    assert torch.equal(ids, before)


def test_collate_holds_the_texts():
    examples = [Example("3+5:", "#8."), Example("7*9-1:", "7*9=3#2.")]
    ids, wanted = learning.collate(examples)
    assert ids.shape == (2, 14)
    for row, example in zip(wanted, examples, strict=True):
        kept = row[row != learning.IGNORED].tolist()
        assert "".join(tasks.CHARACTERS[i] for i in kept) == example.reply


def test_the_loss_and_its_gradient_are_those_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(2, 14, len(tasks.CHARACTERS), requires_grad=True)
    _, wanted = learning.collate(
        [Example("3+5:", "#8."), Example("7*9-1:", "7*9=3#2.")]
    )
    loss = learning.mean_loss(logits, wanted)
    (grad,) = torch.autograd.grad(loss, logits)
    log_q = logits.log_softmax(-1)
    by_hand = [
        -log_q[b, t - 1, wanted[b, t]]
        for b in range(2)
        for t in range(1, 14)
        if wanted[b, t] != learning.IGNORED
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    loss = ForCausalLMLoss(logits, wanted, logits.shape[-1])
    torch.testing.assert_close(learning.mean_loss(logits, wanted), loss)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, logits)[0])


def test_padding_does_not_change_the_loss():
    student = learning.new_student(0, width=16)
    short, long = Example("3+5:", "#8."), Example("3+5*2-4:", "3+5=8;8*2=6;6-4=2#2.")

    def loss(examples):
        ids, wanted = learning.collate(examples)
        count = (wanted != learning.IGNORED).sum()
        return learning.mean_loss(student(ids), wanted) * count

    together, apart = loss([short, long]), loss([short]) + loss([long])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_the_loop_learns_and_replies_stop_at_the_end():
    examples = rationales.answers_only(["3+5", "7*9", "2-8"])
    student = learning.new_student(0, width=32)
    losses = fit(student, learning.on(examples, 8), 150, seed=0)
    assert losses[-1] < 0.05 < losses[0]
    # prompts of two lengths, in the order asked
    assert write(student, ["7*9:", "3+5:", "2-8:"], 5) == ["#3", "#8", "#4"]
    again = learning.new_student(0, width=32)
    assert fit(again, learning.on(examples, 8), 150, seed=0) == losses


def test_replies_come_in_the_order_of_the_prompts():
    student = learning.new_student(0, width=16)
    prompts = ["3+5:", "3+5*2-4:", "7*9:", "1+1*1-1:"]
    together = write(student, prompts, 4)
    assert together == [write(student, [prompt], 4)[0] for prompt in prompts]


def test_a_step_without_a_number_changes_nothing():
    student = learning.new_student(0, width=16)
    before = [p.clone() for p in student.parameters()]

    def broken(model, dice):
        return next(model.parameters()).sum() * float("nan")

    with pytest.raises(ValueError, match="step 0 is not finite"):
        fit(student, broken, 3)
    assert all(map(torch.equal, before, student.parameters()))


def one(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: labels(torch.ones(1, 4).long(), one(0), one(3)), "0 < prompt"),
        (lambda: labels(torch.ones(1, 4).long(), one(3), one(3)), "0 < prompt"),
        (lambda: labels(torch.ones(1, 4).long(), one(1), one(5)), "length ≤ 4"),
        (lambda: learning.collate([]), "examples is empty"),
        (lambda: learning.collate([Example("3+5:", "")]), "0 < prompt"),
        (
            lambda: learning.mean_loss(torch.ones(1, 3, 5), torch.full((1, 3), -100)),
            "labels are all -100",
        ),
        (lambda: fit(None, None, 0), "steps=0"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
