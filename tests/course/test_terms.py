"""The glossary's terms are linked at their first use; Chinese words can be found."""

from __future__ import annotations

import re

import pytest

from llmlab.course.book import searching, terms
from llmlab.course.syllabus import course_root

GLOSSARY = course_root() / "jupyter-book" / "pages" / "glossary.md"


@pytest.fixture
def linker():
    return terms.Linker(GLOSSARY)


def test_the_glossary_has_terms_in_two_languages():
    found = terms.terms(GLOSSARY)
    assert found["Quantization"] == "量化"
    assert found["Perplexity"] == "困惑度"
    assert len(found) > 70
    chinese = [name for name in found.values() if name]
    assert len(set(chinese)) == len(chinese) > 0.9 * len(found)
    assert list(found) == sorted(found, key=str.lower)


def test_only_the_first_use_is_linked(linker):
    text = linker.link("Each token is a token. Tokens are read.")
    assert text == "Each {term}`token <Token>` is a token. Tokens are read."
    assert linker.link("Another token.") == "Another token."


@pytest.mark.parametrize("above", ["## A heading", "| a | table |"])
def test_a_text_below_a_heading_or_a_table_is_linked(linker, above):
    linked = linker.link(f"{above}\n\nEach token.\n")
    assert linked == f"{above}\n\nEach {{term}}`token <Token>`.\n"


def test_plurals_longer_terms_first_and_capitals(linker):
    assert "{term}`Adapters <Adapter>`" in linker.link("Adapters are small.")
    assert "{term}`ring attention <Ring attention>`" in linker.link("In ring attention")
    assert linker.link("a kv cache and flop") == "a kv cache and flop"
    assert "{term}`KV caches <KV cache>`" in linker.link("Two KV caches.")


@pytest.mark.parametrize(
    "text",
    [
        "`token`",
        "$token$",
        "$$\ntoken\n$$",
        "[token](x.md)",
        "## A token",
        "| token | 1 |",
        "```\ntoken\n```",
        '<img alt="token">',
        "<details><summary>What is a token?</summary>",
        "{cite:t}`token2020`",
        "sub-token, token-wise, tokenise",
    ],
)
def test_where_no_link_may_stand(linker, text):
    assert linker.link(text) == text


def test_an_entry_without_a_text(tmp_path):
    path = tmp_path / "glossary.md"
    path.write_text("```{glossary}\nOne\n  Text.\n\nTwo\n```\n")
    with pytest.raises(ValueError, match="Two"):
        terms.terms(path)


def test_chinese_is_cut_into_pairs():
    assert searching.words("序列并行") == ["序列", "列并", "并行"]
    assert searching.words("a 量 of x_1, 困惑度ppl") == [
        *("a", "量", "of", "x_1"),
        *("困惑", "惑度", "ppl"),
    ]


def test_a_link_to_a_page_has_the_meaning_as_its_title():
    linker = terms.Linker.to_page(GLOSSARY, "", "../g.md")
    text = linker.link("Two KV caches. A KV cache.")
    meaning = terms.entries(GLOSSARY)["KV cache"].title
    assert text == f'Two [KV caches](../g.md#KV-cache "{meaning}"). A KV cache.'


def test_no_link_stands_inside_the_title_of_another():
    linker = terms.Linker.to_page(GLOSSARY, "", "g.md")
    text = linker.link("An all-reduce (or none). Then a ring.")
    meaning = terms.entries(GLOSSARY)["All-reduce"].title
    assert "(" in meaning and "ring" in meaning
    rest = text.replace(meaning, "")
    assert rest.startswith('An [all-reduce](g.md#All-reduce "") (or none)')
    assert "Then a [ring](g.md#Ring" in rest


@pytest.mark.parametrize(
    ("lesson", "is_linked"),
    [("05-parallelism/05-tensor", False), ("06-compression/05-gptq", True)],
)
def test_a_common_word_is_a_term_only_where_it_is_meant(lesson, is_linked):
    linked = terms.Linker(GLOSSARY, lesson).link("Look at its scale.")
    assert ("{term}" in linked) == is_linked


def test_titles_and_anchors_are_safe_in_a_link():
    page = terms.page(GLOSSARY)
    for term, entry in terms.entries(GLOSSARY).items():
        assert not set('"`\n') & set(entry.title), term
        assert re.fullmatch(r"[\w-]+", terms.anchor(term)), term
        assert f"\n### {term}\n" in page


def test_every_term_can_be_found_by_its_pattern():
    for term in terms.terms(GLOSSARY):
        assert re.search(terms.pattern(term), f"A {term}, seen."), term
