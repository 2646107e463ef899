"""The glossary from a reader's side: links at first use, and search in Chinese."""

from __future__ import annotations

import pytest

from llmlab.course.book import searching

QUERIES = ["序列并行", "量", "KV cache 量化", "all-reduce", "x_1 困惑度ppl"]


@pytest.mark.parametrize("query", QUERIES)
def test_the_browser_cuts_a_query_as_the_index_was_cut(chromium, query):
    page = chromium.new_page()
    code = f"query => {{ {searching.SPLIT_QUERY}; return splitQuery(query); }}"
    assert page.evaluate(code, query) == searching.words(query)
    page.close()


@pytest.mark.parametrize("query", ["困惑度", "序列并行"])
def test_search_finds_a_chinese_term(open_page, query):
    page = open_page(f"search.html?q={query}")
    page.wait_for_selector("#search-results li", timeout=20_000)
    found = page.locator("#search-results li a").all()
    assert any("glossary.html" in a.get_attribute("href") for a in found)


def test_a_lesson_links_a_term_once(open_page):
    page = open_page("notebooks/01-start/01-welcome.html")
    links = page.locator("a[href*='glossary.html#term-Token']")
    assert links.count() == 1
    links.first.click()
    page.wait_for_url("**/glossary.html#term-Token")
