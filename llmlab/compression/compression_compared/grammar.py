"""A task with a verifier: which of two sentences is grammatical?

Minimal pairs (Linzen et al. 2016, https://arxiv.org/abs/1611.01368; Warstadt et al.
2020, https://arxiv.org/abs/1912.00582): two sentences that differ in one word. A model
is right if it finds the good one more likely,

    log p(good)  >  log p(bad)        log p(s) = Σ_t log p(s_t | s_<t)

Chance is one half. The sentences of a pair here are the same up to their last word, so
what comes before cancels, and one pass over the prefix decides: is the logit of the one
word larger than that of the other?

The sentences are made from the lists below, each as often with the singular as with the
plural, so that a model which always says "is" gets one half.

    B  pairs in a batch        T  tokens of the longest prefix
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from llmlab.models.llama import Llama


@dataclass(frozen=True)
class Pair:
    """Two sentences that begin the same and end with another word."""

    phenomenon: str
    prefix: str
    good: str  # with the space before it
    bad: str


# singular, plural
PEOPLE = (
    ("teacher", "teachers"),
    ("farmer", "farmers"),
    ("doctor", "doctors"),
    ("lawyer", "lawyers"),
    ("artist", "artists"),
    ("child", "children"),
    ("student", "students"),
    ("guard", "guards"),
)
PLACES = (
    ("house", "houses"),
    ("school", "schools"),
    ("village", "villages"),
    ("city", "cities"),
    ("river", "rivers"),
    ("garden", "gardens"),
)
JOINTS = ("near", "behind", "from")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
SEEN = (
    ("knows", "know"),
    ("likes", "like"),
    ("visits", "visit"),
    ("remembers", "remember"),
)
PAST = (
    ("broken", "broke"),
    ("written", "wrote"),
    ("taken", "took"),
    ("eaten", "ate"),
    ("stolen", "stole"),
    ("forgotten", "forgot"),
    ("given", "gave"),
    ("driven", "drove"),
)
DETERMINERS = (("this", "these"), ("that", "those"))
LOOKS = ("We saw", "They like", "I know")
WOMEN = (
    *("Mary", "Anna", "Susan", "Emily", "Helen", "Laura"),
    *("The queen", "My sister", "My mother", "The princess", "The actress", "His wife"),
)
MEN = (
    *("John", "Peter", "David", "Robert", "Thomas", "Henry"),
    *("The king", "My brother", "My father", "The prince", "The actor", "Her husband"),
)
DOES = ("hurt", "blamed", "saw", "taught", "asked", "killed", "praised", "hid")


def attraction() -> list[Pair]:
    """The verb agrees with the subject, not with the noun before it."""
    found = []
    for person, place, joint, verb in itertools.product(PEOPLE, PLACES, JOINTS, VERBS):
        for number in (0, 1):
            # the noun between them has the other number
            prefix = f"The {person[number]} {joint} the {place[1 - number]}"
            good, bad = verb[number], verb[1 - number]
            found.append(Pair("attraction", prefix, good, bad))
    return found


def relative() -> list[Pair]:
    """The verb agrees across a clause."""
    found = []
    for person, other, seen, verb in itertools.product(PEOPLE, PEOPLE, SEEN, VERBS):
        if person == other:
            continue
        for number in (0, 1):
            # "that the farmers know", and "that the farmer knows"
            clause = f"the {other[1 - number]} {seen[1 - number]}"
            prefix = f"The {person[number]} that {clause}"
            found.append(Pair("relative", prefix, verb[number], verb[1 - number]))
    return found


def reflexive() -> list[Pair]:
    """A reflexive pronoun has the gender of its subject."""
    found = []
    couples = zip(WOMEN, MEN, strict=True)
    for (woman, man), verb in itertools.product(couples, DOES):
        for name, own, other in (
            (woman, " herself", " himself"),
            (man, " himself", " herself"),
        ):
            found.append(Pair("reflexive", f"{name} {verb}", own, other))
    return found


def determiner() -> list[Pair]:
    """A noun has the number of "this", "these", "that" or "those"."""
    found = []
    nouns = PEOPLE + PLACES
    for noun, verb, words in itertools.product(nouns, LOOKS, DETERMINERS):
        for number in (0, 1):
            prefix = f"{verb} {words[number]}"
            good, bad = f" {noun[number]}", f" {noun[1 - number]}"
            found.append(Pair("determiner", prefix, good, bad))
    return found


def participle() -> list[Pair]:
    """After "has" stands the participle, and without it the past."""
    found = []
    for person, number, (done, did) in itertools.product(PEOPLE, (0, 1), PAST):
        helper = ("has", "have")[number]
        with_helper = f"The {person[number]} {helper}"
        without = f"Yesterday the {person[number]}"
        found.append(Pair("participle", with_helper, f" {done}", f" {did}"))
        found.append(Pair("participle", without, f" {did}", f" {done}"))
    return found


PHENOMENA: dict[str, Callable[[], list[Pair]]] = {
    "attraction": attraction,
    "relative": relative,
    "reflexive": reflexive,
    "determiner": determiner,
    "participle": participle,
}


def pairs(each: int = 100, seed: int = 0) -> list[Pair]:
    """So many pairs of each phenomenon, drawn without repetition.

    They are drawn in couples that mirror each other, singular and plural say.

    Raises:
        ValueError: `each` is odd, below 2, or more than there are.
    """
    if each < 2 or each % 2:
        raise ValueError(f"each={each} must be even and at least 2: pairs come in twos")
    draw = random.Random(seed)
    found = []
    for name, make in PHENOMENA.items():
        known = make()
        if each > len(known):
            raise ValueError(f"each={each}: there are {len(known)} pairs of {name}")
        for i in draw.sample(range(len(known) // 2), each // 2):
            found += known[2 * i : 2 * i + 2]
    return found


@torch.inference_mode()
def preferred(
    model: Llama,
    encode: Callable[[str], list[int]],
    some: Sequence[Pair],
    batch: int = 50,
) -> Bool[Tensor, "pairs"]:
    """True for each pair of which the model finds the good sentence more likely.

    Pairs whose prefixes have the same length are read together: no padding.

    Args:
        encode: text → token ids.
    Raises:
        ValueError: the last word of a sentence is more than one token (named), or there
            are no pairs.
    """
    if not some:
        raise ValueError("some=[]: there must be at least one pair")
    by_length: dict[int, list[int]] = {}
    prefixes, words = [], []
    for i, pair in enumerate(some):
        prefixes.append(encode(pair.prefix))
        words.append([last_word(encode, pair.good), last_word(encode, pair.bad)])
        by_length.setdefault(len(prefixes[i]), []).append(i)
    right = torch.zeros(len(some), dtype=torch.bool)
    for places in by_length.values():
        for start in range(0, len(places), batch):
            group = places[start : start + batch]
            ids = torch.tensor([prefixes[i] for i in group])  # (B, T)
            logits = model(ids, logits_to_keep=1)[:, -1]  # (B, V)
            both = logits.gather(1, torch.tensor([words[i] for i in group]))  # (B, 2)
            right[group] = both[:, 0] > both[:, 1]
    return right


def last_word(encode: Callable[[str], list[int]], word: str) -> int:
    """Its only token."""
    ids = encode(word)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens here; it must be one")
    return ids[0]


def accuracy(right: Bool[Tensor, "pairs"]) -> tuple[float, float]:
    """The share of pairs that are right, and its standard error."""
    share = right.double().mean().item()
    return share, (share * (1 - share) / len(right)) ** 0.5
