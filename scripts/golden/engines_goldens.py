"""Writes llmlab/parallelism/data/engines.json.

It holds the losses of DeepSpeed and Megatron-core on the course's small Llama.

    python scripts/golden/engines_goldens.py                                   DeepSpeed
    PYTHONPATH=<where pip put megatron-core> python scripts/golden/engines_goldens.py
    megatron
                        (pip install --no-deps --target <there> megatron-core==0.16.1)

What a run does not ask for stays as it was recorded.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from llmlab.parallelism import launch
from llmlab.parallelism.frameworks import engines

FILE = Path(engines.__file__).parents[1] / "data" / "engines.json"


def main(what: str) -> None:
    data = (
        json.loads(FILE.read_text(encoding="utf-8"))
        if FILE.exists()
        else {"versions": {}, "losses": {}}
    )
    if what == "megatron":
        data["losses"]["Megatron-core layers, tp 2"] = launch(
            engines.megatron, 2, timeout=300
        )[0]
        data["versions"]["megatron-core"] = version("megatron-core")
    else:
        for stage in (1, 2, 3):
            losses = launch(
                lambda comm, stage=stage: engines.deepspeed(comm, stage), 2, timeout=300
            )[0]
            data["losses"][f"DeepSpeed ZeRO-{stage}, dp 2"] = losses
        quiet = {"steps_per_print": 10**9}
        data["clipping left at its default"] = launch(
            lambda comm: engines.deepspeed(comm, 1, quiet), 2, timeout=300
        )[0]
        data["losses"]["DeepSpeed PipelineModule, pp 2"] = launch(
            engines.deepspeed_pipeline, 2, timeout=300
        )[0]
        data["versions"]["deepspeed"] = version("deepspeed")
    data["versions"]["torch"] = torch.__version__
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for name, losses in data["losses"].items():
        print(f"{name:32}", " ".join(f"{x:.5f}" for x in losses))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "deepspeed")
