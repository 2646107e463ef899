"""The course's own models and texts, shipped in the package.

`load()` gives the course model, a Llama of 1.05 M parameters; `load_draft()` one of a
quarter of that, for speculative decoding; both share one tokenizer. `corpus(name)`
gives the text: the two models were trained on the "train" split of "addresses" and
"moby-dick", and have never seen "bible". How they were made:
`scripts/train_course_model.py`, and the cards beside the files in `data/`.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from llmlab.models import checkpoint
from llmlab.models.llama import Llama

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data"
MODEL, DRAFT = DATA / "course-model", DATA / "draft-model"
TRAINED_ON = ("addresses", "moby-dick")
CORPORA = (*TRAINED_ON, "bible")
SPLITS = ("train", "valid")
CONTEXT = 256


def load() -> Llama:
    """The course model in evaluation mode, fp32.

    Its folder is `MODEL`; transformers opens that too.
    """
    return checkpoint.load(MODEL)


def load_draft() -> Llama:
    """The draft model: same tokenizer, a quarter of the parameters.

    Its folder is `DRAFT`.
    """
    return checkpoint.load(DRAFT)


def load_tokenizer() -> Tokenizer:
    """Byte-level BPE with 2,048 tokens; decoding gives back any text exactly.
    <|endoftext|> ends a document.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@cache  # of megabytes, and asked for by each batch that is drawn from it
def corpus(name: str, split: str = "train") -> str:
    """All documents of one split, a blank line between them.

    Args:
        name: "addresses" (State of the Union), "moby-dick" or "bible" (King James).
        split: "train" or "valid". Whole documents are held out, never lines.
    Raises:
        ValueError: a name or a split that there is not.
    """
    return "\n\n".join(documents(name, split))


def documents(name: str, split: str = "train") -> list[str]:
    """The same as `corpus`, a string a document: an address, or a chapter."""
    if name not in CORPORA:
        raise ValueError(
            f"name={name!r} must be one of {', '.join(map(repr, CORPORA))}"
        )
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'valid'")
    return [text for of, text in _read(name) if of == split]


def tokens(split: str = "train") -> Int[Tensor, "N"]:
    """The stream that the models were trained on, or its held-out part: <|endoftext|>
    and then a document, 3.4 M tokens in all.

    It is what `load_tokenizer` makes of the documents of `TRAINED_ON`, kept because
    making it takes 8 s.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'valid'")
    packed = (DATA / "corpora" / f"tokens-{split}.u2.xz").read_bytes()
    return torch.frombuffer(
        bytearray(lzma.decompress(packed)), dtype=torch.uint16
    ).long()


@cache
def _read(name: str) -> tuple[tuple[str, str], ...]:
    with lzma.open(DATA / "corpora" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as f:
        return tuple((d["split"], d["text"]) for d in map(json.loads, f))
