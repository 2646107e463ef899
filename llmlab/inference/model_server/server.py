"""The server: KServe v2 over HTTP, on tornado.

    GET  v2/health/live, v2/health/ready       is there somebody, and can it work?
    GET  v2, v2/models/NAME[/versions/V]       what it is, what a model takes and gives
    GET  …/ready  …/config  …/stats            can it be asked, how is it served, counts
    POST …/infer                               the work
    POST v2/repository/index                   all models
    GET  metrics                               for Prometheus (Triton: on its own port)

It listens on this machine alone unless told otherwise: there is no password. Bodies,
times and queues are bounded. What a client sends is read as numbers and texts, never
run. Errors are JSON, {"error": reason}; the reason of an unforeseen one stays here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tornado import httpserver, netutil, web

from llmlab.inference.model_server.backend import ModelFailed
from llmlab.inference.model_server.batching import Decide, next_batch
from llmlab.inference.model_server.counting import metrics
from llmlab.inference.model_server.repository import read_repository
from llmlab.inference.model_server.running import RunningEnsemble, RunningModel
from llmlab.inference.model_server.v2 import (
    Refused,
    infer_response,
    parse_infer_request,
)

NAME = "llmlab"
VERSION = "1.0"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
HEADER = "Inference-Header-Content-Length"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, and what a client may ask for at most.

    Attributes:
        port: 0 takes a free one.
        max_body: bytes of a request.
        max_seconds: until a request is answered, or refused with 504.
        max_pending: requests on their way, more are refused with 503.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_body: int = 8 << 20
    max_seconds: float = 30.0
    max_pending: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be 0 … 65535")
        for name in ("max_body", "max_seconds", "max_pending"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


class ModelServer:
    """Serves a repository from a thread of its own.

        with ModelServer("models") as server:
            client = tritonclient.http.InferenceServerClient(server.url)

    Args:
        decide: `next_batch`, or another of its signature: a learner's own.
    Raises:
        ValueError: the repository cannot be served; nothing is started then.
    """

    def __init__(
        self,
        repository: str | Path,
        config: ServerConfig | None = None,
        decide: Decide = next_batch,
    ) -> None:
        self.config = config or ServerConfig()
        self.models: dict[str, RunningModel | RunningEnsemble] = {}
        self.pending = 0
        self.port = 0
        entries = read_repository(repository)
        try:
            for name, entry in entries.items():
                if not entry.config.is_ensemble:
                    self.models[name] = RunningModel(entry, decide)
        except ValueError:
            self._close_models()
            raise
        singles = dict(self.models)
        for name, entry in entries.items():
            if entry.config.is_ensemble:
                self.models[name] = RunningEnsemble(entry, singles)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Host and port, as tritonclient wants them."""
        return f"{self.config.host}:{self.port}"

    def start(self) -> ModelServer:
        """Listen; returns when requests can come.

        Raises:
            OSError: the port is taken.
        """
        began: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(began)), daemon=True
        )
        self._thread.start()
        try:
            self.port = began.result()
        except OSError:
            self._thread.join()
            self._thread = None
            raise
        return self

    async def _serve(self, began: Future) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        http = httpserver.HTTPServer(
            application(self),
            max_body_size=self.config.max_body,
            body_timeout=self.config.max_seconds,
            idle_connection_timeout=self.config.max_seconds,
        )
        try:
            sockets = netutil.bind_sockets(self.config.port, self.config.host)
        except OSError as error:
            began.set_exception(error)
            return
        http.add_sockets(sockets)
        began.set_result(sockets[0].getsockname()[1])
        await self._stopped.wait()
        http.stop()
        await http.close_all_connections()

    def stop(self) -> None:
        """Listen no more, finish what is being executed."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._thread = None
        self._close_models()

    def _close_models(self) -> None:
        # ensembles first: they wait for the others
        for model in sorted(
            self.models.values(), key=lambda m: not m.entry.config.is_ensemble
        ):
            model.close()
        self.models = {}

    def __enter__(self) -> ModelServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def application(server: ModelServer) -> web.Application:
    """The addresses."""
    model = r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?"
    given = {"server": server}
    return web.Application(
        [
            (r"/v2/health/(?:live|ready)", Health, given),
            (r"/v2/?", Server, given),
            (r"/v2/models/stats", AllStatistics, given),
            (r"/v2/repository/index", Index, given),
            (r"/metrics", Metrics, given),
            (model, Metadata, given),
            (model + "/ready", Ready, given),
            (model + "/config", Configuration, given),
            (model + "/stats", Statistics, given),
            (model + "/infer", Infer, given),
        ],
        default_handler_class=Unknown,
        default_handler_args=given,
        log_function=lambda handler: None,
    )


class Handler(web.RequestHandler):
    """What all have in common: JSON, also for errors."""

    def initialize(self, server: ModelServer) -> None:
        self.model_server = server

    def answer(self, value: object) -> None:
        """JSON."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value, separators=(",", ":"), allow_nan=False))

    def write_error(self, status_code: int, **told: object) -> None:
        """{"error": reason}."""
        reason = self._reason
        raised = told.get("exc_info")
        if raised and isinstance(raised[1], Refused | ModelFailed):
            reason = str(raised[1])
        self.answer({"error": reason})

    def log_exception(self, kind, error, trace) -> None:
        """Unforeseen ones only."""
        if not isinstance(error, Refused | ModelFailed | web.HTTPError):
            log.error("unforeseen", exc_info=(kind, error, trace))

    def _handle_request_exception(self, error: BaseException) -> None:
        if isinstance(error, Refused):
            self.send_error(error.status, exc_info=(type(error), error, None))
        else:
            super()._handle_request_exception(error)

    def model(self, name: str, version: str | None):
        """The model of an address.

        Raises:
            Refused: 404, there is none.
        """
        found = self.model_server.models.get(name)
        if found is None:
            raise Refused(f"Request for unknown model: '{name}' is not found", 404)
        if version not in (None, str(found.entry.version)):
            raise Refused(
                f"Request for unknown model: '{name}' version {version} is not found",
                404,
            )
        return found


