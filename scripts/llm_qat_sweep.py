"""LLM-QAT beside rounding, by training text: llmlab/compression/data/llm_qat.csv.

    python scripts/llm_qat_sweep.py            continue, a line a run; Ctrl-C loses at
                                               most one run
    python scripts/llm_qat_sweep.py --check 1  run that many lines again and compare

On the course model: 50 steps of 8 texts of 128 tokens. The seed draws the text, own or
not. Judged on 48 windows of 256 tokens, held out. On the real model: no training, but
fewer bits, judged on 1,024 tokens of held-out addresses.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import sweeping
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.compression import llm_qat
from llmlab.compression.llm_qat import FILE, QATConfig, QuantizedKV
from llmlab.models import course_model, real_model
from llmlab.training import pretraining

LENGTH = 128  # tokens of a training text
STEPS = {"course": 50, "real": 30}
BATCH = {"course": 8, "real": 2}
RATE = {"course": 3e-4, "real": 1e-4}
FIELDS = [
    "model",
    "bits",  # W-A-KV; 16 is not rounded
    "alpha",  # of keys and values: per "token" or per "head" of a token
    "text",  # what was trained on; "" is rounding to nearest
    "labels",
    "seed",
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the float model
    "grown_error",  # its standard error, over windows
    "gained",  # under rounding with as many bits
    "gained_error",
    "torch",
    "python",
]


def runs() -> list[tuple]:
    """The first six fields of each line, in the order of the file."""
    found: list[tuple] = []
    for bits in ("3-8-4", "4-4-4", "4-8-4"):
        found.append(("course", bits, "token", "", "", 0))
    for seed in range(3):
        for text in ("hybrid", "greedy", "sampled", "corpus", "bible"):
            found.append(("course", "3-8-4", "token", text, "soft", seed))
        for text in ("hybrid", "corpus"):
            found.append(("course", "3-8-4", "token", text, "hard", seed))
    for bits in (8, 4, 3, 2):
        for alpha in ("token", "head"):
            found.append(("real", f"16-16-{bits}", alpha, "", "", 0))
    for bits in ("4-8-4", "4-4-4"):
        for seed in range(3):
            found.append(("course", bits, "token", "hybrid", "soft", seed))
    found.append(("real", "4-8-4", "token", "", "", 0))
    return found


@cache
def teacher(model: str) -> nn.Module:
    """The float model."""
    return course_model.load() if model == "course" else real_model.load()


@cache
def real_ids(split: str, characters: int) -> Tensor:
    """The first characters of the addresses, as tokens of the real model."""
    text = course_model.corpus("addresses", split)[:characters]
    return torch.tensor(real_model.load_tokenizer().encode(text).ids)


@cache
def judged(model: str) -> Tensor:
    """Windows of 257 held-out tokens."""
    if model == "course":
        return pretraining.evaluation_windows(course_model.tokens("valid"), 256, 48)
    return real_ids("valid", 20_000)[: 4 * 257].reshape(4, 257)


@cache
def texts(model: str, kind: str, seed: int) -> tuple[Tensor, ...]:
    """Batches of training text."""
    count = STEPS[model] * BATCH[model]
    if kind in llm_qat.KINDS:
        rows = llm_qat.self_generate(teacher(model), count, LENGTH, kind, seed)
        return rows.split(BATCH[model])
    if kind == "bible":
        bible = course_model.corpus("bible")[:1_500_000]
        stream = torch.tensor(course_model.load_tokenizer().encode(bible).ids)
    else:
        stream = (
            course_model.tokens() if model == "course" else real_ids("train", 10**6)
        )
    recipe = pretraining.Recipe(
        STEPS[model], batch=BATCH[model], context=LENGTH - 1, warmup=0, seed=seed
    )
    return tuple(
        pretraining.sample_batch(stream, recipe, i) for i in range(STEPS[model])
    )


@torch.inference_mode()
def losses(model: nn.Module, windows: Tensor, kv_bits: int, per_head: bool) -> Tensor:
    """Mean loss of each window, in nats."""
    options = {} if kv_bits == 16 else {"attention": QuantizedKV(kv_bits, per_head)}
    found = []
    for some in windows.split(4):
        said = model(some[:, :-1], **options)
        each = F.cross_entropy(said.transpose(1, 2), some[:, 1:], reduction="none")
        found.append(each.mean(1))
    return torch.cat(found)


@cache
def float_losses(model: str) -> Tensor:
    return losses(teacher(model), judged(model), 16, False)


@cache
def losses_of(model, bits, alpha, text, labels, seed) -> Tensor:
    """Of one run."""
    W, A, KV = map(int, bits.split("-"))
    config = QATConfig(W, A, KV, labels=labels or "soft", lr=RATE[model])
    student = deepcopy(teacher(model))
    if text or W < 16:
        batches = texts(model, text, seed) if text else []
        llm_qat.apply(student, batches, config)
    return losses(student, judged(model), KV, alpha == "head")


def run(*key) -> list:
    """One line of the file."""
    model, bits, alpha, *_ = key
    found = losses_of(*key)
    reference = losses_of(model, bits, alpha, "", "", 0)
    values = sweeping.measured(found, float_losses(model), reference)
    return [*key, *values, *sweeping.versions()]


if __name__ == "__main__":
    sweeping.sweep(__doc__, FILE, FIELDS, runs(), lambda: run)
