"""Our server, asked by NVIDIA's own client, and by clients that mean no good."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from llmlab.inference import model_server as ms
from llmlab.inference.model_server import ServerConfig, load, next_batch
from llmlab.models import course_model
from tests.inference.model_server import asking
from tests.inference.model_server.asking import ask, but

TEXT = "The Congress of the"
DYNAMIC = ms.dynamic(0.02, (8,))


@pytest.fixture
def client(ours):
    with triton.InferenceServerClient(ours.url) as made:
        yield made


def text_input(text, binary):
    tensor = triton.InferInput("TEXT", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], np.object_), binary)
    return tensor


def rows_input(rows, binary=True):
    tensor = triton.InferInput("X", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
def test_the_ensemble_is_the_course_model(client, binary):
    wanted = (
        None
        if binary
        else [
            triton.InferRequestedOutput(name, binary_data=False)
            for name in ("WORD", "LOGPROB")
        ]
    )
    got = client.infer("complete", [text_input(TEXT, binary)], outputs=wanted)
    tokenizer = course_model.load_tokenizer()
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    with torch.inference_mode():
        logprobs = course_model.load()(ids)[0, -1].log_softmax(-1)
    word = got.as_numpy("WORD")
    shape = (1, 1)
    assert word.shape == shape
    text = word[0, 0] if isinstance(word[0, 0], str) else word[0, 0].decode()
    assert text == tokenizer.decode([int(logprobs.argmax())])
    assert got.as_numpy("LOGPROB").item() == pytest.approx(
        logprobs.max().item(), abs=1e-4
    )


def test_the_client_sees_a_server_that_lives(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("lm") and client.is_model_ready("lm", "1")
    assert client.get_server_metadata()["name"] == "llmlab"
    assert client.get_model_metadata("lm")["inputs"][0]["shape"] == [-1, -1]
    assert client.get_model_config("lesson")["dynamic_batching"] == {
        "preferred_batch_size": [8],
        "max_queue_delay_microseconds": 20000,
    }
    names = {model["name"] for model in client.get_model_repository_index()}
    assert names == {*asking.STEADY, "tok", "lm", "word", "complete", "types"}


def test_rows_come_back_in_their_order(client):
    rows = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    got = client.infer("plain", [rows_input(rows)], request_id="x")
    assert np.allclose(got.as_numpy("Y")[:, 0], rows.sum(1), atol=1e-5)
    assert got.get_response()["id"] == "x"


def test_all_datatypes_in_binary(client):
    x = triton.InferInput("X", [2], "FP32")
    x.set_data_from_numpy(np.array([np.inf, -2.0], np.float32))
    got = client.infer("types", [x])
    assert got.as_numpy("F").tolist() == [np.inf, -2.0]
    assert got.as_numpy("H").dtype == np.float16
    assert got.as_numpy("B").tolist() == [True, False]
    assert got.as_numpy("I").tolist() == [2**62 + 1] * 2
    assert got.as_numpy("S").tolist() == [b"0", b"1"]


def test_the_client_is_told_why(client):
    with pytest.raises(InferenceServerException, match="must be 1 … 16"):
        client.infer("plain", [rows_input(np.zeros((17, 8), np.float32))])
    with pytest.raises(InferenceServerException, match="'nope' is not found"):
        client.get_model_metadata("nope")


def test_many_clients_share_executions_and_each_gets_its_own_answer(ours):
    before = load.statistics(ours.url, "lesson")
    answers = {}

    def run(number):
        asker = load.Client(ours.url, "lesson", load.body_for([float(number)] * 8))
        answers[number] = [asker.ask()["outputs"][0]["data"] for _ in range(6)]
        asker.close()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: [[8.0 * n]] * 6 for n in range(16)}
    sizes = load.executions(before, load.statistics(ours.url, "lesson"))
    assert sum(size * count for size, count in sizes.items()) == 96
    assert sum(sizes.values()) <= 48


def test_statistics_add_up(ours):
    before = load.statistics(ours.url, "lesson")
    load.closed(ours.url, "lesson", 4, 3)
    after = load.statistics(ours.url, "lesson")
    stats = after["inference_stats"]
    assert after["inference_count"] - before["inference_count"] == 12
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    whole = sum(stats[part]["ns"] for part in parts)
    assert whole == pytest.approx(stats["success"]["ns"], rel=0.02)
    assert load.queued(before, after) > 0.001
    for row in after["batch_stats"]:
        assert row["compute_infer"]["ns"] >= 5e6 * row["compute_infer"]["count"]


def test_a_request_of_several_rows_is_several_inferences(ours):
    before = load.statistics(ours.url, "plain")
    made = but(shape=[3, 8], data=[1.0] * 24)
    assert ask(ours.url, "POST", "/v2/models/plain/infer", made)[0] == 200
    after = load.statistics(ours.url, "plain")
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    counts = [s["inference_stats"]["success"]["count"] for s in (before, after)]
    assert counts[1] - counts[0] == 1


def test_requests_of_different_sizes_share_an_execution(ours):
    found = asking.burst(ours.url, "full", [1, 2, 13], 3)
    assert found["sizes"] == {"16": 1}


def test_metrics_are_read_by_prometheus_and_say_what_the_statistics_say(ours):
    load.closed(ours.url, "plain", 1, 2)
    ask(
        ours.url,
        "POST",
        "/v2/models/types/infer",
        asking.REQUESTS["a model that raises"][2],
    )
    with urllib.request.urlopen(f"http://{ours.url}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        page = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")  # the parser adds it
            found[name, *sorted(sample.labels.items())] = sample.value
    stats = load.statistics(ours.url, "plain")
    labels = (("model", "plain"), ("version", "1"))
    assert found["nv_inference_count", *labels] == stats["inference_count"]
    assert found["nv_inference_exec_count", *labels] == stats["execution_count"]
    assert found["nv_inference_pending_request_count", *labels] == 0
    infer = stats["inference_stats"]["compute_infer"]["ns"]
    name = "nv_inference_compute_infer_duration_us"
    assert found[name, *labels] == infer // 1000
    failed = (("model", "types"), ("reason", "BACKEND"), ("version", "1"))
    assert found["nv_inference_request_failure", *failed] >= 1


# Bounds ------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A server of one model that takes 200 ms, with narrow bounds."""
    repository = ms.write_example(
        tmp_path / "models", {"slow": "", "queued": ms.dynamic(5.0)}, 200, ()
    )
    config = ServerConfig(max_body=2000, max_seconds=0.5, max_pending=3)
    with ms.ModelServer(repository, config) as server:
        yield server


