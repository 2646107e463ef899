"""The HTTP server: OpenAI's paths, health, metrics, and the chat page.

    POST /v1/chat/completions     POST /v1/completions
    GET  /v1/models               GET  /v1/models/NAME
    GET  /health   GET /metrics   GET  /   (the chat page)   GET /about (what it shows)

It listens on this machine alone unless told otherwise. Then only a browser's page that
came from here is answered: a page of another site can neither read nor ask (no CORS, no
body but JSON, no foreign Origin, no Host but this machine's).

Every request ends with an answer or with an error in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tornado.httpserver
import tornado.iostream
import tornado.netutil
import tornado.web

from llmlab.inference.serving import openai_api, worker
from llmlab.inference.serving.answering import Answering, Call, Gone, ServingConfig
from llmlab.inference.serving.metrics import Metrics
from llmlab.inference.serving.openai_api import Answer, Asked, Refused
from llmlab.inference.serving.supervisor import Supervisor
from llmlab.inference.serving.text import ModelText

PAGE = Path(__file__).parent / "chat.html"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
DISCARDED = 16  # times max_body: so much of a body is read only to be able to answer
HEADERS = 32 * 1024
IDLE = 75.0  # seconds that a connection may be open without a request
SLOW = 30.0  # seconds that a body may take


class Server:
    """One model behind HTTP, until `close`.

    Args:
        folder: the model's, for its tokenizer and chat template.
        prepare: loads it in the worker: see `worker.Prepare`.
        names: by which clients ask for it and for its adapters, the base first.
        pieces: whose functions the engine is made of, for the page:
            [{"piece", "exercise", "whose", "why"}].
        told: called with each sentence that the one who started it may want to read.
        worker_options: how the process starts: see `Supervisor`.
    Raises:
        FileNotFoundError: the folder has no tokenizer.
        OSError: the address cannot be listened on.
    """

    def __init__(
        self,
        folder: str | Path,
        prepare: worker.Prepare,
        names: Sequence[str],
        *,
        config: ServingConfig | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        pieces: Sequence[Mapping[str, str]] = (),
        told: Callable[[str], None] = lambda text: None,
        worker_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config or ServingConfig()
        text = ModelText(folder)
        self.created = int(time.time())
        self.pieces = [dict(each) for each in pieces]
        self.host = host
        self.supervisor = Supervisor(
            prepare,
            told=told,
            stepped=lambda counts: self.metrics.stepped(counts),
            **(worker_options or {}),
        )
        self.metrics = Metrics(
            lambda: self.answering.reserved, lambda: self.supervisor.health.restarts
        )
        self.answering = Answering(
            text, list(names), self.supervisor, self.config, self.metrics
        )
        self.page, self.policy = page()
        self.sockets = bound(host, port)
        self.port = self.sockets[0].getsockname()[1]
        self._http: tornado.httpserver.HTTPServer | None = None

    @property
    def address(self) -> str:
        """What to open in a browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Begins to listen, and to load the model. Inside of a running event loop."""
        self._http = tornado.httpserver.HTTPServer(
            self._application(),
            max_body_size=DISCARDED * self.config.max_body,
            max_header_size=HEADERS,
            idle_connection_timeout=IDLE,
            body_timeout=SLOW,
        )
        self._http.add_sockets(self.sockets)
        self.supervisor.start()

    async def close(self) -> None:
        """Ends all that it has begun: connections, the worker, the address."""
        self._http.stop()
        await self.supervisor.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):  # for those that are told the reason
                while self.answering.reserved:
                    await asyncio.sleep(0.01)
        await self._http.close_all_connections()

    def _application(self) -> tornado.web.Application:
        given = {"server": self}
        return tornado.web.Application(
            [
                (r"/", Page, given),
                (r"/about", About, given),
                (r"/health", HealthPage, given),
                (r"/metrics", MetricsPage, given),
                (r"/v1/models", Models, given),
                (r"/v1/models/(.+)", Models, given),
                (r"/v1/chat/completions", Chat, given),
                (r"/v1/completions", Completions, given),
            ],
            default_handler_class=NotThere,
            default_handler_args=given,
            log_function=lambda handler: None,
        )

    def hosts(self) -> tuple[str, ...] | None:
        """What a request may name as its host; None: anything.

        Who listens to this machine alone answers to its names alone: else a page of
        another site could reach it under a name of its own.
        """
        return LOOPBACK if is_loopback(self.host) else None


def is_loopback(host: str) -> bool:
    """Whether it is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen there; port 0 is any free one."""
    if host == "localhost":
        host = "127.0.0.1"
    return tornado.netutil.bind_sockets(port, address=host, backlog=512)


def page() -> tuple[bytes, str]:
    """The chat page, and the policy that lets nothing else in.

    Its script and style are known by their digest, so not a line that a model writes
    can run.
    """
    text = PAGE.read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.S)
        digest = hashlib.sha256(inside.encode()).digest()
        allowed[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; script-src {allowed['script']};"
        f" style-src {allowed['style']}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


# Handlers -----------------------------------------------------------------------------


class Handler(tornado.web.RequestHandler):
    """What all have in common: who may ask, and how an error looks."""

    def initialize(self, server: Server) -> None:
        self.server = server

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmlab")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        allowed = self.server.hosts()
        host = urlsplit(f"//{self.request.host}")
        name = (host.netloc.rpartition("@")[2]).rsplit(":", 1)[0].lower()
        if self.request.host.endswith("]"):  # [::1] without a port
            name = self.request.host.lower()
        if allowed is not None and name not in allowed:
            self.refuse(
                Refused(f"the host {name[:80]!r} is not this machine", status=403)
            )
            return
        origin = self.request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.request.host:
            self.refuse(Refused("pages of other sites are not answered", status=403))

    def data(self, found: Any, status: int = 200) -> None:
        """Ends with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(found))

    def refuse(self, why: Refused) -> None:
        """Ends with an error in OpenAI's form."""
        if why.wait is not None:
            self.set_header("Retry-After", str(why.wait))
        self.data(why.as_data(), why.status)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What tornado finds wrong, as a method that is not there."""
        why = f"{self.request.method} {self.request.path[:80]} is not served here"
        if status_code >= 500:
            why = "the server has made a mistake, and goes on"
        elif status_code != 405:
            why = f"{self._reason}: {self.request.path[:80]}"
        self.refuse(Refused(why, status=status_code))


class NotThere(Handler):
    """Any other path."""

    def prepare(self) -> None:
        super().prepare()
        if not self._finished:
            path = self.request.path[:80]
            self.refuse(Refused(f"{path} is not served here", status=404))


class Page(Handler):
    """The chat page."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", self.server.policy)
        self.set_header("Referrer-Policy", "no-referrer")
        self.finish(self.server.page)


