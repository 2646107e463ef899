"""The book's page "Published numbers": what papers print, and what the package counts.

The rows are in `data/published.csv`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import import_module

from llmlab.course.syllabus import DATA

UNITS = {
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "B": 1e9,
    "GB": 1e9,
    "GiB": 2**30,
    "%": 1,
    "bits": 1,
    "days": 1,
    "s": 1,
    "TFLOP/s": 1,
}
PARTS = {
    "peft": "Parameter-efficient fine-tuning",
    "parallelism": "Distributed training",
    "compression": "Compression",
}


@dataclass(frozen=True)
class Row:
    """One published number, and the rule that counts it in the package.

    `rule` and `arguments` say how `llmlab.<part>.published` counts it.
    """

    part: str  # "peft", "parallelism" or "compression"
    what: str
    where: str
    paper: str  # a bibtex key
    rule: str
    arguments: str  # "L=96 d=12288"
    published: str  # as printed, in `unit`
    unit: str
    why: str  # when ours is another, or needs a word

    @property
    def ours(self) -> float:
        """What the package counts, in `unit`."""
        rules = import_module(f"llmlab.{self.part}.published").OURS
        arguments = {}
        for pair in self.arguments.split():
            name, text = pair.split("=")
            arguments[name] = _value(text)
        return rules[self.rule](**arguments) / UNITS[self.unit]

    @property
    def digits(self) -> int:
        """Decimals of the printed number.

        It is −1 for a number that is rounded to tens, such as 780.
        """
        decimals = len(self.published.partition(".")[2])
        if not decimals and self.unit and self.published.endswith("0"):
            return -1
        return decimals

    @property
    def same(self) -> bool:
        """Whether ours, rounded as the printed number is, equals it."""
        return round(self.ours, self.digits) == float(self.published)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def rows() -> list[Row]:
    """All rows, in the order of the file."""
    with (DATA / "published.csv").open(encoding="utf-8", newline="") as f:
        return [Row(**row) for row in csv.DictReader(f)]


def page() -> str:
    """The table in Markdown, with citations as MyST has them."""
    table = rows()
    same = sum(row.same for row in table)
    texts = [f"{same} of {len(table)} numbers come out the same; the others say why."]
    for part in PARTS:
        texts.append(_section(part, [row for row in table if row.part == part]))
    return "\n\n".join(texts)


def _section(part: str, table: list[Row]) -> str:
    lines = [f"## {PARTS[part]}", ""]
    lines += ["| what | published | ours | same? |", "|---|--:|--:|---|"]
    for row in table:
        digits = max(row.digits, 0)
        # One more digit than was printed shows what rounding hides.
        more = digits + 1 if row.unit else 0
        unit = f"\N{NO-BREAK SPACE}{row.unit}" if row.unit else ""
        ours = f"{row.ours:,.{more}f}{unit}"
        printed = f"{float(row.published):,.{digits}f}{unit}"
        what = f"{row.what}<br>{{cite:t}}`{row.paper}`, {row.where}"
        if row.why:
            what += f"<br>*{row.why}*"
        lines.append(f"| {what} | {printed} | {ours} | {'yes' if row.same else 'no'} |")
    return "\n".join(lines)
