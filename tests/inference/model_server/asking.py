"""What the real Triton and our server are both asked, and how."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from pathlib import Path

from llmlab.inference import model_server as ms
from llmlab.inference.model_server import load

HERE = Path(__file__).parent
GOLDEN = HERE.parents[0] / "golden" / "model_server.json"
# copies of the model that takes 5 ms: name → how it batches
STEADY = {
    "plain": "",
    "quick": "dynamic_batching { }",
    "full": ms.dynamic(0.3),
    "sizes": ms.dynamic(0.3, (4, 8)),
    "bounded": (
        "dynamic_batching { max_queue_delay_microseconds: 300000"
        " default_queue_policy { max_queue_size: 2 } }"
    ),
    "lesson": ms.dynamic(0.02, (8,)),
}
X = {"name": "X", "shape": [1, 8], "datatype": "FP32", "data": [1.0] * 8}
TYPES = {"name": "X", "shape": [2], "datatype": "FP32", "data": [0.1, -2.0]}


def but(tensor=X, **changes):
    """An infer request of one tensor, with something changed; None takes it out."""
    made = {k: v for k, v in {**tensor, **changes}.items() if v is not None}
    return {"inputs": [made]}


def outputs(*names):
    return {"outputs": [{"name": name} for name in names]}


INFER = "/v2/models/plain/infer"
INFER_TYPES = "/v2/models/types/infer"
# name → (method, path, body)
REQUESTS = {
    "live": ("GET", "/v2/health/live", None),
    "ready": ("GET", "/v2/health/ready", None),
    "a model is ready": ("GET", "/v2/models/plain/ready", None),
    "an unknown model is ready": ("GET", "/v2/models/nope/ready", None),
    "metadata": ("GET", "/v2/models/plain", None),
    "metadata of a version": ("GET", "/v2/models/plain/versions/1", None),
    "metadata of an ensemble": ("GET", "/v2/models/complete", None),
    "metadata of a model without a batch": ("GET", "/v2/models/tok", None),
    "an unknown model": ("GET", "/v2/models/nope", None),
    "an unknown version": ("GET", "/v2/models/plain/versions/7", None),
    "an unknown address": ("GET", "/v2/nope", None),
    "infer by GET": ("GET", INFER, None),
    "config by POST": ("POST", "/v2/models/plain/config", b""),
    "one row": ("POST", INFER, but()),
    "an id": ("POST", INFER, {"id": "abc", **but()}),
    "two rows, nested": ("POST", INFER, but(shape=[2, 8], data=[[1] * 8, [2] * 8])),
    "nested otherwise": ("POST", INFER, but(shape=[2, 8], data=[[1] * 4, [2] * 12])),
    "whole numbers": ("POST", INFER, but(data=[1] * 8)),
    "a tenth": ("POST", INFER, but(data=[0.1] + [0] * 7)),
    "unknown keys": ("POST", INFER, {"hello": 1, **but(more=3)}),
    "no outputs asked": ("POST", INFER, {**but(), "outputs": []}),
    "one output asked": ("POST", INFER, {**but(), **outputs("Y")}),
    "an unknown model to infer": ("POST", "/v2/models/nope/infer", but()),
    "no JSON": ("POST", INFER, b"{oops"),
    "an empty body": ("POST", INFER, b""),
    "no inputs": ("POST", INFER, {}),
    "a batch too large": ("POST", INFER, but(shape=[17, 8], data=[1] * 136)),
    "an empty batch": ("POST", INFER, but(shape=[0, 8], data=[])),
    "wrong dims": ("POST", INFER, but(shape=[1, 7], data=[1] * 7)),
    "no batch dimension": ("POST", INFER, but(shape=[8])),
    "too few numbers": ("POST", INFER, but(data=[1] * 7)),
    "too many numbers": ("POST", INFER, but(data=[1] * 9)),
    "another datatype": ("POST", INFER, but(datatype="INT32", data=[1] * 8)),
    "an unknown datatype": ("POST", INFER, but(datatype="FLOAT")),
    "texts for numbers": ("POST", INFER, but(data=["1"] * 8)),
    "true for numbers": ("POST", INFER, but(data=[True] * 8)),
    "null for numbers": ("POST", INFER, but(data=[None] * 8)),
    "a negative shape": ("POST", INFER, but(shape=[-1, 8])),
    "no name": ("POST", INFER, but(name=None)),
    "no shape": ("POST", INFER, but(shape=None)),
    "no data": ("POST", INFER, but(data=None)),
    "an id that is no text": ("POST", INFER, {"id": 5, **but()}),
    "an input too many": (
        "POST",
        INFER,
        {"inputs": [X, {**X, "name": "Z"}]},
    ),
    "an input twice": ("POST", INFER, {"inputs": [X, X]}),
    "another input": ("POST", INFER, but(name="Z")),
    "an unknown output": ("POST", INFER, {**but(), **outputs("Q")}),
    "all types": ("POST", INFER_TYPES, {**but(TYPES), **outputs(*"FBIS", "TOLD")}),
    "FP16 as JSON": ("POST", INFER_TYPES, {**but(TYPES), **outputs("H")}),
    "an overflow": (
        "POST",
        INFER_TYPES,
        {**but(TYPES, data=[1e39, 1]), **outputs("F")},
    ),
    "a model that raises": ("POST", INFER_TYPES, but(TYPES, shape=[3], data=[1] * 3)),
    "a model that refuses": ("POST", INFER_TYPES, but(TYPES, shape=[4], data=[1] * 4)),
    "the ensemble": (
        "POST",
        "/v2/models/complete/infer",
        {
            "inputs": [
                {
                    "name": "TEXT",
                    "shape": [1],
                    "datatype": "BYTES",
                    "data": ["The Congress of the"],
                }
            ]
        },
    ),
    "a refusal inside the ensemble": (
        "POST",
        "/v2/models/complete/infer",
        {"inputs": [{"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": [""]}]},
    ),
    "the repository": ("POST", "/v2/repository/index", b""),
}
# bursts: name → (model, rows of each request, milliseconds between two)
BURSTS = {
    "a lone request": ("full", [1], 0),
    "a lone request, no delay": ("quick", [1], 0),
    "as many as fit": ("full", [1] * 16, 3),
    "four more": ("full", [1] * 20, 3),
    "three rows each": ("full", [3] * 6, 5),
    "a preferred size, and two": ("sizes", [1] * 6, 10),
    "a preferred size twice, and one": ("sizes", [1] * 9, 20),
    "past the largest preferred size": ("sizes", [3] * 4, 20),
    "larger than the preferred sizes": ("sizes", [9], 0),
    "without dynamic batching": ("plain", [1] * 5, 0),
    "a queue of two": ("bounded", [1] * 5, 10),
}


def write_repository(folder):
    """The lesson's models, copies of the steady one, and one of all types."""
    root = ms.write_example(folder, STEADY)
    shutil.copytree(
        HERE / "models" / "types",
        root / "types",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return root


def ask(url, method, path, body):
    """(status, the answer as data, or as text where it is no JSON)."""
    connection = http.client.HTTPConnection(url, timeout=60)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    try:
        return answer.status, json.loads(text) if text else ""
    except ValueError:
        return answer.status, text


def succeeded(statistics):
    """The requests that were answered, by the model's statistics."""
    return statistics["inference_stats"]["success"]["count"]


def burst(url, model, rows, milliseconds):
    """{batch size: executions}, refusals, and seconds in the queue, on average."""
    before = load.statistics(url, model)
    statuses = []

    def send(count):
        made = but(shape=[count, 8], data=[1.0] * 8 * count)
        path = f"/v2/models/{model}/infer"
        statuses.append(ask(url, "POST", path, made)[0])

    threads = [threading.Thread(target=send, args=(count,)) for count in rows]
    for thread in threads:
        thread.start()
        time.sleep(milliseconds / 1000)
    for thread in threads:
        thread.join()
    refused = sum(status != 200 for status in statuses)
    wanted = succeeded(before) + len(rows) - refused
    deadline = time.monotonic() + 10
    after = load.statistics(url, model)
    while succeeded(after) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)  # Triton answers first and counts then
        after = load.statistics(url, model)
    sizes = load.executions(before, after)
    return {
        "sizes": {str(size): count for size, count in sorted(sizes.items())},
        "refused": refused,
        "queue": load.queued(before, after),
    }