def test_a_body_that_is_too_large_is_not_read(small):
    connection = http.client.HTTPConnection(small.url, timeout=10)
    try:
        connection.request("POST", "/v2/models/slow/infer", b" " * 200_000)
        assert connection.getresponse().status in (400, 413)
    except (ConnectionError, http.client.RemoteDisconnected):
        pass  # cut off while sending: as good
    assert ask(small.url, "POST", "/v2/models/slow/infer", but())[0] == 200


def test_no_answer_in_time_is_504(small):
    status, told = ask(small.url, "POST", "/v2/models/queued/infer", but())
    assert (status, told) == (504, {"error": "no answer within 0.5 seconds"})


def test_too_many_at_once_are_503(small):
    statuses = []

    def send():
        statuses.append(ask(small.url, "POST", "/v2/models/slow/infer", but())[0])

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(503) >= 2 and statuses.count(200) >= 1


def test_a_client_that_sends_half_a_request_holds_up_nobody(small):
    with socket.create_connection((small.config.host, small.port)) as half:
        half.sendall(b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\n")
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        assert ask(small.url, "GET", "/v2/health/ready", None)[0] == 200
        half.settimeout(5)
        assert half.recv(1000) == b"" or True


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1e3", "²"])
def test_a_header_length_that_is_none(ours, length):
    connection = http.client.HTTPConnection(ours.url, timeout=10)
    headers = {"Inference-Header-Content-Length": length.encode()}
    connection.request("POST", "/v2/models/plain/infer", b"{}", headers)
    answer = connection.getresponse()
    assert answer.status == 400 and "error" in json.loads(answer.read())


@pytest.mark.parametrize("name", ["../../etc/passwd", "%2e%2e", "plain%00", "a b"])
def test_names_are_looked_up_and_nothing_else(ours, name):
    path = f"/v2/models/{name.replace(' ', '%20')}"
    assert ask(ours.url, "GET", path, None)[0] == 404


# Learner's own, and broken ones ------------------------------------------------------


def test_another_rule_can_stand_in_the_place_of_ours(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"lesson": DYNAMIC}, 1, ())
    calls = []

    def counted(queue, now, batching):
        calls.append(len(queue))
        return next_batch(queue, now, batching)

    with ms.ModelServer(repository, decide=counted) as server:
        assert ask(server.url, "POST", "/v2/models/lesson/infer", but())[0] == 200
    assert calls


def test_a_rule_that_breaks_is_told_to_whom_it_keeps_waiting(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"lesson": DYNAMIC}, 1, ())

    def broken(queue, now, batching):
        return (len(queue) // 0, None) if queue else (0, None)

    with ms.ModelServer(repository, decide=broken) as server:
        status, told = ask(server.url, "POST", "/v2/models/lesson/infer", but())
    assert status == 500 and "ZeroDivisionError" in told["error"]


def edited(tmp_path, model, text, file="1/model.py"):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1)
    (repository / model / file).write_text(text)
    return repository


