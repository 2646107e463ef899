"""Students of small teachers: llmlab/compression/data/distilling_abilities.csv.

    python scripts/distilling_abilities_sweep.py            continue, a line a run (up
                                                            to half a minute each)
    python scripts/distilling_abilities_sweep.py --check 1  run so many lines again

A student is a Llama of 0.1 M parameters without any training before. Six comparisons,
three seeds; the seed draws first weights, questions and batches:

    chains    arithmetic, 2,000 questions of one to three steps: answers only, also for
              as many tokens as with rationales; rationales; MT-CoT; SOCRATIC CoT
    shortcut  a letter that agrees with 97% of the labels; half of the examples edited
              (DISCO), with the teacher's filter and without
    lion      a pool of mostly easy questions, renewed twice: at random, or like
              questions that were hard
    diverse   400 questions, one or up to four rationales each
    faithful  SCOTT: rationales half of which are wrong, or right ones; with the
              counterfactual loss and without
    context   demonstrations: hard labels, or hard and soft ones
"""

from __future__ import annotations

import random
from collections.abc import Callable

import sweeping
import torch

from llmlab.compression.distilling_abilities import (
    FILE,
    Example,
    consistency,
    counterfactuals,
    exact_match,
    fit,
    in_context,
    learning,
    lion,
    rationales,
    socratic,
    tasks,
    write,
)

SEEDS = (0, 1, 2)
# What is run first comes first, for all seeds.
GROUPS = [
    [
        ("chains", "answers"),
        ("chains", "rationales"),
        ("shortcut", "none"),
        ("shortcut", "unfiltered"),
        ("shortcut", "filtered"),
    ],
    [
        ("faithful", "wrong"),
        ("faithful", "wrong, counterfactual"),
        ("faithful", "right"),
        ("faithful", "right, counterfactual"),
    ],
    [("chains", "SOCRATIC")],
    [("chains", "MT-CoT"), ("chains", "answers, tokens")],
    [("lion", "random"), ("lion", "hard")],
    [("context", "hard"), ("context", "soft")],
    [("diverse", "1"), ("diverse", "4")],
]
RUNS = [(*run, seed) for group in GROUPS for seed in SEEDS for run in group]
STEPS = 400
EASY = (1,) * 8 + (2, 3)  # steps of the pool's chains: eight of ten have one
Solver = Callable[[list[str]], list[str]]


def held_out(steps: int, known: set[str], count: int = 200) -> list[str]:
    """Chains of so many steps that are not in the training questions."""
    drawn = tasks.draw(4 * count, (steps,), random.Random(900 + steps))
    return [chain for chain in drawn if chain not in known][:count]


def graded(solver: Solver, steps: int, known: set[str]) -> float:
    chains = held_out(steps, known)
    return exact_match(solver(chains), [tasks.answer(chain) for chain in chains])


def solver_of(student, task: str = "") -> Solver:
    """Greedy replies of one student."""
    return lambda chains: write(student, [f"{task}{chain}:" for chain in chains], 32)


def tokens(examples: list[Example]) -> float:
    """Of an example, on average."""
    return sum(len(e.prompt + e.reply) for e in examples) / len(examples)


def chains(method: str, seed: int) -> dict[str, float]:
    """a, b: accuracy on three steps and on four, more than ever seen. c: MT-CoT's when
    it answers at once; SOCRATIC's on four with the teacher's sub-questions.
    """
    known = tasks.draw(2000, (1, 2, 3), random.Random(seed))
    answers = rationales.answers_only(known)
    explained = rationales.with_rationales(known)
    student = learning.new_student(seed)
    found = {}
    if method == "SOCRATIC":
        fit(student, learning.on(socratic.for_decomposer(known)), 250, seed=seed)
        solver = learning.new_student(seed + 100)
        fit(solver, learning.on(socratic.for_solver(known)), 200, seed=seed)

        def solve(asked: list[str]) -> list[str]:
            return socratic.solve(student, solver, asked)

        asked = held_out(4, set())
        given = socratic.answer_all(solver, [socratic.sub_questions(c) for c in asked])
        found["c"] = exact_match(given, [tasks.answer(chain) for chain in asked])
    elif method == "MT-CoT":
        fit(student, rationales.both_tasks(known), STEPS, seed=seed)
        solve = solver_of(student, "R")
        found["c"] = graded(solver_of(student, "A"), 3, set(known))
    else:
        steps = STEPS
        if method == "answers, tokens":
            steps = round(STEPS * tokens(explained) / tokens(answers))
        examples = explained if method == "rationales" else answers
        fit(student, learning.on(examples), steps, seed=seed)
        solve = solver_of(student)
    found["a"] = graded(solve, 3, set(known))
    found["b"] = graded(solve, 4, set(known))
    return found


