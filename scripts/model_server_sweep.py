"""The delay of a batch against p99, on the real Triton Inference Server.

Stored in llmlab/inference/data/model_server.csv.

    python scripts/model_server_sweep.py            continue, a line a run
    python scripts/model_server_sweep.py --check 1  make that many runs again

The model sleeps for 5 ms, whatever the batch. "closed": so many clients, each sends
its next request when it has the answer; preferred size 8. "open": so many requests a
second, at random times. Delays in milliseconds, "none": without dynamic batching.
Latencies are the clients', the queue and the batches are from the server's own
statistics. Needs `llmlab peer triton`. Times are of the machine that ran it.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable

from sweeping import sweep

from llmlab.course import peers
from llmlab.inference import model_server as ms
from llmlab.inference.model_server import load

FIELDS = ["kind", "load", "delay", "run"]
FIELDS += ["requests", "executions", "queue", "p50", "p99", "sizes", "python"]
DELAYS = ("none", 0, 2, 5, 10, 20, 40)
RUNS = [
    ("closed", clients, delay, run)
    for run in (1, 2, 3)
    for clients in (1, 16)
    for delay in ("none", 20)
]
RUNS += [
    ("open", rate, delay, run)
    for run in (1, 2, 3)
    for rate in (50, 150, 400)
    for delay in DELAYS
    if not (delay == "none" and rate == 400)  # more than it can do: 200 a second
]


def batching(kind: str, delay: int | str) -> str:
    """The text in config.pbtxt."""
    if delay == "none":
        return ""
    return ms.dynamic(delay / 1000, (8,) if kind == "closed" else ())


def name(kind: str, delay: int | str) -> str:
    """Of the model."""
    return f"{kind}_{delay}"


def triton() -> ms.TritonServer:
    """The server, with a model for each way to batch."""
    models = {
        name(kind, delay): batching(kind, delay)
        for kind in ("closed", "open")
        for delay in DELAYS
    }
    folder = tempfile.mkdtemp(prefix="server_sweep_")
    repository = ms.write_example(f"{folder}/models", models, models=())
    return ms.TritonServer(peers.make("triton", quiet=True), repository)


def runner() -> Callable[..., list]:
    """What makes the line of a run."""
    url = triton().start().url
    for kind in ("closed", "open"):
        for delay in DELAYS:  # the first request of a model is slow
            load.closed(url, name(kind, delay), 2, 3)

    def line(kind: str, amount: int, delay: int | str, run: int) -> list:
        model = name(kind, delay)
        before = load.statistics(url, model)
        if kind == "closed":
            took = load.closed(url, model, amount, 32 if amount == 1 else 8)
        else:
            times = ms.poisson(amount, max(200, 2 * amount), seed=run)
            took = load.opened(url, model, times)
        after = load.statistics(url, model)
        sizes = load.executions(before, after)
        made = [kind, amount, delay, run, len(took), sum(sizes.values())]
        values = [load.queued(before, after)]
        values += [ms.percentile(took, percent) for percent in (50, 99)]
        made += [f"{1000 * value:.2f}" for value in values]
        made.append(" ".join(f"{size}:{n}" for size, n in sorted(sizes.items())))
        return [*made, platform.python_version()]

    return line


if __name__ == "__main__":
    sweep(__doc__, ms.FILE, FIELDS, RUNS, runner, shown="executions")
