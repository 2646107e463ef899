"""Labels as TRL's SFTTrainer makes them: tests/compression/golden/
distilling_abilities.json.

Run with an environment of TRL 1.16.0 (it does not fit beside the course):

    python scripts/golden/distilling_abilities_goldens.py

Three questions with rationales, a token for each character, once with a pad token of
its own and once with the end token for padding; the loss on completions, and on all.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "distilling_abilities.json"
CHARACTERS = "_.0123456789+-*=;:#"
EXAMPLES = [
    ("3+5:", "3+5=8#8."),
    ("3+5*2-4:", "3+5=8;8*2=6;6-4=2#2."),
    ("7*9:", "#3."),
]


def tokenizer(pad: str):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {character: i for i, character in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(table, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=".", pad_token=pad)


def labels(pad: str, completion_only: bool | None, out: str) -> dict:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    rows = [{"prompt": prompt, "completion": reply} for prompt, reply in EXAMPLES]
    trainer = SFTTrainer(
        model=LlamaForCausalLM(shape),
        args=SFTConfig(
            output_dir=out,
            completion_only_loss=completion_only,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(pad),
    )
    data = [trainer.train_dataset[i] for i in range(len(rows))]
    batch = trainer.data_collator(data)
    return {
        "pad": pad,
        "completion_only": completion_only,
        "ids": batch["input_ids"].tolist(),
        "labels": batch["labels"].tolist(),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as out:
        cases = [labels(p, c, out) for p in "_." for c in (None, True, False)]
    data = {
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("trl", "transformers", "tokenizers", "torch")
        },
        "characters": CHARACTERS,
        "examples": EXAMPLES,
        "cases": cases,
    }
    FILE.write_text(json.dumps(data) + "\n")
    print(FILE, len(FILE.read_text()))


if __name__ == "__main__":
    main()
