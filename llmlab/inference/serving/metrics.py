"""What a server measures of itself, in the form that Prometheus reads.

    time to first token   from the request's arrival to its first token
    inter-token           between two tokens of one request
    queue                 from the worker's taking a request to its first step

The names of the first three are those of vLLM, with our prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "running": ("llmlab_requests_running", "Requests that the engine computes"),
    "waiting": ("llmlab_requests_waiting", "Requests that wait in the engine"),
    "blocks_used": (
        "llmlab_blocks_in_use",
        "Blocks of the cache that stand in a table",
    ),
    "blocks": ("llmlab_blocks", "Blocks of the cache"),
}


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, in_flight: Callable[[], int], restarts: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.first = self._histogram(
            "llmlab_time_to_first_token_seconds", "Until the first token", FIRST
        )
        self.next = self._histogram(
            "llmlab_inter_token_latency_seconds", "Between two tokens", NEXT
        )
        self.queue = self._histogram(
            "llmlab_request_queue_time_seconds", "Until the first step", FIRST
        )
        self.step = self._histogram("llmlab_step_seconds", "Of the engine", NEXT)
        self.requests = Counter(
            "llmlab_requests",
            "Requests that have ended, by how",
            ["outcome"],
            registry=self.registry,
        )
        self.prompt = self._counter("llmlab_prompt_tokens", "Tokens read")
        self.written = self._counter("llmlab_generation_tokens", "Tokens written")
        self._gauges = {
            key: Gauge(name, text, registry=self.registry)
            for key, (name, text) in GAUGES.items()
        }
        asked = Gauge(
            "llmlab_requests_in_flight",
            "Answers that somebody waits for",
            registry=self.registry,
        )
        asked.set_function(in_flight)
        again = Gauge(
            "llmlab_worker_restarts",
            "How often the worker was started again",
            registry=self.registry,
        )
        again.set_function(restarts)

    def _histogram(self, name: str, text: str, buckets: tuple) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def stepped(self, counts: Mapping[str, Any]) -> None:
        """After a step of the engine."""
        self.full(counts)
        if "step" in counts:
            self.step.observe(counts["step"])
        for seconds in counts.get("queued", ()):
            self.queue.observe(seconds)

    def full(self, counts: Mapping[str, Any]) -> None:
        """How full the engine is."""
        for key, gauge in self._gauges.items():
            if key in counts:
                gauge.set(counts[key])

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