class Unknown(Handler):
    """Any other address."""

    def prepare(self) -> None:
        """404."""
        raise Refused("Not Found", 404)


class Health(Handler):
    """All models are loaded before the first request: live is ready."""

    def get(self) -> None:
        """200."""
        self.finish()


class Server(Handler):
    """The server's own metadata."""

    def get(self) -> None:
        """Name, version and extensions."""
        self.answer({"name": NAME, "version": VERSION, "extensions": EXTENSIONS})


class Index(Handler):
    """The repository."""

    def post(self) -> None:
        """All models."""
        models = self.model_server.models.values()
        self.answer(
            [
                {
                    "name": model.entry.name,
                    "version": str(model.entry.version),
                    "state": "READY",
                }
                for model in models
            ]
        )


class Metadata(Handler):
    """What a model takes and gives."""

    def get(self, name: str, version: str | None = None) -> None:
        """In the protocol's words."""
        entry = self.model(name, version).entry
        self.answer(entry.config.metadata((entry.version,)))


class Ready(Handler):
    """Whether a model can be asked."""

    def get(self, name: str, version: str | None = None) -> None:
        """200, or 400 as Triton has it."""
        try:
            self.model(name, version)
        except Refused:
            raise Refused("Model version not ready") from None
        self.finish()


class Configuration(Handler):
    """How a model is served."""

    def get(self, name: str, version: str | None = None) -> None:
        """In Triton's words."""
        self.answer(self.model(name, version).entry.config.as_json())


class Statistics(Handler):
    """What a model did."""

    def get(self, name: str, version: str | None = None) -> None:
        """One entry."""
        self.answer({"model_stats": [statistics_of(self.model(name, version))]})


class AllStatistics(Handler):
    """What all models did."""

    def get(self) -> None:
        """One entry for each."""
        models = self.model_server.models.values()
        self.answer({"model_stats": [statistics_of(model) for model in models]})


def statistics_of(model: RunningModel | RunningEnsemble) -> dict:
    """The entry of a model."""
    return model.counts.as_json(model.entry.name, model.entry.version)


class Metrics(Handler):
    """For Prometheus."""

    def get(self) -> None:
        """All counters."""
        models = self.model_server.models.values()
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        counted = {(m.entry.name, m.entry.version): m.counts for m in models}
        self.finish(metrics(counted))


class Infer(Handler):
    """The work."""

    async def post(self, name: str, version: str | None = None) -> None:
        """Read, put into the queue, wait, answer."""
        server = self.model_server
        model = self.model(name, version)
        length = self.request.headers.get(HEADER)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Refused(f"{HEADER} is {length!r:.40}, and must be a number")
        request = parse_infer_request(
            self.request.body, None if length is None else int(length)
        )
        if server.pending >= server.config.max_pending:
            raise Refused(f"{server.pending} requests are on their way already", 503)
        server.pending += 1
        try:
            future = asyncio.wrap_future(model.submit(request))
            outputs = await asyncio.wait_for(future, server.config.max_seconds)
        except TimeoutError:
            limit = server.config.max_seconds
            raise Refused(f"no answer within {limit:g} seconds", 504) from None
        except ModelFailed as error:
            raise Refused(str(error), 500) from None
        finally:
            server.pending -= 1
        body, head = infer_response(
            model.entry.config, model.entry.version, request, outputs
        )
        if head is None:
            self.set_header("Content-Type", "application/json")
        else:
            self.set_header("Content-Type", "application/octet-stream")
            self.set_header(HEADER, str(head))
        self.finish(body)