def labelled(pairs: list[tuple[str, str]]) -> list[Example]:
    return [Example(f"{question}:", f"{label}.") for question, label in pairs]


class Shortcut:
    """A teacher that has seen letters which say nothing, and pairs to judge by."""

    def __init__(self) -> None:
        drawn = tasks.draw_comparisons(4000, 0.5, random.Random(77))
        self.teacher = learning.new_student(50)
        fit(self.teacher, learning.on(labelled(drawn)), 300)
        self.judged = tasks.draw_comparisons(500, 0.97, random.Random(6))
        dice = random.Random(8)
        self.pairs = []
        while len(self.pairs) < 400:
            [(question, label)] = tasks.draw_comparisons(1, 0.97, dice)
            edited = counterfactuals.edit(question, dice)
            left, right = edited[1:].split(">")
            if left != right and tasks.compare(edited) != label:
                self.pairs.append((question, label, edited, tasks.compare(edited)))

    def run(self, method: str, seed: int) -> dict[str, float]:
        """a: accuracy where the letter mostly agrees; b, c: pairs whose prediction
        changed, and pairs both right; d: true labels among the edited questions.
        """
        dice = random.Random(seed)
        examples = tasks.draw_comparisons(2000, 0.97, dice)
        found = {}
        if method != "none":
            teacher = self.teacher if method == "filtered" else None
            source = tasks.draw_comparisons(6000, 0.97, dice)
            edited = counterfactuals.disco(source, teacher, dice)[:1000]
            truth = [tasks.compare(question) == label for question, label in edited]
            found["d"] = sum(truth) / len(truth)
            examples = examples[:1000] + edited
        student = learning.new_student(seed)
        fit(student, learning.on(labelled(examples)), 250, seed=seed)

        def predicted(questions: list[str]) -> list[str]:
            return write(student, [f"{question}:" for question in questions], 2)

        right = [
            reply == label
            for reply, (_, label) in zip(
                predicted([q for q, _ in self.judged]), self.judged, strict=True
            )
        ]
        before, labels, after, new = zip(*self.pairs, strict=True)
        changed, both = consistency(
            predicted(list(before)), labels, predicted(list(after)), new
        )
        return {"a": sum(right) / len(right), "b": changed, "c": both} | found


def lion_loop(method: str, seed: int) -> dict[str, float]:
    """a, b, c: accuracy on one, two and three steps after three rounds; d: on all
    before the first renewal.
    """
    dice = random.Random(seed)
    student = learning.new_student(seed)
    pool = tasks.draw(600, EASY, dice)
    found = {}
    for turn in range(3):
        examples = rationales.with_rationales(pool)
        fit(student, learning.on(examples), 200, lr=2e-3, seed=seed + turn)
        if turn == 0:
            of_all = [graded(solver_of(student), n, set()) for n in (1, 2, 3)]
            found["d"] = sum(of_all) / 3
        cache = tasks.draw(300, EASY, dice)
        if method == "random":
            pool = tasks.draw(600, EASY, dice)
            continue
        replies = solver_of(student)(cache)
        scores = [
            [lion.score(reply, tasks.answer(chain))] * 2
            for reply, chain in zip(replies, cache, strict=True)
        ]
        student_scores = torch.tensor(scores)
        best = torch.full_like(student_scores, lion.BEST)
        behind = lion.hard(best, student_scores).tolist()
        hard = [c for c, is_hard in zip(cache, behind, strict=True) if is_hard]
        easy = [c for c, is_hard in zip(cache, behind, strict=True) if not is_hard]
        pool = lion.generate(hard, easy, 600, dice, share=1.0)
    for name, n in (("a", 1), ("b", 2), ("c", 3)):
        found[name] = graded(solver_of(student), n, set())
    return found


