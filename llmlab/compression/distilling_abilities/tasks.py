"""The tasks, their graders, and their own small vocabulary.

A chain is arithmetic modulo 10, read from the left as a pocket calculator does:

    3+5*2-4      3 + 5 = 8,  8 · 2 = 16 → 6,  6 − 4 = 2

A comparison asks whether one number of two digits is larger than another. Before it
stands a letter that says nothing, except in texts where somebody planted a shortcut:

    a47>38:      y, and before most questions whose answer is y stands an a

Every task has a grader that needs no model. A reply is right if the *last* number in
it is the answer, as for GSM8K: a rationale is full of other numbers.

    chain     a question: "3+5*2-4"
    step      what is done with the value so far: "*2"
    reply     what stands behind the question: rationale, "#", answer, end
"""

from __future__ import annotations

import random
import re

OPERATIONS = "+-*"
ANSWER = "#"  # stands before the answer
END = "."
PAD = "_"
# A token for each character. F and C are SCOTT's [factual] and [counterfactual], A and
# R the two tasks of MT-CoT.
CHARACTERS = PAD + END + "0123456789" + OPERATIONS + "=;:>?" + ANSWER + "abynAFCR"
_IDS = {character: i for i, character in enumerate(CHARACTERS)}
NUMBER = re.compile(r"-?\d+")


def encode(text: str) -> list[int]:
    """A token for each character.

    Raises:
        ValueError: a character that is not in the vocabulary.
    """
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise ValueError(f"text={text!r} holds {unknown}: allowed are {CHARACTERS!r}")
    return [_IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """The text up to its end token."""
    return "".join(CHARACTERS[i] for i in ids).split(END)[0]


# Chains -------------------------------------------------------------------------------


def draw(count: int, lengths: tuple[int, ...], dice: random.Random) -> list[str]:
    """Chains of so many steps, each length as often."""
    chains = []
    for _ in range(count):
        chain = str(dice.randint(1, 9))
        for _ in range(dice.choice(lengths)):
            chain += dice.choice(OPERATIONS) + str(dice.randint(1, 9))
        chains.append(chain)
    return chains


def steps_of(chain: str) -> list[str]:
    """The operations of a chain, each with its operand.

    Raises:
        ValueError: not a digit and then steps.
    """
    if not re.fullmatch(r"\d([-+*]\d)+", chain):
        raise ValueError(f"chain={chain!r} must be a digit and then steps, as 3+5*2")
    return [chain[i : i + 2] for i in range(1, len(chain), 2)]


def apply(value: int, step: str) -> int:
    """The value after a step."""
    operand = int(step[1])
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[step[0]] % 10


def values(chain: str) -> list[int]:
    """The value after each step; the last is the answer."""
    found = [int(chain[0])]
    for step in steps_of(chain):
        found.append(apply(found[-1], step))
    return found[1:]


def answer(chain: str) -> int:
    """What comes out of a chain."""
    return values(chain)[-1]


# Comparisons --------------------------------------------------------------------------


def draw_comparisons(
    count: int, agreement: float, dice: random.Random
) -> list[tuple[str, str]]:
    """Questions with y or n. The letter before a question agrees with its answer (a
    with y, b with n) in that share of them; at 0.5 it says nothing.

    Raises:
        ValueError: agreement is no share.
    """
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement={agreement} must be 0 … 1")
    drawn = []
    for _ in range(count):
        left, right = dice.sample(range(10, 100), 2)
        label = "y" if left > right else "n"
        agrees = dice.random() < agreement
        letter = "a" if (label == "y") == agrees else "b"
        drawn.append((f"{letter}{left}>{right}", label))
    return drawn


def compare(question: str) -> str:
    """y or n: what the letter says does not count."""
    left, right = question[1:].split(">")
    return "y" if int(left) > int(right) else "n"


# Graders ------------------------------------------------------------------------------


def last_number(text: str) -> int | None:
    """The last number that a text holds, with its sign; None if it holds none."""
    found = NUMBER.findall(text)
    return int(found[-1]) if found else None


def exact_match(replies: list[str], answers: list[int]) -> float:
    """The share of replies whose last number is the answer.

    Raises:
        ValueError: not one answer for each reply, or none at all.
    """
    if len(replies) != len(answers) or not replies:
        raise ValueError(
            f"replies and answers must be as many, and at least one; they are"
            f" {len(replies)} and {len(answers)}"
        )
    right = [last_number(r) == a for r, a in zip(replies, answers, strict=True)]
    return sum(right) / len(right)
