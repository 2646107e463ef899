"""Speculation on the real model: llmlab/inference/data/speculation.csv.

    python scripts/speculation_sweep.py            continue, a line a run (10 to 20 s
                                                   each); Ctrl-C loses at most one run
    python scripts/speculation_sweep.py --check 3  run that many lines again and compare

SmolLM2-135M-Instruct, greedy, 64 new tokens, a batch of one, one thread. Seconds are of
one core, so that other work on the machine counts little. "pass" is one pass over
gamma + 1 tokens after 128, the fastest of nine.
"""

from __future__ import annotations

import re
import time

import torch
from sweeping import VERSIONS, sweep, versions
from torch import Tensor

from llmlab.inference import sampling_and_speculation as speculation
from llmlab.inference.sampling_and_speculation import FILE, SamplerConfig
from llmlab.models import course_model, real_model
from llmlab.models.cache import KVCache

NEW_TOKENS = 64
EXIT = 24  # of 30 layers
RENAME = """Rename the function `{old}` to `{new}` in this code. Print all of the code.

```python
{code}
```"""
CODE = [
    """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def spread(values):
    centre = mean(values)
    return mean([(value - centre) ** 2 for value in values])""",
    """def read(path):
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            lines.append(line.strip())
    return lines


def count(path):
    return len(read(path))""",
    """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()""",
]
NAMES = [("mean", "average"), ("read", "load"), ("push", "add")]
OPEN = [
    "Tell me a story about a whale.",
    "Why is the sky blue?",
    "Give me some ideas for a birthday party.",
]
METHODS = [("plain", 0), ("lookup", 7), ("early exit", 2)]
# task, method, gamma, prompt
RUNS = []
for number in range(3):
    for task in ("repeat", "rename", "open"):
        RUNS += [(task, method, gamma, number) for method, gamma in METHODS]
RUNS += [("pass", "", width - 1, 0) for width in (1, 2, 3, 4, 8, 16)]
FIELDS = [
    "task",
    "method",
    "gamma",
    "prompt",
    "tokens",
    "passes",
    "draft_passes",
    "drafted",
    "accepted",
    "alpha",  # mean of Σ min(p, q) over the places that were tried
    "same",  # whether the tokens are those of plain decoding
    "seconds",  # of one core, the prompt included
    *VERSIONS,
]


class Sweep:
    """The model, the prompts, and the tokens of plain decoding."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = real_model.load()
        self.eos = (real_model.load_tokenizer().token_to_id("<|im_end|>"),)
        self.plain: dict[tuple[str, int], list[int]] = {}

    def prompt(self, task: str, number: int) -> Tensor:
        """Token ids of a chat with one question."""
        if task == "repeat":
            text = course_model.corpus("addresses", "valid")
            sentences = re.findall(r"[A-Z][^.\n]{120,220}\.", text)
            question = f"Repeat this text word for word.\n\n{sentences[number]}"
        elif task == "rename":
            old, new = NAMES[number]
            question = RENAME.format(old=old, new=new, code=CODE[number])
        else:
            question = OPEN[number]
        return torch.tensor([real_model.chat([{"role": "user", "content": question}])])

    def one_pass(self, width: int) -> float:
        """Seconds of a pass over so many tokens."""
        cache = KVCache(len(self.model.model.layers), capacity=256)
        ids = torch.arange(1000, 1128)[None]
        found = []
        with torch.inference_mode():
            self.model(ids, cache=cache, logits_to_keep=1)
            for _ in range(9):
                cache.truncate(128)
                start = time.process_time()
                self.model(ids[:, :width], cache=cache)
                found.append(time.process_time() - start)
        return min(found)

    def run(self, task: str, method: str, gamma: int, number: int) -> list:
        """One line of the file."""
        key = (task, method, gamma, number)
        if task == "pass":
            seconds = self.one_pass(gamma + 1)
            return [*key, "", "", "", "", "", "", "", f"{seconds:.4f}", *versions()]
        if method == "early exit":
            short = speculation.first_layers(self.model, EXIT)
            draft = speculation.DraftModel(short)
        else:
            draft = speculation.Lookup(self.model.config.vocab_size)
        start = time.process_time()
        found = speculation.speculate(
            self.model,
            draft,
            self.prompt(task, number),
            NEW_TOKENS,
            SamplerConfig(temperature=0),
            gamma=gamma,
            eos=self.eos,
        )
        seconds = time.process_time() - start
        if method == "plain":
            self.plain[task, number] = found.tokens
        plain = self.plain.get((task, number))
        same = "" if plain is None else str(plain == found.tokens)
        drafted = sum(len(each.drafted) for each in found.rounds)
        accepted = sum(each.accepted for each in found.rounds)
        counts = [len(found.tokens), found.passes, found.draft_passes]
        alpha = f"{found.alpha:.4f}"
        values = [*counts, drafted, accepted, alpha, same, f"{seconds:.2f}"]
        return [*key, *values, *versions()]


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run, shown="passes")
