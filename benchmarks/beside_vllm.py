"""The requests of `benchmarks.inference` on vLLM, which has an environment of its own:

    llmlab peer vllm                             makes it, and says where its PYTHON is
    OMP_NUM_THREADS=2 PYTHON -m benchmarks.beside_vllm FILE      (from this folder)

FILE is the prompts, which the course's environment writes:

    python -c "import json; from benchmarks import inference as i
    print(json.dumps([i.prompts(), [n for _, n in i.TRACE]]))" > FILE

It prints seconds for all 16 requests, and for one of 64 tokens, fp32, greedy, on the
clock and of the processor. Ours: `python -m benchmarks.inference`, at the same time of
day and with as many threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ROUNDS = 3
MODEL = Path.home() / ".cache" / "llmlab" / "models" / "SmolLM2-135M-Instruct"


def main() -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams, TokensPrompt

    prompts, counts = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        str(MODEL),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )

    def seconds(asked: list[list[int]], new: list[int]) -> str:
        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            for count in new
        ]
        started = (time.perf_counter(), time.process_time())
        llm.generate(
            [TokensPrompt(prompt_token_ids=each) for each in asked],
            params,
            use_tqdm=False,
        )
        wall = time.perf_counter() - started[0]
        return f"{wall:.2f} ({time.process_time() - started[1]:.2f})"

    for name, asked, new in (
        ("16 requests", prompts, counts),
        ("one request of 64", [prompts[7][:32]], [64]),
    ):
        for _ in range(ROUNDS):
            print(name, seconds(asked, new), flush=True)


if __name__ == "__main__":
    main()
