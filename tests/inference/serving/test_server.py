"""A live server, asked by the real `openai` client and by clients that behave badly."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from llmlab.course.mine import Own
from llmlab.inference.engine import Adapter, Engine, EngineConfig, SamplingParams
from llmlab.inference.serving import ServingConfig
from llmlab.models import course_model
from tests.inference.serving import live as living
from tests.inference.serving.test_openai_api import BODIES

TOKENIZER = course_model.load_tokenizer()
PROMPT = "The people of the United States"
TALK = [{"role": "user", "content": "What is the sea?"}]


@pytest.fixture(scope="module")
def server(folder, adapter):
    with living.live(folder, {"lora": adapter}) as server:
        yield server


@pytest.fixture
def client(server):
    """OpenAI's own client."""
    with openai.OpenAI(
        base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(adapter):
    """What the engine writes by itself, greedily: (prompt, tokens, adapter) → text."""
    config = EngineConfig(num_blocks=64)
    model = course_model.load_draft()
    engine = Engine(model, config, adapters={"lora": Adapter.load(adapter)})

    def write(prompt: str, most: int, name: str | None = None) -> str:
        params = SamplingParams(max_new_tokens=most, stop_tokens=(0,))
        ids = TOKENIZER.encode(prompt).ids
        return TOKENIZER.decode(engine.generate([ids], params, [name])[0])

    return write


# Answers


def test_a_completion_is_what_the_engine_writes(client, expected):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=20
    )
    assert answer.choices[0].text == expected(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(PROMPT).ids)
    assert answer.usage.completion_tokens == 20


def test_each_adapter_says_its_own(client, expected):
    said = {}
    for model, name in (("tiny", None), ("lora", "lora")):
        answer = client.completions.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=20
        )
        said[model] = answer.choices[0].text
        assert said[model] == expected(PROMPT, 20, name)
    assert said["tiny"] != said["lora"]


def test_a_conversation_goes_through_the_template(client, expected):
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, temperature=0, max_completion_tokens=12
    )
    text = "user: What is the sea?\nassistant:"
    assert answer.choices[0].message.content == expected(text, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(text).ids)


