"""Clients that ask a server, and what they waited.

    closed   each client sends its next request when it has the answer: a fixed number
             is on its way
    opened   requests are sent at given times, whether or not there were answers: their
             number grows when the server is too slow

Each thread has one connection, kept open. A latency counts from the time at which the
request was *to be* sent: what waits for a thread waits, too.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

LATE = 0.02  # seconds until the first request, so that all threads are there


def body_for(values: Sequence[float]) -> bytes:
    """A request of one row for the input X, as JSON."""
    shape = [1, len(values)]
    tensor = {"name": "X", "shape": shape, "datatype": "FP32", "data": list(values)}
    return json.dumps({"inputs": [tensor]}).encode()


class Client:
    """One connection that asks one model.

    Args:
        url: host and port.
    """

    def __init__(self, url: str, model: str, body: bytes) -> None:
        self._connection = http.client.HTTPConnection(url, timeout=60)
        self._path = f"/v2/models/{model}/infer"
        self._body = body

    def ask(self) -> dict:
        """The answer.

        Raises:
            RuntimeError: the server refused.
        """
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", self._path, self._body, headers)
        answer = self._connection.getresponse()
        told = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {told.get('error')}")
        return told

    def close(self) -> None:
        """No more."""
        self._connection.close()


def closed(
    url: str, model: str, clients: int, each: int, body: bytes | None = None
) -> list[float]:
    """Latencies of `clients` that send `each` requests, one after the other."""
    start = threading.Barrier(clients)

    def run(_: int) -> list[float]:
        client = Client(url, model, body or body_for([1.0] * 8))
        took = []
        start.wait()
        for _ in range(each):
            began = time.perf_counter()
            client.ask()
            took.append(time.perf_counter() - began)
        client.close()
        return took

    with ThreadPoolExecutor(clients) as pool:
        return [seconds for took in pool.map(run, range(clients)) for seconds in took]


def opened(
    url: str,
    model: str,
    times: Sequence[float],
    threads: int = 48,
    body: bytes | None = None,
) -> list[float]:
    """Latencies of requests that are sent at `times`, in seconds from now."""
    local = threading.local()
    clients: list[Client] = []
    began = time.perf_counter() + LATE

    def send(at: float) -> float:
        if not hasattr(local, "client"):
            local.client = Client(url, model, body or body_for([1.0] * 8))
            clients.append(local.client)
        early = began + at - time.perf_counter()
        if early > 0:
            time.sleep(early)
        local.client.ask()
        return time.perf_counter() - began - at

    with ThreadPoolExecutor(threads) as pool:
        took = list(pool.map(send, times))
    for client in clients:
        client.close()
    return took


def statistics(url: str, model: str) -> dict:
    """The model's entry of `model_stats`."""
    connection = http.client.HTTPConnection(url, timeout=60)
    connection.request("GET", f"/v2/models/{model}/stats")
    told = json.loads(connection.getresponse().read())
    connection.close()
    return told["model_stats"][0]


def executions(before: dict, after: dict) -> dict[int, int]:
    """Between two looks at the statistics: the size of a batch → how many there were.

    A row of `batch_stats` is one of the model's executions.
    """

    def counts(stats: dict) -> dict[int, int]:
        rows = stats["batch_stats"]
        return {row["batch_size"]: row["compute_infer"]["count"] for row in rows}

    earlier = counts(before)
    found = {}
    for size, count in counts(after).items():
        if count > earlier.get(size, 0):
            found[size] = count - earlier.get(size, 0)
    return found


def queued(before: dict, after: dict) -> float:
    """Seconds in the queue, on average, between two looks at the statistics."""
    a = before["inference_stats"]["queue"]
    b = after["inference_stats"]["queue"]
    return (b["ns"] - a["ns"]) / 1e9 / (b["count"] - a["count"])
