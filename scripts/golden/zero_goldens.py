"""Write llmlab/parallelism/data/zero_deepspeed.json.

It holds losses and gradient norms of DeepSpeed's ZeRO 1, 2 and 3 on two ranks.

    .venv/bin/python scripts/golden/zero_goldens.py

The training is `train_deepspeed` of llmlab.parallelism.examples.zero_libraries with
`Settings(stage=…)`: six steps of AdamW with clipping on a small Llama, two microbatches
a step, ranks with different numbers of tokens. On a CPU, over gloo, in fp32.
"""

from __future__ import annotations

import json
import os
import warnings
from importlib.metadata import version
from pathlib import Path

from llmlab.parallelism import launch
from llmlab.parallelism.examples.train_zero import Settings
from llmlab.parallelism.examples.zero_libraries import train_deepspeed

OUT = (
    Path(__file__).resolve().parents[2]
    / "llmlab"
    / "parallelism"
    / "data"
    / "zero_deepspeed.json"
)
STAGES = (1, 2, 3)


def deepspeed_histories(comm) -> dict[str, list]:
    """One process for the three stages: most of the time goes into the first."""
    warnings.simplefilter("ignore")
    return {
        str(stage): train_deepspeed(comm, Settings(stage=stage))[0] for stage in STAGES
    }


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    first, second = launch(deepspeed_histories, 2, timeout=240)
    assert first == second, "the ranks must agree"
    rounded = {
        stage: [[round(x, 6) for x in row] for row in rows]
        for stage, rows in first.items()
    }
    made = {
        "versions": {name: version(name) for name in ("deepspeed", "torch")},
        "ranks": 2,
        "history": rounded,
    }
    lines = (
        json.dumps(made)
        .replace('"history"', '\n"history"')
        .replace('], "', '],\n"')
        .replace('{"1"', '{\n"1"')
    )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(lines + "\n", encoding="utf-8")
