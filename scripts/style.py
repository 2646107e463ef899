"""How densely code is written: one row of numbers for each package.

    python scripts/style.py                         the parts of llmlab
    python scripts/style.py name=PATH name=PATH     other packages, for comparison

No number is a goal. They show where a reader has to slow down: many syntax nodes in a
line, several assignments in one statement, loops folded into expressions, names of one
letter. Lines are those with code on them: without docstrings, comments and blank lines.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("models", "peft", "parallelism", "checks", "course")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
HEADER = (
    f"{'':<14} {'lines':>6} {'files':>5} {'in one':>6} {'nodes':>6} {'packed':>6}"
    f" {'compr.':>6} {'1-letter':>8} {'typed':>6} {'docs':>5} {'comments':>8}\n"
    f"{'':<14} {'':>6} {'':>5} {'folder':>6} {'/line':>6} {'/100':>6}"
    f" {'/100':>6} {'names':>8} {'result':>6} {'':>5} {'lines':>8}"
)


@dataclass
class Counts:
    """What was counted in one package."""

    files: Counter = field(default_factory=Counter)  # folder → files in it
    lines: int = 0
    comment_lines: int = 0
    nodes: int = 0
    packed: int = 0
    comprehensions: int = 0
    names: int = 0
    short_names: int = 0
    functions: int = 0
    typed: int = 0
    described: int = 0

    def row(self, name: str) -> str:
        """The numbers in one line, under HEADER."""
        per_100 = 100 / max(self.lines, 1)
        functions = max(self.functions, 1)
        return (
            f"{name:<14} {self.lines:>6} {self.files.total():>5}"
            f" {max(self.files.values(), default=0):>6}"
            f" {self.nodes / max(self.lines, 1):>6.1f}"
            f" {self.packed * per_100:>6.1f} {self.comprehensions * per_100:>6.1f}"
            f" {self.short_names / max(self.names, 1):>8.0%}"
            f" {self.typed / functions:>6.0%} {self.described / functions:>5.0%}"
            f" {self.comment_lines * per_100:>7.1f}%"
        )


def count(folder: Path) -> Counts:
    """Counts over all Python files below a folder, or over one file.

    Raises:
        FileNotFoundError: there is no Python file.
    """
    paths = [folder, *sorted(folder.rglob("*.py"))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no Python file")
    counts = Counts()
    for path in paths:
        counts.files[path.parent] += 1
        add(path.read_text(encoding="utf-8"), counts)
    return counts


def add(source: str, counts: Counts) -> None:
    """Add one file's text to the counts."""
    tree = ast.parse(source)
    documented = lines_of_docstrings(tree)
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    counts.lines += len(code - documented)
    counts.comment_lines += len(comments)

    for node in without_types(tree):
        counts.nodes += 1
        if isinstance(node, COMPREHENSIONS):
            counts.comprehensions += 1
        elif isinstance(node, ast.Assign) and is_packed(node):
            counts.packed += 1
        elif isinstance(node, ast.Name | ast.arg):
            name = node.id if isinstance(node, ast.Name) else node.arg
            counts.names += 1
            counts.short_names += len(name) == 1 and name != "_"
        elif isinstance(node, FUNCTIONS):
            counts.functions += 1
            counts.typed += node.returns is not None
            counts.described += ast.get_docstring(node) is not None


def lines_of_docstrings(tree: ast.AST) -> set[int]:
    """The numbers of all lines that are part of a docstring."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            found |= set(range(text.lineno, text.end_lineno + 1))
    return found


def without_types(node: ast.AST):
    """All nodes below this one, but no annotation."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from without_types(child)


def is_packed(node: ast.Assign) -> bool:
    """Whether several values are given to several names, as in `a, b = x, y`."""
    into = node.targets[0]
    return isinstance(into, ast.Tuple | ast.List) and isinstance(node.value, ast.Tuple)


def main(arguments: list[str]) -> None:
    """Print the table."""
    packages = {f"ours, {part}": ROOT / "llmlab" / part for part in PARTS}
    if arguments:
        packages = {}
        for argument in arguments:
            name, _, path = argument.rpartition("=")
            packages[name or Path(path).name] = Path(path)
    print(HEADER)
    for name, folder in packages.items():
        print(count(folder).row(name))


if __name__ == "__main__":
    main(sys.argv[1:])
