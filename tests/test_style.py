"""The table of `scripts/style.py` counts what it says."""

from __future__ import annotations

import pytest

from scripts.style import HEADER, count

SOURCE = '''"""A docstring, no code."""
# a comment

def add(a: int, long: int) -> int:
    """Adds."""
    x, y = a, long
    return sum([x, y])  # another comment


def untyped(values):
    return [
        v for v in values
    ]
'''


def test_a_small_file_counted_by_hand(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("")
    counts = count(tmp_path)
    assert counts.lines == 7  # two defs, an assignment, a return, three of the list
    assert counts.comment_lines == 2
    assert (counts.functions, counts.typed, counts.described) == (2, 1, 1)
    assert (counts.packed, counts.comprehensions) == (1, 1)
    # a long x y a long sum x y; values v v values: 6 + 2 of one letter
    assert (counts.names, counts.short_names) == (13, 8)
    assert counts.files.total() == 2 and max(counts.files.values()) == 1
    assert "50%" in counts.row("it") and len(counts.row("it")) <= len(
        HEADER.splitlines()[0]
    )


def test_types_do_not_count(tmp_path):
    plain, typed = tmp_path / "plain.py", tmp_path / "typed.py"
    plain.write_text("def f(x):\n    return x\n")
    typed.write_text("def f(x: dict[str, int]) -> tuple[int, ...]:\n    return x\n")
    assert count(plain).nodes == count(typed).nodes


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no Python file"):
        count(tmp_path)
