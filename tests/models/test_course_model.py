"""The shipped assets: what the cards and the log say is what the files hold."""

import csv
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models import course_model
from llmlab.models.language_model import token_losses
from llmlab.models.ngrams import fit
from llmlab.training.pretraining import evaluate

FOLDERS = {"course": course_model.MODEL, "draft": course_model.DRAFT}


def log_of(folder) -> list[dict[str, float]]:
    with (folder / "training_log.csv").open(newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope="module", params=["course", "draft"])
def shipped(request):
    """(folder, model)"""
    return (
        FOLDERS[request.param],
        {
            "course": course_model.load,
            "draft": course_model.load_draft,
        }[request.param](),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return course_model.load_tokenizer()


def test_shapes():
    course, draft = course_model.load(), course_model.load_draft()

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert count(course) == 1_049_728 and 200_000 <= count(draft) <= 300_000
    for model in (course, draft):
        c = model.config
        assert (c.vocab_size, c.max_position_embeddings, c.tie_word_embeddings) == (
            2048,
            256,
            True,
        )
        assert c.num_key_value_heads < c.num_attention_heads
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training and all(
            p.dtype == torch.float32 for p in model.parameters()
        )


def test_transformers_opens_the_folder_and_agrees(shipped):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, ours = shipped
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = course_model.tokens("valid")[None, :256]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The state of the Union, 1999: — “naïve” 你好\n\n  two  spaces\t."
    assert (
        tokenizer(text)["input_ids"] == course_model.load_tokenizer().encode(text).ids
    )
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (
        0,
        0,
        1,
    )
    assert theirs.generation_config.eos_token_id == 0


def test_the_log_belongs_to_the_weights(shipped):
    """The last validation loss of the log, computed again from the shipped weights; and
    the loss really fell.
    """
    folder, model = shipped
    log = log_of(folder)
    again = evaluate(model, course_model.tokens("valid"), course_model.CONTEXT)
    assert again == pytest.approx(log[-1]["valid_loss"], abs=2e-3)
    assert (
        log[-1]["valid_loss"]
        == min(r["valid_loss"] for r in log)
        < log[0]["valid_loss"] - 1
    )
    for before, after in pairwise(log):
        assert (
            after["step"] > before["step"]
            and after["tokens"] > before["tokens"]
            and after["seconds"] > before["seconds"]
        )


def test_it_beats_the_trigram_on_text_that_neither_has_seen():
    valid = course_model.tokens("valid")[:6_000]
    trigram = fit(course_model.tokens("train"), 3, 2048).losses(valid).mean()
    assert (
        token_losses(course_model.load(), valid, 256, stride=128, batch=4).mean()
        < trigram
    )


def test_both_share_one_tokenizer():
    texts = [(folder / "tokenizer.json").read_bytes() for folder in FOLDERS.values()]
    assert texts[0] == texts[1]
    tokenizer = course_model.load_tokenizer()
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.id_to_token(i) for i in range(4)] == [
        "<|endoftext|>",
        "<|pad|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert (
        tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    )


def test_digits_are_spelled():
    assert len(course_model.load_tokenizer().encode("1999").ids) == 4


def test_tokens_are_the_documents_encoded():
    tokenizer = course_model.load_tokenizer()
    documents = [
        d
        for name in course_model.TRAINED_ON
        for d in course_model.documents(name, "valid")
    ]
    made = [i for e in tokenizer.encode_batch(documents) for i in (0, *e.ids)]
    assert course_model.tokens("valid").tolist() == made
    train = course_model.tokens("train")
    first = course_model.documents("addresses")[0]
    assert train[: len(tokenizer.encode(first).ids) + 1].tolist() == [
        0,
        *tokenizer.encode(first).ids,
    ]
    assert int((train == 0).sum()) == sum(
        len(course_model.documents(name)) for name in course_model.TRAINED_ON
    )
    last = course_model.documents("moby-dick")[-1]
    assert tokenizer.decode(train[-len(tokenizer.encode(last).ids) :].tolist()) == last


def test_held_out_documents_are_nowhere_in_the_training_text():
    for name in course_model.CORPORA:
        train, valid = (
            course_model.documents(name, split) for split in course_model.SPLITS
        )
        assert len(valid) > 10 and not set(train) & set(valid)
        assert 0.04 < sum(map(len, valid)) / sum(map(len, train)) < 0.1
    assert "In the beginning God created the heaven" in course_model.corpus("bible")
    assert course_model.corpus("moby-dick").startswith(
        "CHAPTER 1. Loomings.\n\nCall me Ishmael."
    )
    assert course_model.corpus("addresses", "valid") == "\n\n".join(
        course_model.documents("addresses", "valid")
    )


@pytest.mark.parametrize("name, split", [("moby", "train"), ("bible", "test")])
def test_corpus_refuses(name, split):
    with pytest.raises(ValueError, match=r"name='moby'|split='test'"):
        course_model.corpus(name, split)
    with pytest.raises(ValueError, match="split='test'"):
        course_model.tokens("test")


def test_the_model_card_says_what_the_log_says(shipped):
    folder, model = shipped
    card, last = (
        (folder / "MODEL_CARD.md").read_text(encoding="utf-8"),
        log_of(folder)[-1],
    )
    assert f"loss {last['valid_loss']:.3f} nats" in card
    assert (
        f"{last['step']:,.0f} steps" in card
        and f"{last['tokens'] / 1e6:.1f} M in all" in card
    )
    assert f"{last['seconds'] / 60:.0f} minutes" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card


def test_size_licences_and_cards():
    files = [f for f in course_model.DATA.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 15e6
    for folder in FOLDERS.values():
        names = {f.name for f in folder.iterdir()}
        assert names >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "training_log.csv",
            "MODEL_CARD.md",
        }
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    corpora = {f.name for f in (course_model.DATA / "corpora").iterdir()}
    assert corpora >= {
        "DATA_CARD.md",
        "LICENSE-CC0-1.0.txt",
        "NOTICE.txt",
        *(f"{n}.jsonl.xz" for n in course_model.CORPORA),
    }