def test_a_stream_is_the_same_text_in_pieces(client, expected):
    stream = client.chat.completions.create(
        model="tiny",
        messages=TALK,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    said = [p.choices[0].delta.content or "" for p in pieces if p.choices]
    assert "".join(said) == expected("user: What is the sea?\nassistant:", 12)
    assert len([text for text in said if text]) > 6
    reasons = [p.choices[0].finish_reason for p in pieces if p.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 12
    assert len({p.id for p in pieces}) == 1


def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(server):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in answer.text


def test_a_text_ends_before_a_stop_string(server, expected):
    whole = expected(PROMPT, 30)
    words = whole.split(" ")
    stop = f"{words[3][-2:]} {words[4][:2]}"  # across a border of tokens
    want = whole[: whole.index(stop)]
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": ["zzz", stop]}
    choice = server.post(**body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "stop")
    events = server.events(**body)
    assert "".join(e["choices"][0]["text"] for e in events) == want
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    server.settles()


def test_several_answers_and_several_prompts(server, expected):
    body = {"prompt": [PROMPT, "It was"], "n": 2, "temperature": 0, "max_tokens": 6}
    answer = server.post(**body).json()
    want = [expected(PROMPT, 6)] * 2 + [expected("It was", 6)] * 2
    assert [c["text"] for c in answer["choices"]] == want
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 24
    texts = dict.fromkeys(range(4), "")
    for event in server.events(**body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert [*texts.values()] == want


def test_a_seed_repeats_and_choices_differ(server):
    body = {"prompt": PROMPT, "temperature": 1.2, "seed": 5, "max_tokens": 12, "n": 2}
    first, second = (server.post(**body).json()["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in second]
    assert first[0]["text"] != first[1]["text"]
    other = server.post(**body | {"seed": 9}).json()["choices"]
    assert other[0]["text"] != first[0]["text"]


def test_samplers_arrive(server, expected):
    """With one token to choose from, sampling is greedy."""
    want = expected(PROMPT, 10)
    for one in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        body = {"prompt": PROMPT, "max_tokens": 10, "temperature": 1.5} | one
        assert server.post(**body).json()["choices"][0]["text"] == want
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    again = server.post(**body, frequency_penalty=2).json()["choices"][0]["text"]
    assert again != expected(PROMPT, 20)


def test_tokens_are_a_prompt_too(server, expected):
    ids = TOKENIZER.encode(PROMPT).ids
    assert server.text(prompt=ids, max_tokens=5) == expected(PROMPT, 5)


def test_a_repeated_prompt_is_found_in_the_cache(server):
    prompt = "A long beginning that is asked for twice, and then some more of it. " * 2
    server.text(prompt)
    before = server.server.supervisor.health.counts["found"]
    server.text(prompt)
    assert server.server.supervisor.health.counts["found"] > before


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "lora"]
    assert client.models.retrieve("lora").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


# Errors


def test_errors_have_their_types(client):
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is tiny, lora") as error:
        ask(model="other", messages=TALK)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"temperature=9.0") as error:
        ask(model="tiny", messages=TALK, temperature=9.0)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        ask(model="tiny", messages=TALK, logprobs=True)
    with pytest.raises(openai.BadRequestError, match="it speaks first"):
        ask(model="tiny", messages=[{"role": "assistant", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="may have 200") as error:
        ask(model="tiny", messages=[{"role": "user", "content": "sea " * 300}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the token 2048"):
        client.completions.create(model="tiny", prompt=[2048])


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"method": "GET", "url": "/v1/completions"}, 405, "GET /v1/completions"),
        ({"method": "POST", "url": "/nowhere", "json": {}}, 404, "/nowhere"),
        ({"method": "POST", "url": "/v1/completions", "content": b"{}"}, 415, "json"),
        (
            {"method": "POST", "url": "/v1/completions", "json": {"a": "x" * 2**20}},
            413,
            "1,048,576 bytes",
        ),
        (
            {"method": "GET", "url": "/", "headers": {"Host": "evil.example:80"}},
            403,
            "not this machine",
        ),
        (
            {
                "method": "POST",
                "url": "/v1/completions",
                "headers": {"Origin": "http://evil.example"},
                "json": {},
            },
            403,
            "other sites",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_whatever_is_wrong_is_said_in_json(server, request_, status, words):
    answer = server.http.request(**request_)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert "Access-Control-Allow-Origin" not in answer.headers


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(BODIES)
def test_no_body_breaks_it(server, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = server.http.post(path, content=content, headers=headers)
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["message"]


def test_the_page_allows_nothing_from_elsewhere(server):
    answer = server.http.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in policy
    assert "//" not in answer.text.replace("://", "") or "src=" not in answer.text
    assert server.http.get("/about").json()["models"] == ["tiny", "lora"]


def test_it_listens_on_this_machine_alone(server):
    assert server.base.startswith("http://127.0.0.1:")
    addresses = [s.getsockname()[0] for s in server.server.sockets]
    assert addresses == ["127.0.0.1"]


def test_metrics_count(server):
    before = server.metric("llmlab_generation_tokens_total")
    first = server.metric("llmlab_time_to_first_token_seconds_count")
    server.text(max_tokens=7)
    assert server.metric("llmlab_generation_tokens_total") == before + 7
    assert server.metric("llmlab_time_to_first_token_seconds_count") == first + 1
    assert server.metric("llmlab_inter_token_latency_seconds_count") >= 6
    assert server.metric("llmlab_request_queue_time_seconds_count") >= 1
    assert server.metric("llmlab_blocks") == 64
    server.settles()


# Clients that go away


def connection(server, **body) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    text = json.dumps({"model": "tiny", "prompt": PROMPT, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {server.base[7:]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    port = int(server.base.rsplit(":", 1)[1])
    made = socket.create_connection(("127.0.0.1", port))
    made.sendall(head.encode() + text)
    return made


HUNG_UP = 'llmlab_requests_total{outcome="hung up"} 1.0'
PAUSE = 0.02  # seconds before each step


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_leaves_nothing(folder, stream):
    with living.live(folder, pause=PAUSE) as server:
        made = connection(server, stream=stream, max_tokens=190)
        living.until(lambda: server.metric("llmlab_requests_running") == 1)
        made.close()
        living.until(lambda: HUNG_UP in server.http.get("/metrics").text)
        server.settles()
        assert server.metric("llmlab_step_seconds_count") < 190  # it did not go on


def test_half_a_request_leaves_nothing(server):
    port = int(server.base.rsplit(":", 1)[1])
    for part in (b"POST /v1/comp", b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        made = socket.create_connection(("127.0.0.1", port))
        made.sendall(part)
        made.close()
    assert server.text()
    server.settles()


# Limits


def test_a_full_queue_says_when_to_come_again(folder):
    with living.live(folder, max_sequences=1, max_queue=1, pause=PAUSE) as server:
        slow = [connection(server, max_tokens=190) for _ in range(2)]
        living.until(lambda: server.metric("llmlab_requests_in_flight") == 2)
        client = openai.OpenAI(
            base_url=f"{server.base}/v1", api_key="none", max_retries=0
        )
        with (
            client,
            pytest.raises(openai.RateLimitError, match="queue is full") as error,
        ):
            client.completions.create(model="tiny", prompt="x")
        assert int(error.value.response.headers["Retry-After"]) >= 1
        for each in slow:
            each.close()
        server.settles()
        assert server.text()
        never = server.post(prompt="x", n=3)
        assert never.status_code == 400
        assert "room for 2 at one time" in never.json()["error"]["message"]


def test_a_full_cache_makes_requests_wait_and_all_are_answered(folder, expected):
    """Room for two of the eight at a time: they are sent back, and write the same."""
    with living.live(folder, cache_tokens=192, max_length=96) as server:
        prompts = [f"{n} {PROMPT}" for n in "abcdefgh"]
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda p: server.text(p, max_tokens=60), prompts))
        assert texts == [expected(prompt, 60) for prompt in prompts]
        server.settles()


def test_an_answer_has_so_much_time(folder):
    with living.live(folder, max_seconds=0.2, pause=PAUSE) as server:
        answer = server.post(prompt=PROMPT, max_tokens=190)
        assert answer.status_code == 504
        assert "over 0.2 seconds" in answer.json()["error"]["message"]
        server.settles()


def test_more_tokens_than_there_is_room_for_are_cut(server):
    answer = server.post(prompt=PROMPT, max_tokens=100_000, temperature=0).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 200


@pytest.mark.parametrize(
    "wrong", [{"max_length": 0}, {"max_queue": -1}, {"max_seconds": 0}]
)
def test_limits_are_named_when_wrong(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        ServingConfig(**wrong)


# The worker


def streamed(server, name: str = "tiny") -> str:
    """How OpenAI's client ends a long stream that breaks off."""
    with openai.OpenAI(
        base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        try:
            for _ in client.completions.create(
                model=name, prompt=PROMPT, max_tokens=190, stream=True
            ):
                pass
        except openai.APIError as error:
            return error.message
    return ""


def test_a_killed_worker_is_replaced_and_who_waited_is_told(folder, expected):
    with living.live(folder, pause=PAUSE) as server:
        pid = server.server.supervisor.pid
        with ThreadPoolExecutor(3) as pool:
            plain = pool.submit(server.post, prompt=PROMPT, max_tokens=190, n=2)
            stream = pool.submit(streamed, server)
            living.until(lambda: server.metric("llmlab_requests_running") == 3)
            os.kill(pid, signal.SIGSTOP)  # so that it cannot end before
            os.kill(pid, signal.SIGKILL)
            answer = plain.result(60)
            assert stream.result(60) == "the worker was ended by SIGKILL"
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["message"] == "the worker was ended by SIGKILL"
        assert error["type"] == "server_error"
        living.until(lambda: server.health["status"] == "ready")
        assert server.health["restarts"] == 1
        assert not psutil.pid_exists(pid)
        assert server.text(PROMPT) == expected(PROMPT, 12)
        server.settles()


def test_a_worker_that_does_not_move_is_replaced(folder):
    with living.live(folder, options={"stall": 0.5}) as server:
        pid = server.server.supervisor.pid
        os.kill(pid, signal.SIGSTOP)
        answer = server.post(prompt=PROMPT, max_tokens=5)
        assert answer.status_code == 500
        assert "silent for 0.5 seconds" in answer.json()["error"]["message"]
        living.until(lambda: server.health["status"] == "ready")
        assert server.text()


def test_a_model_that_cannot_be_loaded_is_said_with_the_reason(folder, tmp_path):
    broken = living.make_folder(tmp_path)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RuntimeError, match=r"could not start.*model.safetensors"):
        living.Live(broken, {})


def test_while_the_worker_starts_it_says_so(folder):
    with living.live(folder) as server:
        os.kill(server.server.supervisor.pid, signal.SIGKILL)
        living.until(lambda: server.server.supervisor.health.restarts == 1)
        answer = server.post(prompt=PROMPT)
        if answer.status_code != 200:  # it may be ready by now
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
            assert "SIGKILL" in answer.json()["error"]["message"]


def test_nothing_stays(folder):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with living.live(folder, pause=PAUSE) as server:
        waiting = connection(server, max_tokens=190)
        living.until(lambda: server.metric("llmlab_requests_running") == 1)
        port = int(server.base.rsplit(":", 1)[1])
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    said = waiting.recv(65536).decode()
    assert "503" in said or "shutting down" in said or not said
    waiting.close()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    names = [t.name for t in threading.enumerate() if "asyncio" in t.name]
    assert len(names) < 20


# Load


def test_two_hundred_requests_of_all_kinds(folder, adapter):
    """Each ends with an answer or with an error that says why; nothing leaks."""
    from scripts import load_test

    with living.live(
        folder, {"lora": adapter}, cache_tokens=512, max_queue=24
    ) as server:
        began = time.monotonic()
        report = load_test.run(
            server.base, 200, clients=24, kill=server.server.supervisor, limit=120
        )
        assert report.unexplained == []
        assert sum(report.outcomes.values()) == 200
        for kind in (
            "answered",
            "hung up",
            "context_length_exceeded",
            "model_not_found",
        ):
            assert report.outcomes[kind] > 0, report.outcomes
        assert time.monotonic() - began < 120
        living.until(lambda: server.health["status"] == "ready")
        server.settles()
        assert server.health["restarts"] == 1


# A learner's own pieces


def own(name: str, code: str) -> Own:
    """An answer as `mine.collect` gives it."""
    return Own("07-inference/03-paged-attention", name, "right", cells=(("<n>", code),))


RIGHT = """
from llmlab.inference import paged_attention as paged
calls = 0
def free(pool, table):
    global calls
    calls += 1
    {fault}
    return paged.free(pool, table)
"""


def with_own_free(folder, fault: str, **options):
    row = {"piece": "free", "exercise": "e", "whose": "yours", "why": ""}
    code = RIGHT.format(fault=fault)
    return living.live(folder, own=(own("free", code),), pieces=(row,), **options)


def whose(server) -> tuple[str, str]:
    (row,) = server.http.get("/about").json()["pieces"]
    return row["whose"], row["why"]


def test_a_piece_that_is_right_serves(folder, expected):
    with with_own_free(folder, "pass") as server:
        assert server.text(PROMPT) == expected(PROMPT, 12)
        assert whose(server) == ("yours", "")
        server.settles()
        os.kill(server.server.supervisor.pid, signal.SIGKILL)
        living.until(lambda: server.health["restarts"] == 1)
        assert server.health["left_out"] == {}  # it was not running then


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("assert calls < 3, 'the third'", "raised AssertionError: the third"),
        ("table = table[:-1] if calls == 3 else table", "left block"),
        ("__import__('os')._exit(3) if calls == 3 else None", "ended with status 3"),
        ("while calls == 3: pass", "silent for 1 seconds"),
    ],
)
def test_a_piece_that_fails_is_named_and_ours_goes_on(folder, expected, fault, words):
    with with_own_free(folder, fault, options={"stall": 1.0}) as server:
        assert [server.text(PROMPT) for _ in range(2)] == [expected(PROMPT, 12)] * 2
        answer = server.post(prompt=PROMPT, max_tokens=12)
        said = answer.json()["error"]["message"]
        assert answer.status_code == 500
        assert said.startswith("your free failed while serving: ") and words in said
        living.until(lambda: server.health["status"] == "ready")
        assert whose(server)[0] == "ours" and words in whose(server)[1]
        assert server.health["left_out"].keys() == {"free"}
        assert [server.text(PROMPT) for _ in range(4)] == [expected(PROMPT, 12)] * 4
        assert any("ours stands in its place" in line for line in server.said)
        server.settles()
