"""What a model did, in Triton's words: GET v2/models/NAME/stats, and /metrics.

Times of a request, in nanoseconds: it waits in the queue; its batch is put together,
computed and taken apart. A request that shares its batch is given the whole time of
the batch. So the average of `compute_infer` is what one client waits for the model.

    request     one call of a client       inference   a row of it, n for a batch of n
    execution   one call of the model      batch_stats counts executions by their size
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

PHASES = ("compute_input", "compute_infer", "compute_output")
REASONS = ("OTHER", "REJECTED", "CANCELED", "BACKEND")


@dataclass
class Duration:
    """How often something was done, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict:
        """As Triton writes it."""
        return {"count": self.count, "ns": self.ns}


def durations(names: Iterable[str]) -> dict[str, Duration]:
    """A Duration for each name."""
    return {name: Duration() for name in names}


@dataclass
class Counts:
    """The statistics of one version of a model; several threads may write them."""

    inference_count: int = 0
    execution_count: int = 0
    last_inference: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    phases: dict[str, Duration] = field(default_factory=lambda: durations(PHASES))
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    pending: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def executed(self, size: int, phases: tuple[int, int, int]) -> None:
        """The model ran over `size` inferences; nanoseconds of the three phases."""
        with self._lock:
            self.execution_count += 1
            of_size = self.batches.setdefault(size, durations(PHASES))
            for name, ns in zip(PHASES, phases, strict=True):
                of_size[name].add(ns)

    def succeeded(
        self, size: int, whole: int, queue: int, phases: tuple[int, int, int]
    ) -> None:
        """A request of `size` inferences was answered; nanoseconds."""
        with self._lock:
            self.inference_count += size
            self.last_inference = int(time.time() * 1000)
            self.success.add(whole)
            self.queue.add(queue)
            for name, ns in zip(PHASES, phases, strict=True):
                self.phases[name].add(ns)

    def failed(self, whole: int, reason: str = "OTHER") -> None:
        """A request was not answered."""
        with self._lock:
            self.fail.add(whole)
            self.failures[reason] += 1

    def waits(self, more: int) -> None:
        """So many requests more wait for an execution."""
        with self._lock:
            self.pending += more

    def as_json(self, name: str, version: int) -> dict:
        """One entry of `model_stats`."""
        with self._lock:
            stats = {
                "success": self.success.as_json(),
                "fail": self.fail.as_json(),
                "queue": self.queue.as_json(),
            }
            stats |= {name: taken.as_json() for name, taken in self.phases.items()}
            sizes = []
            for size, taken in sorted(self.batches.items()):
                phases = {name: of.as_json() for name, of in taken.items()}
                sizes.append({"batch_size": size, **phases})
            return {
                "name": name,
                "version": str(version),
                "last_inference": self.last_inference,
                "inference_count": self.inference_count,
                "execution_count": self.execution_count,
                "inference_stats": stats,
                "batch_stats": sizes,
            }


# name → (kind, help, how it is read from the counts)
METRICS = {
    "nv_inference_request_success": (
        "counter",
        "Number of successful inference requests, all batch sizes",
        lambda c: c.success.count,
    ),
    "nv_inference_count": (
        "counter",
        "Number of inferences performed",
        lambda c: c.inference_count,
    ),
    "nv_inference_exec_count": (
        "counter",
        "Number of model executions performed",
        lambda c: c.execution_count,
    ),
    "nv_inference_request_duration_us": (
        "counter",
        "Cumulative inference request duration in microseconds",
        lambda c: c.success.ns // 1000,
    ),
    "nv_inference_queue_duration_us": (
        "counter",
        "Cumulative inference queuing duration in microseconds",
        lambda c: c.queue.ns // 1000,
    ),
    "nv_inference_compute_input_duration_us": (
        "counter",
        "Cumulative compute input duration in microseconds",
        lambda c: c.phases["compute_input"].ns // 1000,
    ),
    "nv_inference_compute_infer_duration_us": (
        "counter",
        "Cumulative compute inference duration in microseconds",
        lambda c: c.phases["compute_infer"].ns // 1000,
    ),
    "nv_inference_compute_output_duration_us": (
        "counter",
        "Cumulative inference compute output duration in microseconds",
        lambda c: c.phases["compute_output"].ns // 1000,
    ),
    "nv_inference_pending_request_count": (
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
        lambda c: c.pending,
    ),
}
FAILURES = "nv_inference_request_failure"


def metrics(counted: dict[tuple[str, int], Counts]) -> str:
    """The page /metrics: Prometheus' text format, with Triton's names.

    Args:
        counted: (model, version) → what it did.
    """
    lines = []
    for name, (kind, said, read) in METRICS.items():
        lines += [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]
        for (model, version), counts in counted.items():
            labels = f'model="{model}",version="{version}"'
            lines.append(f"{name}{{{labels}}} {read(counts)}")
    said = "Number of failed inference requests, all batch sizes"
    lines += [f"# HELP {FAILURES} {said}", f"# TYPE {FAILURES} counter"]
    for (model, version), counts in counted.items():
        for reason, count in counts.failures.items():
            labels = f'model="{model}",reason="{reason}",version="{version}"'
            lines.append(f"{FAILURES}{{{labels}}} {count}")
    return "\n".join(lines) + "\n"
