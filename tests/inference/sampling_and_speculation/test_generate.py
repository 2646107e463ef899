"""The loop with its caches: plain decoding's tokens, and the very p and q of the two
models at every place.
"""

from __future__ import annotations

import csv

import pytest
import torch

from llmlab.inference.sampling_and_speculation import (
    FILE,
    DraftModel,
    Lookup,
    SamplerConfig,
    TreeDraft,
    accept,
    first_layers,
    generate,
    lookup,
    speculate,
    speculate_tree,
)
from llmlab.models.generation import generate as plain_generate
from tests.models.hugging_face import make, theirs

GREEDY = SamplerConfig(temperature=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def near(model, scale=0.02, seed=1):
    """A draft that often agrees with the model."""
    draft = make(**shape(model)).double()
    draft.load_state_dict(model.state_dict())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in draft.parameters():
            p += scale * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return draft


def shape(model):
    return {
        "num_key_value_heads": model.config.num_key_value_heads,
        "tie_word_embeddings": model.config.tie_word_embeddings,
    }


def pair(**changes):
    model = make(num_key_value_heads=2, **changes).double()
    return model, near(model)


def plain(model, n):
    return plain_generate(model, IDS, n)[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
@pytest.mark.parametrize("kind", ["near", "itself", "lookup", "exit", "stranger"])
def test_greedy_tokens_are_those_of_plain_decoding(kind, gamma):
    model, draft = pair()
    drafts = {
        "near": lambda: DraftModel(draft),
        "itself": lambda: DraftModel(model),
        "lookup": lambda: Lookup(61),
        "exit": lambda: DraftModel(first_layers(model, 1)),
        "stranger": lambda: DraftModel(make(seed=7).double()),
    }
    run = speculate(model, drafts[kind](), IDS, 33, GREEDY, gamma=gamma)
    assert run.tokens == plain(model, 33)
    assert sum(len(each.kept) for each in run.rounds) == 33
    if kind == "itself" and gamma:
        full, rest = divmod(33, gamma + 1)
        assert run.passes == full + (rest > 0)
        assert run.alpha == 1
    if gamma == 0:
        assert run.passes == 33 and run.draft_passes == 0


SAMPLERS = [
    SamplerConfig(),
    SamplerConfig(temperature=0.6, top_k=8),
    SamplerConfig(top_p=0.8, repetition_penalty=1.5),
    SamplerConfig(frequency_penalty=0.7, min_p=0.05, order="vllm"),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: str(s.steps)[:40])
@pytest.mark.parametrize("kind", ["near", "exit"])
def test_each_round_judges_by_the_models_own_distributions(monkeypatch, sampler, kind):
    """Whatever the caches hold: p and q as they are without any cache.

    So rollback, refilling, positions and the penalties' counts are right in each round.
    """
    model, draft = pair()
    if kind == "exit":
        draft = first_layers(model, 1)
    text = IDS[0].tolist()
    widths = []

    def watched(p, q, drafted, u):
        whole = torch.tensor([text + drafted])
        rows = slice(len(text) - 1, None)
        with torch.no_grad():
            wanted = sampler.probabilities(model(whole)[0, rows], text, drafted, 8)
            their = sampler.probabilities(draft(whole)[0, rows], text, drafted, 8)
        torch.testing.assert_close(p, wanted)
        torch.testing.assert_close(q, their[:-1])
        kept = accept(p, q, drafted, u)
        widths.append(len(kept))
        text.extend(kept)
        return kept

    monkeypatch.setattr(generate, "accept", watched)
    run = speculate(model, DraftModel(draft), IDS, 60, sampler, gamma=3, seed=5)
    assert text[8:] == run.tokens
    if kind == "near":
        assert {1, 4} <= set(widths)  # all rejected, and all accepted, were among them


def test_a_seed_gives_the_same_text_and_the_end_token_ends_it():
    model, draft = pair()
    sampler = SamplerConfig(temperature=1.5)
    a = speculate(model, DraftModel(draft), IDS, 40, sampler, seed=3)
    b = speculate(model, DraftModel(draft), IDS, 40, sampler, seed=3)
    assert a.tokens == b.tokens
    end = a.tokens[10]
    first = a.tokens.index(end)
    c = speculate(model, DraftModel(draft), IDS, 40, sampler, seed=3, eos=(end,))
    assert c.tokens == a.tokens[: first + 1]


def assisted(model, draft, on_draft, on_call=None):
    """Tokens of transformers' assisted generation, and the passes of both models."""
    from transformers import GenerationConfig

    hf, hf_draft = theirs(model).double(), theirs(draft).double()
    hf_draft.generation_config = GenerationConfig(**on_draft)
    passes, draft_passes = [], []
    hf.register_forward_hook(lambda m, i, o: passes.append(1))
    hf_draft.register_forward_hook(lambda m, i, o: draft_passes.append(1))
    found = hf.generate(
        IDS,
        assistant_model=hf_draft,
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=0,
        eos_token_id=None,
        **(on_call or {}),
    )
    return found[0, 8:].tolist(), len(passes), len(draft_passes)


FIVE = {
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}


def test_as_many_passes_as_in_transformers():
    """Greedy, five tokens per round, no threshold: pass for pass the same."""
    model, draft = pair()
    found = assisted(model, draft, FIVE)
    run = speculate(model, DraftModel(draft), IDS, 40, GREEDY, gamma=5)
    assert found == (run.tokens, run.passes, run.draft_passes)


def test_transformers_reads_the_drafts_settings_from_the_draft_alone():
    model, draft = pair()
    by_default = assisted(model, draft, {})
    assert assisted(model, draft, {}, FIVE) == by_default
    assert assisted(model, draft, FIVE)[1:] != by_default[1:]


@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 2), (2, 2, 2, 1), (61,)])
def test_a_tree_gives_the_same_tokens_in_no_more_passes(widths):
    model, draft = pair()
    run = speculate_tree(model, TreeDraft(draft, widths), IDS, 33)
    assert run.tokens == plain(model, 33)
    chain = speculate(model, DraftModel(draft), IDS, 33, GREEDY, gamma=len(widths))
    assert run.passes <= chain.passes
    if set(widths) == {1}:
        assert run.passes == chain.passes
        assert [r.kept for r in run.rounds] == [r.kept for r in chain.rounds]
    if widths == (61,):  # all tokens are proposed: one always stays
        assert run.passes == 17


