"""`llmlab serve`: what it says, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from functools import partial

import httpx
import psutil
import pytest
import torch
from typer.testing import CliRunner

from llmlab.compression import formats, recipes
from llmlab.compression import quantization_basics as qb
from llmlab.compression.kernels.plugins import PLUGINS
from llmlab.course import mine, served
from llmlab.course.cli import serve as command
from llmlab.course.cli.main import app
from llmlab.course.syllabus import find
from llmlab.inference.engine import BuildConfig, SamplingParams, build
from llmlab.inference.engine.plugins import TORCH
from llmlab.models import checkpoint, course_model
from llmlab.models.c_library import compiler
from tests import processes
from tests.course.learner import ROOT
from tests.inference.serving.live import make_adapter, make_folder
from tests.models.hugging_face import make

LIMIT = 90  # seconds for what takes one: a busy machine is slow


def run(*words):
    done = CliRunner().invoke(app, ["serve", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


# What it refuses


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--model", "nowhere"], 2, "'nowhere' is no folder; smollm2 (the real model)"),
        (["--model", "."], 2, "has no config.json"),
        (["--model", "course", "--adapter", "x"], 2, "must be NAME=FOLDER"),
        (["--model", "course", "--adapter", "x=."], 2, "has no adapter_config.json"),
        (["--model", "course", "--adapter", "course=."], 2, "'course' is taken"),
        (["--model", "course", "--host", "no such host"], 1, "cannot listen on"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    code, output = run(*words, "--port", 0)
    assert code == status and said in output, output


def test_a_port_in_use_is_said_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, output = run("--model", "course", "--port", port)
    assert code == 1
    assert f"port {port} of 127.0.0.1 is in use" in output and "--port" in output


def test_without_the_real_model_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, output = run("--port", 0)
    assert code == 2
    assert "llmlab model fetch" in output and "--model course" in output


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, output = run("--model", tmp_path, "--port", 0)
    assert code == 2 and "tokenizer.json does not exist" in output


def test_an_engine_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "engine.json").write_text('{"limits": {}}')
    code, output = run("--model", tmp_path, "--port", 0)
    assert code == 2 and "has no tokenizer.json: older builds left it out" in output
    for text in ("{", "[]", "{}"):
        (tmp_path / "engine.json").write_text(text)
        code, output = run("--model", tmp_path, "--port", 0)
        assert code == 2 and "is not what `build` writes" in output


# What it serves


def forked_server(*words: str) -> None:
    """The command, in a fork that has imported what a worker needs."""
    from llmlab.inference.serving import server

    torch.set_num_threads(1)
    server.Supervisor = partial(server.Supervisor, method="fork")
    app(["serve", "--port", "0", *words], standalone_mode=True)


def address_of(program) -> str:
    """What it says once the model is loaded."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = re.search(r"OpenAI API: (\S+)", program.output())
        if found:
            return found.group(1)
        time.sleep(0.02)
    raise AssertionError(program.output())


class Program:
    """A forked command, and what it has printed so far."""

    def __init__(self, fork, path) -> None:
        self.fork = fork
        self.path = path

    def output(self) -> str:
        return self.path.read_text() if self.path.exists() else ""


