"""A server that runs while a test does: on loopback, with a worker process, on a model
of a quarter of a million parameters."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import torch._dynamo  # what making a model imports: once here, not in each fork
from safetensors.torch import save_file

from llmlab.course import served
from llmlab.inference.serving import Server, ServingConfig
from llmlab.models import course_model

TEMPLATE = """\
{%- if messages[0].role == 'assistant' %}{{ raise_exception('it speaks first') }}
{%- endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
LIMIT = 60  # seconds for what takes none: a busy machine is slow


def make_folder(path: Path) -> Path:
    """The draft model of the course with a chat template."""
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        shutil.copy(course_model.DRAFT / f"{name}.json", path)
    shutil.copy(course_model.DRAFT / "model.safetensors", path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def make_adapter(path: Path) -> Path:
    """An adapter, as `peft` writes it, that changes what the draft model says."""
    torch.manual_seed(0)
    sizes = json.loads((course_model.DRAFT / "config.json").read_text())
    width = sizes["hidden_size"]
    out = {"q_proj": width, "v_proj": sizes["num_key_value_heads"] * sizes["head_dim"]}
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, rows in out.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, width) / width**0.5
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*out]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


@dataclass(frozen=True)
class Paused(served.Loading):
    """A worker that rests before each step, so that a test can be quicker."""

    pause: float = 0.0

    def __call__(self, mark):
        make = super().__call__(mark)

        def paused(without):
            engine = make(without)
            step = engine.step

            def rested():
                time.sleep(self.pause)
                return step()

            if self.pause:
                engine.step = rested
            return engine

        return paused


class Live:
    """A server in a thread of its own.

    Attributes:
        said: what it told the one who started it.
    """

    def __init__(
        self,
        folder: Path,
        names: dict[str, Path],
        *,
        own: tuple = (),
        cache_tokens: int = 1024,
        sizes: dict | None = None,
        options: dict | None = None,
        pieces: tuple = (),
        pause: float = 0.0,
        **config,
    ) -> None:
        self.said: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        config = {"max_length": 200, "max_sequences": 8} | config
        sizes = {"max_sequences": config["max_sequences"]} | (sizes or {})
        loading = Paused(folder, names, own, sizes, cache_tokens, 1, pause)

        def make() -> Server:
            return Server(
                folder,
                loading,
                ["tiny", *names],
                config=ServingConfig(**config),
                port=0,
                pieces=pieces,
                told=self.said.append,
                # this process has imported what a worker needs
                worker_options={"method": "fork"} | (options or {}),
            )

        self.server = make()
        self.thread.start()
        self.call(self.begin)
        self.base = self.server.address
        self.http = httpx.Client(base_url=self.base, timeout=LIMIT)

    async def begin(self) -> None:
        self.server.start()
        await self.server.supervisor.ready()

    def call(self, function: Callable):
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(function(), self.loop).result(LIMIT)

    def close(self) -> None:
        self.http.close()
        self.call(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(LIMIT)
        self.loop.close()

    # What a client does -------------------------------------------------------------

    def post(self, path: str = "/v1/completions", **body) -> httpx.Response:
        return self.http.post(path, json={"model": "tiny"} | body)

    def text(self, prompt: str = "The people", **body) -> str:
        """A greedy completion."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 12} | body
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def events(self, **body) -> list[dict]:
        """The events of a streamed completion, the last without [DONE]."""
        out = []
        with self.http.stream(
            "POST", "/v1/completions", json={"model": "tiny", "stream": True} | body
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    out.append(json.loads(line.removeprefix("data: ")))
        return out

    @property
    def health(self) -> dict:
        return self.http.get("/health").json()

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        (value,) = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
        return float(value)

    def settles(self) -> None:
        """Waits until nothing is in work, and asserts that no block is in use."""
        until(lambda: self.metric("llmlab_requests_in_flight") == 0)
        until(lambda: self.metric("llmlab_blocks_in_use") == 0)
        assert self.metric("llmlab_requests_running") == 0
        assert self.server.supervisor.in_flight == 0


def until(true: Callable[[], bool], seconds: float = LIMIT) -> None:
    """Waits until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)


@contextmanager
def live(
    folder: Path, names: dict[str, Path] | None = None, **options
) -> Iterator[Live]:
    server = Live(folder, names or {}, **options)
    try:
        yield server
    finally:
        server.close()
