"""What the real Triton and MLServer answer, for tests/inference/model_server.

    python scripts/golden/model_server_goldens.py

Needs `llmlab peer triton` and `llmlab peer mlserver`. The requests are those of
tests/inference/model_server/asking.py. Written: answers and statuses, configurations,
the names of statistics and of metrics, and the batches that bursts came to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from llmlab.course import peers
from llmlab.inference import model_server as ms
from llmlab.inference.model_server.triton import free_ports
from tests.inference.model_server import asking

CONFIGS = ("plain", "sizes", "bounded", "lm", "complete")
MLSERVER = """
import time
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Steady(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        x = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        time.sleep(0.005)
        y = x.sum(-1, keepdims=True).astype("float32")
        output = NumpyCodec.encode_output("Y", y)
        return InferenceResponse(model_name=self.name, outputs=[output])
"""


def triton() -> dict:
    folder = asking.write_repository(Path(tempfile.mkdtemp()) / "models")
    with ms.TritonServer(peers.make("triton"), folder) as server:
        bursts = {}
        for name, (model, rows, gap) in asking.BURSTS.items():
            asking.burst(server.url, model, [1], 0)  # the first one is slow
            bursts[name] = asking.burst(server.url, model, rows, gap)
        answers = {n: asking.ask(server.url, *r) for n, r in asking.REQUESTS.items()}
        _, told = asking.ask(server.url, "GET", "/v2", None)
        asking.burst(server.url, "lesson", [1], 0)
        _, stats = asking.ask(server.url, "GET", "/v2/models/lesson/stats", None)
        configs = {
            name: asking.ask(server.url, "GET", f"/v2/models/{name}/config", None)[1]
            for name in CONFIGS
        }
        page = f"http://{server.host}:{server.metrics_port}/metrics"
        with urllib.request.urlopen(page) as answer:
            metrics = answer.read().decode()
    names = sorted(set(re.findall(r"^(nv_inference_\w+)\{", metrics, re.MULTILINE)))
    return {
        "version": told["version"],
        "answers": {name: list(found) for name, found in answers.items()},
        "bursts": bursts,
        "configs": configs,
        "statistics": fields(stats["model_stats"][0]),
        "metrics": names,
        "metrics_of_one": [
            line for line in metrics.splitlines() if 'model="lesson"' in line
        ],
    }


def fields(value: object) -> object:
    """The names in an answer, without the numbers."""
    if isinstance(value, dict):
        return {key: fields(each) for key, each in value.items()}
    if isinstance(value, list):
        return [fields(value[0])] if value else []
    return type(value).__name__


def mlserver() -> dict:
    python = peers.make("mlserver")
    folder = Path(tempfile.mkdtemp())
    (folder / "model.py").write_text(MLSERVER)
    ports = free_ports(3)
    settings = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    settings |= {"parallel_workers": 0, "host": "127.0.0.1", "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    tensors = {
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 8]}],
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [-1, 1]}],
    }
    model = {"name": "plain", "implementation": "model.Steady", **tensors}
    (folder / "model-settings.json").write_text(json.dumps(model))
    process = subprocess.Popen(
        [str(python.parent / "mlserver"), "start", str(folder)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"127.0.0.1:{ports[0]}"
    try:
        for _ in range(600):
            try:
                if asking.ask(url, "GET", "/v2/health/ready", None)[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        answers = {
            name: list(asking.ask(url, *request))
            for name, request in asking.REQUESTS.items()
            if "/plain" in request[1] or "health" in request[1]
        }
        _, told = asking.ask(url, "GET", "/v2", None)
    finally:
        process.terminate()
        process.wait()
    return {"version": told["version"], "answers": answers}


if __name__ == "__main__":
    found = {"triton": triton(), "mlserver": mlserver()}
    text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
    asking.GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"{asking.GOLDEN}: {len(text)} characters")