@pytest.fixture
def started(tmp_path):
    """Starts the command; its output goes to a file."""
    forks = []

    def start(*words: str) -> Program:
        path = tmp_path / "output"

        def program() -> None:
            out = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            forked_server(*map(str, words))

        context = processes.forked(program)
        fork = context.__enter__()
        forks.append(context)
        return Program(fork, path)

    yield start
    for context in forks:
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("how", "built"), [(signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_it_serves_until_it_is_stopped(started, tmp_path, how, built):
    """A checkpoint, or the engine that was built from it."""
    (tmp_path / "adapter").mkdir()
    adapter = make_adapter(tmp_path / "adapter")
    (tmp_path / "first").mkdir()
    folder = make_folder(tmp_path / "first")
    if built:
        config = BuildConfig(max_sequences=4, max_tokens=32, num_blocks=40)
        build(folder, tmp_path / "tiny", config, clock=lambda run: 1.0)
        folder = tmp_path / "tiny"
    else:
        folder = folder.rename(tmp_path / "tiny")
    program = started("--model", folder, "--adapter", f"sea={adapter}")
    address = address_of(program)
    assert [m["id"] for m in httpx.get(f"{address}/models").json()["data"]] == [
        "tiny",
        "sea",
    ]
    body = {"model": "sea", "prompt": "The sea", "max_tokens": 3}
    answer = httpx.post(f"{address}/completions", json=body, timeout=LIMIT)
    assert answer.json()["usage"]["completion_tokens"] == 3
    os.kill(program.fork.pid, how)
    assert program.fork.wait(LIMIT).returncode == 0
    said = program.output()
    assert "serving tiny, sea" in said and "chat page:" in said
    assert said.rstrip().endswith("ended")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/models")


def test_when_it_is_killed_its_worker_ends_too(started, tmp_path):
    (tmp_path / "tiny").mkdir()
    program = started("--model", make_folder(tmp_path / "tiny"))
    address_of(program)
    workers = psutil.Process(program.fork.pid).children(recursive=True)
    assert workers
    os.kill(program.fork.pid, signal.SIGKILL)
    assert psutil.wait_procs(workers, timeout=LIMIT)[1] == []


def test_a_model_that_cannot_be_read_ends_it_with_the_reason(started, tmp_path):
    (tmp_path / "tiny").mkdir()
    folder = make_folder(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"no")
    program = started("--model", folder)
    assert program.fork.wait(LIMIT).returncode == 1
    assert "the worker could not start" in program.output()


def test_who_opens_it_to_others_is_warned(started, tmp_path):
    (tmp_path / "tiny").mkdir()
    program = started("--model", make_folder(tmp_path / "tiny"), "--host", "0.0.0.0")
    address_of(program)
    assert "anyone who reaches this address can use it" in program.output()


# What it loads


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small Llama with the tokenizer of the course model."""
    path = tmp_path_factory.mktemp("small")
    model = make(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_key_value_heads=2
    )
    checkpoint.save(model, path)
    course_model.load_tokenizer().save(str(path / "tokenizer.json"))
    return path


TOKENS = torch.arange(8)[None]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_what_compress_writes_is_served(small, tmp_path, format):
    model = qb.apply(checkpoint.load(small), qb.QuantConfig(group_size=32))
    formats.save(model, tmp_path, format, small, torch.float32)
    loading = served.Loading(tmp_path, {}, (), {"max_sequences": 2}, 64)
    engine = loading(lambda name: None)(())
    (text,) = engine.generate([TOKENS[0].tolist()])
    with torch.inference_mode():
        want = model(TOKENS)[0, -1].argmax().item()
    assert text[0] == want


def test_smoothquant_is_served(small, tmp_path):
    model = checkpoint.load(small)
    recipes.compress(model, recipes.Recipe("smoothquant", None, None), [TOKENS])
    command_ = __import__("llmlab.course.cli.compress", fromlist=["store"])
    command_.store(
        model,
        tmp_path,
        recipes.Recipe("smoothquant", None, None),
        "",
        small,
        torch.float32,
    )
    assert (tmp_path / "smoothquant.json").is_file()
    with torch.inference_mode():
        want = model(TOKENS)[0, -1].argmax().item()
        found = served.opened(tmp_path)(TOKENS)[0, -1].argmax().item()
    assert found == want


@pytest.mark.skipif(compiler() is None, reason="no C compiler here")
def test_an_engine_with_part_06s_plugins_is_served(small, tmp_path):
    sizes = {"num_blocks": 8, "max_tokens": 8, "max_sequences": 2}
    for name, table in (("int8", PLUGINS), ("own", {"own": TORCH})):
        config = BuildConfig(**sizes, head=(name,))
        build(small, tmp_path / name, config, plugins=table, clock=lambda run: 1.0)
    with torch.inference_mode():
        logits = served.opened(tmp_path / "int8")(TOKENS)[0, -1]
        wanted = checkpoint.load(small)(TOKENS)[0, -1]
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(ValueError, match="'own' was not given: there are torch, int8"):
        served.opened(tmp_path / "own")


# What it says of the pieces


def test_the_table_of_pieces(monkeypatch, capsys):
    from rich.console import Console

    rows = [
        {"piece": "free", "exercise": "e", "whose": "yours", "why": ""},
        {"piece": "accept", "exercise": "f", "whose": "ours", "why": "not done yet"},
    ]
    command.print_pieces(rows, Console(width=80))
    said = capsys.readouterr().out
    assert "1 of 2 pieces are yours" in said
    assert re.search(r"accept\s+f\s+ours\s+not done yet", said)


def test_an_engine_is_made_without_pieces_that_failed(small):
    code = "from llmlab.inference.paged_attention import free"
    own = (served.Own("l", "free", "right", cells=(("<n>", code),)),)
    make_engine = served.Loading(small, {}, own, {}, 64)(lambda name: None)
    assert make_engine(()).pieces.pieces.replaced == ["free"]
    assert make_engine({"free"}).pieces.pieces.replaced == []
    assert json.dumps(served.PIECES)


def test_the_worked_exercises_run_as_one_engine(tmp_path):
    """All pieces out of notebooks, in the place of ours: the same text, drafts too."""
    own = []
    for slug, names in served.PIECES.items():
        lesson = find(slug)
        copy = lesson.work(tmp_path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lesson.solution(ROOT), copy)
        cells = mine.defining_cells(lesson, tmp_path)
        own += [served.Own(slug, name, "right", cells=cells) for name in names]
    prompts = [[5, 6, 7, 5, 6], list(range(40)), list(range(35)), [9]]
    params = SamplingParams(max_new_tokens=30, temperature=0.9, top_p=0.8, seed=3)
    called = set()
    texts = []
    for theirs in (tuple(own), ()):
        sizes = {"max_sequences": 3, "gamma": 3, "block_size": 4}
        loading = served.Loading(course_model.DRAFT, {}, theirs, sizes, 100)
        engine = loading(called.add)(())
        texts.append(engine.generate(prompts, params))
        engine.check()
        assert engine.blocks_in_use == 0
    assert texts[0] == texts[1]
    assert {each.name for each in own} <= called