def test_a_tree_stops_at_the_end_token():
    model, draft = pair()
    tokens = plain(model, 33)
    end = tokens[12]
    run = speculate_tree(model, TreeDraft(draft, (2, 2, 2)), IDS, 33, eos=(end,))
    assert run.tokens == tokens[: tokens.index(end) + 1]


def test_first_layers_share_their_weights():
    model = make(tie_word_embeddings=True)
    short = first_layers(model, 1)
    names = dict(short.named_parameters())
    assert all(p is dict(model.named_parameters())[n] for n, p in names.items())
    assert not any(".1." in name for name in names)
    whole = first_layers(model, 2)
    torch.testing.assert_close(whole(IDS), model(IDS))
    with pytest.raises(ValueError, match="layers=3"):
        first_layers(model, 3)


def test_lookup_finds_the_longest_and_the_earliest():
    text = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
    assert lookup(text, 3, longest=3) == [4, 9, 2]
    assert lookup(text, 3, longest=1) == [4, 9, 2]
    assert lookup([7, 3, 5, 2, 3, 6, 2, 3], 9, longest=2) == [6, 2, 3]
    assert lookup([7, 3, 5, 2, 3, 6, 2, 3], 9, longest=1) == [5, 2, 3, 6, 2, 3]
    assert lookup([1, 1, 1], 5, longest=3) == [1]
    assert lookup([1, 2, 3], 5, longest=3) == []
    assert lookup([4], 5, longest=3) == []


def test_lookup_agrees_with_transformers():
    from transformers.generation.candidate_generator import (
        PromptLookupCandidateGenerator,
    )

    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 4, (1, 14), generator=random)
        their = PromptLookupCandidateGenerator(
            num_output_tokens=4, max_matching_ngram_size=3, max_length=99
        ).get_candidates(ids)[0]
        assert their[0, 14:].tolist() == lookup(ids[0].tolist(), 4, longest=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: speculate(m, Lookup(61), IDS.repeat(2, 1), 3, GREEDY), "ids has"),
        (lambda m: speculate(m, Lookup(61), IDS, 0, GREEDY), "max_new_tokens=0"),
        (lambda m: speculate(m, Lookup(61), IDS, 3, GREEDY, gamma=-1), "gamma=-1"),
        (lambda m: Lookup(61, longest=0), "longest=0"),
        (lambda m: TreeDraft(m, ()), "widths"),
        (lambda m: TreeDraft(m, (2, 0)), "widths"),
    ],
    ids=["batch", "tokens", "gamma", "longest", "no widths", "a width of 0"],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_what_the_sweep_stored_hangs_together():
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = [row for row in rows if row["task"] != "pass"]
    assert {row["task"] for row in runs} == {"repeat", "rename", "open"}
    assert len(runs) == 27
    for row in runs:
        assert row["same"] == "True"
        assert int(row["tokens"]) == int(row["passes"]) + int(row["accepted"])
        if row["method"] == "plain":
            assert row["tokens"] == row["passes"]
