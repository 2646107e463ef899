"""Search that also finds Chinese words: pairs of characters, on both sides.

Chinese has no spaces between words, so Sphinx takes a run of characters for one word,
and a query finds it only whole. Here a run is cut into its overlapping pairs, when a
page is indexed and when a reader asks: 序列并行 becomes 序列, 列并, 并行.
"""

from __future__ import annotations

import re

from sphinx.search.en import SearchEnglish

CHINESE = r"\u3400-\u9fff"
_PIECES = re.compile(rf"[{CHINESE}]+|[^\W{CHINESE}]+")
# The same in the browser, where words are what Sphinx's own splitter takes for them.
SPLIT_QUERY = r"""
function splitQuery(query) {
  const pieces = query.match(
    /[\u3400-\u9fff]+|(?:(?![\u3400-\u9fff])[\p{Letter}\p{Number}_\p{Emoji_Presentation}])+/gu
  ) || [];
  return pieces.flatMap((piece) => {
    if (piece.length < 2 || !/[\u3400-\u9fff]/.test(piece)) return [piece];
    return Array.from({ length: piece.length - 1 }, (_, i) => piece.slice(i, i + 2));
  });
}
"""


class EnglishAndChinese(SearchEnglish):
    """English with its stems and stop words, Chinese in pairs of characters."""

    js_splitter_code = SPLIT_QUERY

    def split(self, input: str) -> list[str]:
        """The words of a text."""
        return words(input)


def words(text: str) -> list[str]:
    """English words, and the pairs of characters of each Chinese run."""
    found = []
    for piece in _PIECES.findall(text):
        if len(piece) < 2 or not re.match(f"[{CHINESE}]", piece):
            found.append(piece)
        else:
            found += [piece[i : i + 2] for i in range(len(piece) - 1)]
    return found