@pytest.mark.parametrize(
    ("model", "text", "file", "told"),
    [
        ("steady", "1 +", "1/model.py", "steady/1/model.py: SyntaxError"),
        ("steady", "x = 1", "1/model.py", "AttributeError"),
        ("steady", "max_batch: 1", "config.pbtxt", "max_batch is not served here"),
        (
            "steady",
            'backend: "torch" input { name: "X" data_type: TYPE_FP32 dims: 1 }'
            ' output { name: "Y" data_type: TYPE_FP32 dims: 1 }',
            "config.pbtxt",
            "there is no backend 'torch'; there are python",
        ),
        (
            "tok",
            'backend: "python" input { name: "TEXT" data_type: TYPE_STRING dims: 1 }'
            ' output { name: "IDS" data_type: TYPE_FP32 dims: 1 }',
            "config.pbtxt",
            "'ids' is FP32, and lm wants INT64",
        ),
    ],
)
def test_what_does_not_fit_is_told_at_the_start(tmp_path, model, text, file, told):
    repository = edited(tmp_path, model, text, file)
    with pytest.raises(ValueError) as error:
        ms.ModelServer(repository)
    assert told in str(error.value)


BODY = """
import numpy as np, triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        return {answers}
"""


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ("None", "execute returned NoneType for 1 requests"),
        ("[]", "execute returned 0 for 1 requests"),
        ("[pb.InferenceResponse([])]", "the output 'Y' is missing"),
        (
            "[pb.InferenceResponse([pb.Tensor('Y', np.zeros((1, 1)))])]",
            "the output 'Y' is FP64, not FP32",
        ),
        ("1 / 0", "Failed to process the request(s) for model 'steady_0'"),
    ],
)
def test_a_model_that_answers_wrongly_is_told_and_goes_on(tmp_path, answers, told):
    repository = edited(tmp_path, "steady", BODY.format(answers=answers))
    with ms.ModelServer(repository) as server:
        for _ in range(2):
            status, answer = ask(server.url, "POST", "/v2/models/steady/infer", but())
            assert status == 500 and told in answer["error"]
        stats = load.statistics(server.url, "steady")
        assert stats["inference_stats"]["fail"]["count"] == 2


def test_versions_the_newest_is_served(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1, ())
    for name in ("2", "10", "03", "draft"):
        shutil.copytree(repository / "steady" / "1", repository / "steady" / name)
    assert ms.read_repository(repository)["steady"].version == 10


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda r: shutil.rmtree(r), "is no folder"),
        (lambda r: shutil.rmtree(r / "steady"), "holds no model"),
        (lambda r: shutil.rmtree(r / "steady" / "1"), "steady has no version"),
        (lambda r: (r / "steady" / "config.pbtxt").unlink(), "has no config.pbtxt"),
    ],
)
def test_a_repository_that_is_none(tmp_path, spoil, told):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1, ())
    spoil(repository)
    with pytest.raises(ValueError, match=told):
        ms.read_repository(repository)


def test_a_model_without_its_file(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1, ())
    (repository / "steady" / "1" / "model.py").unlink()
    with pytest.raises(ValueError, match="steady/1 has no model"):
        ms.ModelServer(repository)


def test_the_example_is_not_written_over_something(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        ms.write_example(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"port": -1}, {"max_body": 0}, {"max_seconds": 0}]
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServerConfig(**settings)


def test_a_port_that_is_taken(ours, tmp_path):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1, ())
    taken = ms.ModelServer(repository, ServerConfig(port=ours.port))
    with pytest.raises(OSError):
        taken.start()
    taken.stop()


def test_stopping_answers_those_who_wait(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"q": ms.dynamic(30.0)}, 1, ())
    server = ms.ModelServer(repository).start()
    request = ms.InferRequest({"X": np.zeros((1, 8), np.float32)})
    future = server.models["q"].submit(request)
    server.stop()
    with pytest.raises(ms.Refused, match="is being unloaded"):
        future.result(5)


def test_from_the_command_line(tmp_path):
    repository = ms.write_example(tmp_path / "models", {"steady": ""}, 1, ())
    command = [sys.executable, "-m", "llmlab.inference.model_server", str(repository)]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving steady on http://127.0.0.1:")
        url = line.split("//")[1].split("/")[0]
        assert ask(url, "POST", "/v2/models/steady/infer", but())[0] == 200
    finally:
        process.terminate()
        process.wait(20)
    failed = subprocess.run(
        [*command[:-1], str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert failed.returncode == 1 and "is no folder" in failed.stderr


def test_the_load_is_sent_at_its_times(ours):
    times = [0.0, 0.03, 0.06]
    began = time.perf_counter()
    took = load.opened(ours.url, "plain", times, threads=3)
    assert time.perf_counter() - began >= 0.06 + load.LATE
    assert len(took) == 3 and min(took) >= 0.005
