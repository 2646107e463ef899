"""Speculation changes how fast the text comes, and not what comes.

For sampling that is proved by going through all that can happen: each draw of the
draft model and each outcome of `accept` is a branch with its probability, and the
engine is run once for each path.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from llmlab.inference.engine import Pieces, SamplingParams, speculate
from llmlab.inference.sampling_and_speculation import (
    accept,
    lookup,
    outcomes,
    target_distribution,
)
from llmlab.models.llama import Llama
from tests.inference.engine.models import finish, make, plain, small

TARGET = make(2, vocab_size=3, initializer_range=0.6)
DRAFT = make(3, vocab_size=3, num_hidden_layers=1, initializer_range=0.6)
PROMPT = [0, 1, 2, 2, 1]


class Path:
    """One run: which branch was taken at each fork, and how likely that was.

    Branches behind `choices` are taken in order, and the others remembered.
    """

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices
        self.at = 0
        self.chance = 1.0
        self.others: list[list[int]] = []

    def take(self, branches: list[tuple[object, float]]):
        branches = [each for each in branches if each[1] > 0]
        if self.at == len(self.choices):
            for other in range(1, len(branches)):
                self.others.append([*self.choices, other])
            self.choices = [*self.choices, 0]
        what, chance = branches[self.choices[self.at]]
        self.at += 1
        self.chance *= chance
        return what


def every_text(monkeypatch, params, make_engine) -> dict[tuple[int, ...], float]:
    """What the engine writes after PROMPT, each text with its probability."""
    found: dict[tuple[int, ...], float] = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        path = Path(waiting.pop())

        def enumerated(p, q, drafted, u, path=path):
            possible = outcomes(accept, p, q, drafted)
            return list(path.take(sorted(possible.items())))

        def drawn(p, u, path=path):
            return path.take(list(enumerate(p.tolist())))

        monkeypatch.setattr(speculate, "draw", drawn)
        engine = make_engine(Pieces(accept=enumerated))
        engine.add(PROMPT, params)
        text = tuple(finish(engine)[0])
        found[text] = found.get(text, 0.0) + path.chance
        waiting += path.others
    return found


def engine_with(gamma, draft, **sizes):
    return lambda pieces: small(
        TARGET, gamma=gamma, draft=draft, pieces=pieces, block_size=2, **sizes
    )


CASES = {
    "no speculation": engine_with(0, None),
    "a draft model": engine_with(2, DRAFT),
    "a draft model, few tokens in a step": engine_with(3, DRAFT, max_tokens=2),
    "the target itself": engine_with(2, TARGET),
    "the text": engine_with(2, None),
}


PLAIN = {"temperature": 1.0}
CUT = {"temperature": 0.7, "top_k": 2, "repetition_penalty": 1.5}


@pytest.mark.parametrize(
    ("case", "sampler"),
    [
        ("no speculation", PLAIN),
        ("the text", PLAIN),
        *[(case, CUT) for case in CASES],
    ],
)
def test_the_distribution_is_the_targets(monkeypatch, case, sampler):
    params = SamplingParams(max_new_tokens=4, **sampler)

    @torch.inference_mode()
    def table(text):
        ids = [*PROMPT, *text]
        logits = TARGET(torch.tensor([ids]))[0, -1:]
        return params.sampler.probabilities(logits, ids, (), len(PROMPT))[0]

    found = every_text(monkeypatch, params, CASES[case])
    wanted = target_distribution(table, 4)
    assert sum(found.values()) == pytest.approx(1)
    for text, chance in wanted.items():
        assert found.get(text, 0.0) == pytest.approx(chance, abs=1e-6)


def near() -> Llama:
    """Nearly the target."""
    model = deepcopy(TARGET)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("draft", [None, near()], ids=["text", "model"])
def test_greedy_text_is_the_same_in_fewer_passes(draft):
    prompts = [[0, 1, 2] * 4, [2, 2, 1], [1]]
    engine = small(TARGET, gamma=3, draft=draft)
    plainly = small(TARGET)
    params = SamplingParams(max_new_tokens=24)
    written = engine.generate(prompts, params)
    assert written == plainly.generate(prompts, params)
    assert written == [plain(TARGET, prompt, 24) for prompt in prompts]
    assert engine.stats.accepted > 0
    assert engine.stats.steps < plainly.stats.steps


def test_a_perfect_draft_is_always_kept():
    """Its cache lacks the last token after each round, and gets it in the next."""
    engine = small(TARGET, gamma=3, draft=TARGET)
    engine.generate([PROMPT], SamplingParams(max_new_tokens=13))
    assert engine.stats.accepted == engine.stats.drafted == 9
    # the prompt's last token gives one; then 1 + 3 at a time
    assert engine.stats.steps == 1 + 3


def test_what_the_draft_stores_is_found_with_it():
    """A prefix that is found was computed by the draft, too."""
    engine = small(TARGET, gamma=3, draft=TARGET)
    params = SamplingParams(max_new_tokens=9)
    for _ in range(2):
        engine.generate([PROMPT * 3], params)
    assert engine.stats.found > 0
    assert engine.stats.accepted == engine.stats.drafted


def test_the_draft_reads_prompts_as_they_are_computed():
    """Else nobody finds them before their request decodes, or ever if it does not."""
    engine = small(TARGET, gamma=3, draft=TARGET, max_tokens=6)
    for _ in range(2):
        engine.generate([PROMPT * 2], SamplingParams(max_new_tokens=1))
    assert engine.stats.found == 8


@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_a_block_is_found_when_both_models_have_stored_it(length):
    """After a round in which all were accepted, the draft lacks the last token.

    The draft is the target itself: its memory must be the same, block by block.
    """
    engine = small(TARGET, gamma=3, draft=TARGET)
    for step in range(9):
        if step == 0:
            prompt = (PROMPT * 2)[:length]
            engine.add(prompt, SamplingParams(max_new_tokens=13))
        engine.step()
        found = sorted(engine.cache.manager.pool.cached.values())
        for layer in range(2):
            for mine, its in zip(
                (engine.cache.keys[layer], engine.cache.values[layer]),
                (engine.drafter.cache.keys[layer], engine.drafter.cache.values[layer]),
                strict=True,
            ):
                torch.testing.assert_close(mine[found], its[found])
    assert engine.idle
    assert len(found) >= 3


@pytest.mark.parametrize("draft", [None, TARGET], ids=["text", "model"])
def test_no_more_is_drafted_than_can_be_written(draft):
    """A text that just fits into the cache is never sent away for its drafts."""
    engine = small(TARGET, gamma=7, draft=draft, num_blocks=3)
    # the last token is written and not stored: 5 + 8 − 1 = 12
    written = engine.generate([PROMPT], SamplingParams(max_new_tokens=8))
    assert written == [plain(TARGET, PROMPT, 8)]
    assert engine.stats.preemptions == 0
    assert engine.stats.accepted + engine.stats.steps == 8


def test_each_request_draws_with_its_own_seed():
    params = SamplingParams(max_new_tokens=9, temperature=1.0, seed=5)
    alone = small(TARGET).generate([PROMPT], params)[0]
    engine = small(TARGET)
    others = SamplingParams(max_new_tokens=9, temperature=1.0)
    written = engine.generate([[1, 1], PROMPT, [2]], [others, params, others])
    assert written[1] == alone
    with_seeds = [
        small(TARGET, seed=seed).generate([PROMPT], others)[0] for seed in range(6)
    ]
    assert len(set(map(tuple, with_seeds))) > 1


def test_lookup_is_asked_once_for_each_length():
    asked = []

    def counting(tokens, count, longest):
        asked.append(len(tokens))
        return lookup(tokens, count, longest)

    engine = small(TARGET, gamma=3, pieces=Pieces(lookup=counting))
    engine.generate([PROMPT * 2], SamplingParams(max_new_tokens=12))
    assert asked == sorted(set(asked))
