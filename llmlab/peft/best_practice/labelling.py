"""Which book is this passage from? A small labelling task, and four ways to train.

    probe      the label head alone, on the frozen model
    shallow    the head, and virtual tokens at the input (P-Tuning)
    deep       the head, and keys and values in every layer (P-Tuning v2)
    full       everything trains

All four have the same head and read the label at the last token; batches depend on the
seed and the step only. The curves in `data/label_curves.csv` are made by
scripts/label_curves.py.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.models import course_model
from llmlab.peft import label_head, p_tuning
from llmlab.peft.p_tuning import p_tuning_v2

BOOKS = ("addresses", "moby-dick", "bible")
LENGTH, BATCH, VIRTUAL, HEAD_RATE, WARMUP = 24, 16, 16, 1e-2, 5
RATES = {
    "probe": (0.0,),
    "shallow": (3e-3, 1e-2, 3e-2),
    "deep": (3e-2, 1e-1, 3e-1),
    "full": (3e-4, 1e-3, 3e-3),
}
FILE = Path(__file__).parents[1] / "data" / "label_curves.csv"
HEADS = (".head.weight", "lm_head.weight")


@lru_cache
def stream(book: str, split: str) -> Tensor:
    """A book's tokens, all line breaks gone."""
    text = " ".join(course_model.corpus(book, split)[:150_000].split())
    return torch.tensor(course_model.load_tokenizer().encode(text).ids)


def passages(split: str, seed: int, count: int = BATCH) -> tuple[Tensor, Tensor]:
    """(tokens (count, 24), labels (count,)): passages that start anywhere."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(BOOKS), (count,), generator=dice)
    places = torch.rand(count, generator=dice)
    streams = [stream(BOOKS[y], split) for y in labels.tolist()]
    starts = [
        int(place * (len(s) - LENGTH)) for place, s in zip(places, streams, strict=True)
    ]
    return (
        torch.stack([s[i : i + LENGTH] for i, s in zip(starts, streams, strict=True)]),
        labels,
    )


def prepare(method: str, seed: int, virtual: int = VIRTUAL) -> nn.Module:
    """The course model with a label head, and virtual tokens if the method has them,
    ready to train.

    Raises:
        ValueError: there is no such method.
    """
    if method not in RATES:
        raise ValueError(f"method={method!r} must be one of {', '.join(RATES)}")
    model, dice = course_model.load(), torch.Generator().manual_seed(seed)
    if method == "shallow":
        config = p_tuning.PTuningConfig(virtual, num_labels=len(BOOKS), hidden=64)
        return p_tuning.apply(model, config, generator=dice)
    if method == "deep":
        text = tuple(
            stream("bible", "train")[seed * virtual : (seed + 1) * virtual].tolist()
        )
        config = p_tuning_v2.PTuningV2Config(
            virtual, num_labels=len(BOOKS), init_tokens=text
        )
        return p_tuning_v2.apply(model, config, generator=dice)
    model.requires_grad_(method == "full")
    model.lm_head = label_head.make_head(
        model.config.hidden_size, len(BOOKS), bias=False, generator=dice
    )
    return model


def train(model: nn.Module, rate: float, steps: int, seed: int) -> Iterator[int]:
    """Train, and yield the number of steps done after each: evaluate whenever you like.
    The rates stay as they are.
    """
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    groups = [
        {
            "params": [w for n, w in trained.items() if not n.endswith(HEADS)],
            "rate": rate,
        },
        {
            "params": [w for n, w in trained.items() if n.endswith(HEADS)],
            "rate": HEAD_RATE,
        },
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / WARMUP)
        tokens, labels = passages("train", seed * 1000 + step)
        loss = F.cross_entropy(model(tokens)[:, -1], labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        yield step + 1


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """How often the likeliest label is the right one."""
    return (model(tokens)[:, -1].argmax(-1) == labels).float().mean().item()


def curves() -> list[dict[str, str]]:
    """The recorded lines: method, rate, seed, steps, dev and test accuracy,
    versions.
    """
    with FILE.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))
