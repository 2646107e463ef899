"""Tokens to text, stop strings, chat templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llmlab.inference.serving.text import Growing, ModelText, Stops, TemplateError
from llmlab.models import course_model, real_model

COURSE = course_model.load_tokenizer()


def byte_fallback() -> Tokenizer:
    """A tokenizer of the other kind: words with ▁ in front, and bytes as <0x..>."""
    words = ["<unk>", "▁a", "▁the", "b", "é"]
    vocab = {word: i for i, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


OTHER = byte_fallback()


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    growing = Growing(tokenizer)
    out = [growing.add(token) for token in tokens]
    return [*out, growing.end()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2047), max_size=40))
def test_the_pieces_are_the_text(tokens):
    assert "".join(pieces(COURSE, tokens)) == COURSE.decode(tokens)


WORDS = st.sampled_from([[1], [2], [3], [4]])
CHARACTERS = st.characters().map(lambda c: [5 + byte for byte in _bytes(c)])


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS | CHARACTERS, max_size=20))
def test_the_pieces_are_the_text_with_byte_fallback(parts):
    """Of whole characters: among bytes that are none, this decoder takes those before
    back, too."""
    tokens = [token for part in parts for token in part]
    assert "".join(pieces(OTHER, tokens)) == OTHER.decode(tokens)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(text):
    tokens = COURSE.encode(text.replace("\ufffd", "")).ids
    for piece in pieces(COURSE, tokens):
        assert "\ufffd" not in piece


def test_half_a_character_waits_and_shows_at_the_end():
    tokens = COURSE.encode("a👩‍🔬").ids
    found = pieces(COURSE, tokens)
    assert found[0] == "a" and "" in found  # bytes of one character
    assert pieces(COURSE, tokens[:2]) == ["a", "", "\ufffd"]


def test_the_end_token_adds_nothing():
    assert pieces(COURSE, [*COURSE.encode("yes").ids, 0])[-2:] == ["", ""]


# Stop strings


def cut(parts: list[str], stops: list[str]) -> tuple[list[str], bool]:
    reader = Stops(stops)
    shown = []
    for part in parts:
        shown.append(reader.add(part))
        if reader.reached:
            return shown, True
    return [*shown, reader.end()], False


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=3), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_where_a_stop_string_is_first_complete(parts, stops):
    text = "".join(parts)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    shown, reached = cut(parts, stops)
    assert reached == bool(ends)
    if not reached:
        assert "".join(shown) == text
        return
    # the text before the stop, as far as it came in parts
    begins = [text.find(stop) for stop in stops if stop in text]
    shown = "".join(shown)
    assert len(shown) in begins and text.startswith(shown)
    assert not any(stop in shown for stop in stops)


def test_what_may_be_a_stop_string_is_held_back_and_no_more():
    reader = Stops(["\n\nUser:"])
    assert reader.add("Hello\n") == "Hello"
    assert reader.add("\nUs") == ""
    assert reader.add("ual") == "\n\nUsual"
    assert reader.add("\n\nUser") == ""
    assert reader.add(": no") == "" and reader.reached
    assert reader.add("more") == "" and reader.end() == ""


def test_without_stop_strings_nothing_is_held_back():
    assert cut(["a", "b"], []) == (["a", "b", ""], False)


# Chat templates


@pytest.fixture
def model(tmp_path):
    def make(template=None, **settings):
        COURSE.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return ModelText(tmp_path)

    return make


HELLO = [{"role": "user", "content": "Hello"}]


def test_a_template_is_found_where_folders_keep_it(model):
    inside = model(chat_template="in settings")
    assert inside.chat_text(HELLO) == "in settings"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert model(chat_template=named).chat_text(HELLO) == "d"
    assert model("{{ messages[0].content }}!", chat_template="x").chat_text(HELLO) == (
        "Hello!"
    )


def test_a_template_sees_special_tokens_however_they_are_written(model):
    found = model("{{ bos_token }}{{ eos_token }}", bos_token={"content": "<s>"})
    assert found.chat_text(HELLO) == "<s>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[7].content.x }}", "undefined|no element"),
        ("{% if %}", "Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (None, "no chat template.*v1/completions"),
    ],
)
def test_a_template_that_does_not_work_says_why(model, template, words):
    with pytest.raises(TemplateError, match=words):
        model(template).chat_text(HELLO)


@pytest.mark.real_model
def test_the_real_model_is_asked_as_its_own_loader_asks():
    """Which `tests/models/test_real_model.py` lays beside transformers."""
    text = ModelText(real_model.path())
    talk = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": " Hi\n"},
        {"role": "user", "content": "Why?"},
    ]
    for messages in (HELLO, talk):
        assert text.chat(messages) == real_model.chat(messages)
    assert text.tokenizer.decode(text.ends, skip_special_tokens=False) == "<|im_end|>"


def test_where_a_text_ends(model, tmp_path):
    made = model(eos_token="<|endoftext|>")
    assert made.ends == (0,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert ModelText(tmp_path).ends == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ModelText(tmp_path).ends == (7, 8)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        ModelText(tmp_path)
