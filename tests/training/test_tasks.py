"""The shared tasks: what an example says, what counts, what is held out.

Scores mean what they say.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.models import course_model
from llmlab.training import tasks

NAMES = list(tasks.TASKS)
PLACES = [(name, split) for name in NAMES for split in ("train", "valid")]


@pytest.fixture(scope="module")
def tokenizer():
    return course_model.load_tokenizer()


def rows(batches):
    """(tokens without padding, how many are to be predicted) of every example."""
    for batch in batches:
        for ids, labels, mask in zip(*batch, strict=True):
            yield ids[mask.bool()].tolist(), int((labels != -100).sum())


@pytest.mark.parametrize(("name", "split"), PLACES)
def test_a_batch_is_well_formed(name, split, tokenizer):
    for ids, labels, mask in tasks.make(name, tokenizer, split, batches=3, size=5):
        assert (
            ids.shape == labels.shape == mask.shape
            and len(ids) == 5
            and ids.dtype == torch.int64
        )
        assert mask.sum(1).max() == ids.shape[1], "no wider than the longest example"
        assert torch.equal(mask, mask.sort(1, descending=True).values), (
            "padding stands on the right"
        )
        assert (ids[mask == 0] == tasks.PAD).all() and (
            ids[mask == 1] != tasks.PAD
        ).all()
        assert (
            torch.equal(labels[labels != -100], ids[labels != -100])
            and (labels[mask == 0] == -100).all()
        )
        last = mask.sum(1) - 1
        assert (labels[torch.arange(5), last] != -100).all(), (
            "the answer stands at the end"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_depends_on_name_split_seed_and_number_alone(name, tokenizer):
    five = tasks.make(name, tokenizer, seed=3, batches=5)
    torch.manual_seed(99)
    two = tasks.make(name, tokenizer, seed=3, batches=2)
    assert all(
        torch.equal(a, b)
        for x, y in zip(two, five, strict=False)
        for a, b in zip(x, y, strict=True)
    )
    assert len(five[0].input_ids) == tasks.SIZE[name]
    seen = {ids for ids, _ in ((tuple(t), n) for t, n in rows(five[:1]))}
    for other in (
        five[1:2],
        tasks.make(name, tokenizer, seed=4, batches=1),
        tasks.make(name, tokenizer, "valid", 3, 1),
    ):
        assert {tuple(t) for t, _ in rows(other)} != seen


@pytest.mark.parametrize("split", ["train", "valid"])
def test_bible_is_text_of_its_split(split, tokenizer):
    text = course_model.corpus("bible", split)
    for tokens, counted in rows(tasks.make("bible", tokenizer, split, batches=2)):
        assert (
            tokenizer.decode(tokens) in text and counted == len(tokens) == tasks.LENGTH
        )


@pytest.mark.parametrize("split", ["train", "valid"])
def test_source_asks_for_the_text_that_the_passage_is_from(split, tokenizer):
    texts = dict(zip(tasks.LABELS, tasks._sources(split), strict=True))
    labels = []
    for tokens, counted in rows(
        tasks.make("source", tokenizer, split, batches=4, size=8)
    ):
        passage, _, label = tokenizer.decode(tokens).rpartition(tasks.QUESTION)
        assert (
            counted == 1
            and passage in texts[label]
            and 12 <= len(tokenizer.encode(passage).ids) <= 24
        )
        labels.append(label)
    assert all(labels.count(label) == 8 for label in tasks.LABELS)
    assert all(len(tokenizer.encode(label).ids) == 1 for label in tasks.LABELS)


def test_the_old_addresses_are_older_than_the_new(tokenizer):
    old, new, sea, faith = tasks._sources("train")
    assert "George Washington" in old or "Gentlemen of the Senate" in old
    assert (
        "terrorists" in new
        and "terrorists" not in old
        and "Ahab" in sea
        and "Jerusalem" in faith
    )


def test_sort_sorts_and_holds_out_whole_sets(tokenizer):
    sets = {"train": set(), "valid": set()}
    for split, seen in sets.items():
        for tokens, counted in rows(tasks.make("sort", tokenizer, split, batches=20)):
            question, answer = tokenizer.decode(tokens).split("=")
            assert (
                answer == "".join(sorted(question))
                and len(set(question)) == len(answer) == counted
            )
            assert 2 <= counted <= 4
            seen.add(answer)
    assert sets["train"] and sets["valid"] and not sets["train"] & sets["valid"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "sorting"}, "name='sorting'"),
        ({"split": "test"}, "split='test'"),
        ({"batches": 0}, "batches=0"),
        ({"size": -1}, "size=-1"),
    ],
)
def test_wrong_arguments_are_named(wrong, says, tokenizer):
    with pytest.raises(ValueError, match=says):
        tasks.make(**{"name": "sort", "tokenizer": tokenizer, **wrong})


def test_score_is_the_loss_of_what_counts_and_the_accuracy_of_greedy_decoding(
    tokenizer,
):
    model = course_model.load()
    tasks.fit(model, tasks.make("sort", tokenizer, batches=12), lr=3e-3)
    valid = tasks.make("sort", tokenizer, "valid", batches=2)
    loss, accuracy = tasks.score(model, valid)
    terms, right = [], []
    for tokens, counted in rows(valid):  # one example at a time, without padding
        read, answer = torch.tensor([tokens[:-counted]]), tokens[-counted:]
        written = []
        for _ in answer:
            logits = model(
                torch.cat([read, torch.tensor([written], dtype=torch.int64)], 1)
            )[0, -1]
            written.append(int(logits.argmax()))
        so_far = tokens[:-counted]
        for token in answer:
            terms.append(
                F.cross_entropy(
                    model(torch.tensor([so_far]))[0, -1], torch.tensor(token)
                ).item()
            )
            so_far = [*so_far, token]
        right.append(written == answer)
    assert loss == pytest.approx(sum(terms) / len(terms), abs=1e-4)
    assert accuracy == sum(right) / len(right) and 0 < loss < 3


def test_fit_trains_what_trains_and_nothing_else(tokenizer):
    model = course_model.load().requires_grad_(False)
    chosen = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = tasks.make("source", tokenizer, batches=6)
    losses = tasks.fit(model, batches, lr=1e-2)
    moved = [
        name for name, p in model.named_parameters() if not torch.equal(p, before[name])
    ]
    assert moved == ["model.layers.0.mlp.down_proj.weight"] and chosen.requires_grad
    assert len(losses) == 6 and losses[-1] < losses[0] and not model.training


def test_the_rate_warms_up_to_its_peak_and_falls_to_a_twentieth(tokenizer, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    tasks.fit(
        course_model.load_draft(),
        tasks.make("sort", tokenizer, batches=12, size=1),
        lr=1.0,
    )
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(
        rates
    ) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05) and rates[5:] == sorted(
        rates[5:], reverse=True
    )


def test_transformers_model_scores_the_same(tokenizer):
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL).eval()
    valid = tasks.make("source", tokenizer, "valid", batches=2)
    ours = tasks.score(course_model.load(), valid)
    assert tasks.score(theirs, valid) == pytest.approx(ours, abs=1e-4)
