"""SOCRATIC CoT: Shridhar et al. 2022, https://arxiv.org/abs/2212.00193.

The teacher writes sub-questions with their answers, and two students share the work:

    P          →  q_1 … q_n       the decomposer, trained on questions
    q_j, a_<j  →  a_j             the solver, trained on sub-questions

At use no teacher is left. The decomposer splits the problem, the solver answers one
sub-question after the other, and each may use the answers before it.

    P  problem: "3+5*2-4"     q_j  sub-question: "3+5", "?*2", "?-4"     a_j  its answer

A "?" in a sub-question stands for the answer before it. The loop puts it in, so that
the solver reads "8*2" and never a text longer than a step.

Simplified: our solver reads its own sub-question alone, with the last answer put in;
that is all a chain needs, and for other problems the text before would have to come
with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.compression.distilling_abilities import tasks
from llmlab.compression.distilling_abilities.learning import Example, write
from llmlab.compression.distilling_abilities.tasks import ANSWER, END
from llmlab.models.llama import Llama


def sub_questions(chain: str) -> list[str]:
    """The teacher's: each step with a hole for the value before it."""
    first, *others = tasks.steps_of(chain)
    return [chain[0] + first] + ["?" + step for step in others]


def for_decomposer(chains: Sequence[str]) -> list[Example]:
    """Problem → its sub-questions."""
    return [
        Example(f"{chain}:", ";".join(sub_questions(chain)) + END) for chain in chains
    ]


def for_solver(chains: Sequence[str]) -> list[Example]:
    """Sub-question, the last answer put in → its answer."""
    examples = []
    for chain in chains:
        value = int(chain[0])
        for step in tasks.steps_of(chain):
            after = tasks.apply(value, step)
            examples.append(Example(f"{value}{step}=", f"{after}{END}"))
            value = after
    return examples


def fill(sub_question: str, last: str) -> str:
    """The sub-question with the last answer in its hole."""
    return sub_question.replace("?", last)


def answer_all(solver: Llama, asked: Sequence[Sequence[str]]) -> list[str]:
    """Replies to given sub-questions, one after the other: "3+5=8;8*2=6#6"."""
    lines: list[list[str]] = [[] for _ in asked]
    last = [""] * len(asked)
    for turn in range(max(map(len, asked))):
        rows = [i for i, questions in enumerate(asked) if turn < len(questions)]
        filled = [fill(asked[i][turn], last[i]) for i in rows]
        replies = write(solver, [f"{question}=" for question in filled], 2)
        for i, question, reply in zip(rows, filled, replies, strict=True):
            lines[i].append(f"{question}={reply}")
            last[i] = reply
    return [
        ";".join(done) + f"{ANSWER}{value}"
        for done, value in zip(lines, last, strict=True)
    ]


def solve(
    decomposer: Llama, solver: Llama, chains: Sequence[str], most: int = 8
) -> list[str]:
    """The decomposer asks, the solver answers.

    Args:
        most: sub-questions that are asked at most.
    """
    split = write(decomposer, [f"{chain}:" for chain in chains], 4 * most)
    return answer_all(solver, [text.split(";")[:most] for text in split])