def diverse(method: str, seed: int) -> dict[str, float]:
    """a: accuracy on three steps; b: rationales that are true in every line, of those
    that the filter let through; c: how many there were.
    """
    known = tasks.draw(400, (3,), random.Random(seed))
    examples = rationales.diverse(known, int(method), random.Random(seed))
    student = learning.new_student(seed)
    fit(student, learning.on(examples), STEPS, seed=seed)
    true = [rationales.sound(e.reply.rstrip(tasks.END)) for e in examples]
    return {
        "a": graded(solver_of(student), 3, set(known)),
        "b": sum(true) / len(true),
        "c": len(examples),
    }


def faithful(method: str, seed: int) -> dict[str, float]:
    """a: accuracy by its own rationale; b: how often its answer follows a rationale
    that leads elsewhere, both under [factual]; c: b under [counterfactual].
    """
    dice = random.Random(seed)
    known = tasks.draw(2000, (1,), dice)
    written, led = [], []
    for chain in known:
        truth = tasks.answer(chain)
        elsewhere = (truth + dice.randint(1, 9)) % 10
        wrong = method.startswith("wrong") and dice.random() < 0.5
        written.append(counterfactuals.factual(chain, elsewhere if wrong else truth))
        led.append(counterfactuals.counterfactual(chain, elsewhere))
    factual, counter = learning.on(written), learning.on(led)

    def both(student, dice):
        return factual(student, dice) + counter(student, dice)

    student = learning.new_student(seed)
    loss = both if method.endswith("counterfactual") else factual
    fit(student, loss, 200, seed=seed)
    judged = tasks.draw(300, (1,), random.Random(4))
    dice = random.Random(5)
    led_to = [(tasks.answer(chain) + dice.randint(1, 9)) % 10 for chain in judged]
    found = {"a": exact_match(solver_of(student, "F")(judged), answers_of(judged))}
    for name, task in (("b", "F"), ("c", "C")):
        prompts = [
            counterfactuals.counterfactual(chain, value, task).prompt
            for chain, value in zip(judged, led_to, strict=True)
        ]
        found[name] = exact_match(write(student, prompts, 2), led_to)
    return found


def answers_of(asked: list[str]) -> list[int]:
    return [tasks.answer(chain) for chain in asked]


class Context:
    """A teacher that reads demonstrations, and students."""

    def __init__(self) -> None:
        self.teacher = learning.new_student(50)
        fit(self.teacher, in_context.on_streams(), 600)

    def run(self, method: str, seed: int) -> dict[str, float]:
        """a: accuracy on codes never seen; b: the teacher's."""
        student = learning.new_student(seed, width=48)
        teacher = self.teacher if method == "soft" else None
        fit(student, in_context.on_streams(teacher=teacher), 200, seed=seed)
        return {
            "a": in_context.accuracy(student, 200, random.Random(3)),
            "b": in_context.accuracy(self.teacher, 200, random.Random(3)),
        }


class Sweep:
    """Teachers are trained when they are needed, once."""

    def __init__(self) -> None:
        self.made: dict[str, Shortcut | Context] = {}

    def run(self, part: str, method: str, seed: int) -> dict:
        """One line of the file."""
        makers = {"shortcut": Shortcut, "context": Context}
        if part in makers:
            if part not in self.made:
                self.made[part] = makers[part]()
            found = self.made[part].run(method, seed)
        else:
            runs = {
                "chains": chains,
                "lion": lion_loop,
                "faithful": faithful,
                "diverse": diverse,
            }
            found = runs[part](method, seed)
        line = {"part": part, "method": method, "seed": seed}
        line |= {f: f"{found[f]:.4g}" if f in found else "" for f in "abcd"}
        return line | dict(zip(sweeping.VERSIONS, sweeping.versions(), strict=True))


def main() -> None:
    check = sweeping.asked(__doc__)
    key = ("part", "method", "seed")
    done = {tuple(line[name] for name in key): line for line in sweeping.read(FILE)}
    sweep = Sweep()
    for run in RUNS[:check] if check else RUNS:
        before = done.get(tuple(map(str, run)))
        if check:
            now = sweep.run(*run)
            print(*run, *(f"{f}: {before[f]} then, {now[f]} now" for f in "abcd"))
        elif before is None:
            sweeping.append(FILE, sweep.run(*run))


if __name__ == "__main__":
    main()