class About(Handler):
    """What the page shows besides the chat."""

    def get(self) -> None:
        health = self.server.supervisor.health
        pieces = []
        for each in self.server.pieces:
            why = health.left_out.get(each["piece"])
            if why is not None and each["whose"] == "yours":
                each = each | {
                    "whose": "ours",
                    "why": f"it failed while serving: {why}",
                }
            pieces.append(each)
        found = dict(self.server.answering.about()) | {"pieces": pieces}
        found |= {"state": health.state, "reason": health.reason}
        self.data(found)


class HealthPage(Handler):
    """Whether it can answer: 200, or 503 with the reason."""

    def get(self) -> None:
        health = self.server.supervisor.health
        status = 200 if health.state == "ready" else 503
        found = {
            "status": health.state,
            "reason": health.reason,
            "restarts": health.restarts,
            "left_out": health.left_out,
        }
        self.data(found, status)


class MetricsPage(Handler):
    """For Prometheus."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(self.server.metrics.text())


class Models(Handler):
    """The base and its adapters."""

    def get(self, name: str | None = None) -> None:
        names = self.server.answering.names
        created = self.server.created
        if name is None:
            self.data(openai_api.models(names, created))
            return
        try:
            self.server.answering.adapter(name)
        except Refused as error:
            self.refuse(error)
            return
        self.data(openai_api.model(name, names[0], created))


@tornado.web.stream_request_body
class Posted(Handler):
    """A request with a body of JSON, and an answer whole or in pieces."""

    is_chat = False
    call: Call | None = None
    body = b""

    def prepare(self) -> None:
        super().prepare()
        if self._finished:
            return
        kind = self.request.headers.get("Content-Type", "").split(";")[0].strip()
        if self.request.method == "POST" and kind.lower() != "application/json":
            self.refuse(
                Refused(
                    f"Content-Type is {kind[:80]!r}: it must be application/json",
                    status=415,
                )
            )

    def data_received(self, chunk: bytes) -> None:
        """More of the body; beyond the limit it is not kept."""
        if len(self.body) <= self.server.config.max_body:
            self.body += chunk

    def on_connection_close(self) -> None:
        if self.call is not None:
            self.call.hang_up()

    async def post(self) -> None:
        arrived = time.monotonic()
        try:
            asked = self.read()
            self.call = Call(asked, arrived, arrived + self.server.config.max_seconds)
            if asked.stream:
                await self.in_pieces(self.call)
            else:
                await self.at_once(self.call)
        except Refused as error:
            self.refuse(error)
        except (Gone, TimeoutError, tornado.iostream.StreamClosedError):
            # nobody is there to be told, or nobody reads
            self.request.connection.stream.close()

    def read(self) -> Asked:
        """What the body asks for.

        Raises:
            Refused: it is too large, or not understood.
        """
        most = self.server.config.max_body
        if len(self.body) > most:
            raise Refused(
                f"the body has over {most:,} bytes, the limit of this server",
                status=413,
                code="body_too_large",
            )
        if self.is_chat:
            return openai_api.read_chat(self.body)
        return openai_api.read_completion(self.body)

    def head(self, call: Call) -> Answer:
        """What all parts of the answer say."""
        kind = "chatcmpl" if self.is_chat else "cmpl"
        id = f"{kind}-{uuid.uuid4().hex[:24]}"
        return Answer(id, int(time.time()), call.asked.model, self.is_chat)

    async def at_once(self, call: Call) -> None:
        """The whole answer."""
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        async with contextlib.aclosing(self.server.answering.answer(call)) as pieces:
            async for index, written, reason in pieces:
                texts[index] = texts.get(index, "") + written
                if reason:
                    reasons[index] = reason
        both = [(texts[i], reasons[i]) for i in sorted(texts)]
        used = openai_api.usage(call.read, call.written)
        self.data(self.head(call).whole(both, used))

    async def in_pieces(self, call: Call) -> None:
        """Server-sent events; what goes wrong after the first is one, too."""
        answer = self.head(call)
        begun: set[int] = set()
        try:
            async with contextlib.aclosing(
                self.server.answering.answer(call)
            ) as pieces:
                async for index, written, reason in pieces:
                    if not begun:
                        self.set_header("Content-Type", "text/event-stream")
                    if index not in begun and self.is_chat:
                        self.event(answer.opening(index))
                    begun.add(index)
                    if written:
                        self.event(answer.piece(index, written))
                    if reason:
                        self.event(answer.closing(index, reason))
                    # one who does not read holds nothing up but himself
                    await asyncio.wait_for(self.flush(), call.left)
        except Refused as error:
            if not begun:
                raise
            self.event(error.as_data())
            await self.finish()
            return
        if call.asked.include_usage:
            self.event(answer.used(openai_api.usage(call.read, call.written)))
        self.write("data: [DONE]\n\n")
        await self.finish()

    def event(self, found: Any) -> None:
        """One event."""
        self.write(f"data: {json.dumps(found)}\n\n")


class Chat(Posted):
    """A conversation."""

    is_chat = True


class Completions(Posted):
    """A text that goes on."""
