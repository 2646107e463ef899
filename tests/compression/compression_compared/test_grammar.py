"""The pairs, and that the last logit decides as the sentences' likelihoods do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from llmlab.compression import compression_compared as compared
from llmlab.compression.compression_compared import Pair
from tests.models.hugging_face import make

WORDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """A token a word."""
    return [WORDS.setdefault(w, len(WORDS) % 61) for w in text.split()]


@pytest.mark.parametrize("name", compared.PHENOMENA)
def test_each_answer_is_as_often_right_as_wrong(name):
    """So a model that likes one word better than the other gets one half."""
    made = compared.PHENOMENA[name]()
    good = Counter(pair.good for pair in made)
    bad = Counter(pair.bad for pair in made)
    assert good == bad
    assert all(pair.phenomenon == name for pair in made)


@pytest.mark.parametrize("name", compared.PHENOMENA)
def test_no_pair_stands_twice_and_none_contradicts_another(name):
    made = compared.PHENOMENA[name]()
    assert len(set(made)) == len(made)
    right = {(pair.prefix, pair.good) for pair in made}
    assert not right & {(pair.prefix, pair.bad) for pair in made}


def test_some_sentences_by_hand():
    made = [pair for make in compared.PHENOMENA.values() for pair in make()]
    for phenomenon, sentence in {
        "attraction": "The teachers near the house are",
        "relative": "The child that the doctors know is",
        "reflexive": "My sister saw herself",
        "determiner": "They like those children",
        "participle": "The guards have stolen",
    }.items():
        found = [p for p in made if p.prefix + p.good == sentence]
        assert [p.phenomenon for p in found] == [phenomenon]
        assert not [p for p in made if p.prefix + p.bad == sentence]


def test_the_draw_is_balanced_and_depends_on_the_seed():
    drawn = compared.pairs(20, seed=3)
    assert Counter(p.phenomenon for p in drawn) == dict.fromkeys(compared.PHENOMENA, 20)
    assert Counter(p.good for p in drawn) == Counter(p.bad for p in drawn)
    assert len(set(drawn)) == len(drawn)
    assert drawn == compared.pairs(20, seed=3)
    assert drawn != compared.pairs(20, seed=4)


def test_the_last_word_decides_as_the_whole_sentence_does():
    torch.manual_seed(1)
    model = make()
    some = compared.pairs(8)
    found = compared.preferred(model, encode, some, batch=3)

    def likelihood(text: str) -> float:
        ids = torch.tensor([encode(text)])
        logp = F.log_softmax(model(ids), -1)[0, :-1]
        return logp.gather(1, ids[0, 1:, None]).sum().item()

    want = []
    for pair in some:
        good = likelihood(pair.prefix + pair.good)
        want.append(good > likelihood(pair.prefix + pair.bad))
    assert found.tolist() == want
    assert 0 < found.sum() < len(found)


def test_accuracy_and_its_error():
    right = torch.tensor([True, True, True, False])
    share, error = compared.accuracy(right)
    assert share == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert compared.accuracy(torch.ones(9, dtype=torch.bool)) == (1.0, 0.0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="each=3 must be even"):
        compared.pairs(3)
    with pytest.raises(ValueError, match="each=5000: there are"):
        compared.pairs(5000)
    with pytest.raises(ValueError, match="some=\\[\\]"):
        compared.preferred(make(), encode, [])
    pair = Pair("any", "We saw", " two words", " one")
    with pytest.raises(ValueError, match="' two words' is 2 tokens"):
        compared.preferred(make(), encode, [pair])
